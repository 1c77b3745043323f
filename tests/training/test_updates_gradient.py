"""Law 13: ranks x accumulation x bucketing or packing give the gradient of the one flat batch."""

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing
from update_ranks import ACCUMULATE, KINDS, MEANS, run_rank


@pytest.mark.parametrize("replicas", [2, 3])
def test_an_update_of_several_processes_has_the_gradient_of_one_flat_batch(replicas: int, tmp_path: Path) -> None:
    """Red with a mean of each micro-batch in place of the sum over the update."""
    multiprocessing.spawn(run_rank, (replicas, str(tmp_path)), nprocs=replicas)
    for rank in range(replicas):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert len(found) == len(KINDS) * len(ACCUMULATE) * len(MEANS)
        assert max(found.values()) < 1e-6, found
