"""The training loop of `docs/ranks.md`, run as it stands there by two processes, and once more from its checkpoint."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from samplers import ShardWriter

PAGE = (Path(__file__).parents[2] / "docs" / "ranks.md").read_text()
# What the page takes as given.
BEFORE = """
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from collate import PadCollator
from samplers import LengthBucketBatchSampler, ShardDataset

folder, collate, epochs, seen = Path(sys.argv[1]), PadCollator(), 2, []
data, checkpoint = ShardDataset(folder / "shards"), folder / "run.pt"


def train_step(batch):
    seen.extend(batch["__key__"])


def save(path, **state):
    torch.save(state, path)


"""
AFTER = """
(folder / f"{dist.get_rank()}.txt").write_text(" ".join(seen))
dist.destroy_process_group()
"""
# A small corpus has few steps: 12 an epoch, so that the last save is in the middle of one.
SMALLER = {"max_tokens=20_000": "max_tokens=2_000", "num_workers=4": "num_workers=1", "step % 1000": "step % 5"}


def run(folder: Path) -> list[list[str]]:
    """The samples of each rank, in the order of its steps."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(folder / "loop.py"), str(folder)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [(folder / f"{rank}.txt").read_text().split() for rank in range(2)]


def test_the_training_loop_of_the_page_trains_and_resumes(tmp_path: Path) -> None:
    [loop] = re.findall(r"```python\n(import torch\.distributed as dist\n.*?)```", PAGE, re.DOTALL)
    for shown, smaller in SMALLER.items():
        assert shown in loop
        loop = loop.replace(shown, smaller)
    (tmp_path / "loop.py").write_text(BEFORE + loop + AFTER)
    rng, keys = np.random.default_rng(0), [f"k{place}" for place in range(600)]
    with ShardWriter(tmp_path / "shards") as writer:
        for key in keys:
            writer.write({"__key__": key, "x": np.ones(rng.integers(1, 120))})
    whole = run(tmp_path)
    assert sorted(whole[0] + whole[1]) == sorted(keys * 2)
    position = torch.load(tmp_path / "run.pt")["position"]
    rest = run(tmp_path)
    assert position["epoch"] == 1
    assert 0 < len(rest[0]) + len(rest[1]) < len(keys)
    assert all(later == first[len(first) - len(later) :] for first, later in zip(whole, rest, strict=True))
