"""Which replica this process is: from the process group, a launcher's variables, or the user."""

import os
import sys

import torch.distributed as dist

from collate.widths import check_count


def find_replica(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """How many replicas there are, and which of them this process is.

    Args:
        num_replicas: None takes the initialised process group's size, or 1.
        rank: None takes the process group's rank, or 0 of 1.

    Raises:
        TypeError: One of them is not an int.
        ValueError: They are out of range, or `num_replicas` is given without a rank and there is no process group.
        RuntimeError: A launcher started several processes, and their process group is not initialised; or accelerate
            may split the batches a second time.
    """
    grouped = dist.is_available() and dist.is_initialized()
    if num_replicas is None:
        _refuse_missing_group(grouped=grouped)
        num_replicas = dist.get_world_size() if grouped else 1
        _refuse_second_sharding(num_replicas, rank)
    num_replicas = check_count("num_replicas", num_replicas, least=1, hint="one process is 1")
    if rank is None:
        if num_replicas > 1 and not grouped:
            raise ValueError(f"rank must be given with num_replicas={num_replicas}: no process group is initialised")
        rank = dist.get_rank() if grouped and num_replicas > 1 else 0
    rank = check_count("rank", rank, least=0, hint="count replicas from 0")
    if rank >= num_replicas:
        raise ValueError(f"rank must be below num_replicas={num_replicas}, got {rank}: count replicas from 0")
    return num_replicas, rank


def _refuse_second_sharding(num_replicas: int, rank: object) -> None:
    """Refuse a sampler of one rank where accelerate would split its batches among the ranks again.

    Raises:
        RuntimeError: accelerate would.
    """
    # accelerate's prepare would silently take every W-th batch of this rank's batches. Only if the program has imported
    # accelerate can it be in use; importing it here would make every start slow.
    accelerate = sys.modules.get("accelerate.state")
    if num_replicas > 1 and rank is None and accelerate is not None and accelerate.is_initialized():
        raise RuntimeError(
            f"accelerate runs {num_replicas} processes, and its prepare would split this replica's batches a second "
            'time: give rank="all" to a batch sampler whose loader goes through prepare; or keep the loader out of it, '
            "and give rank=accelerator.process_index"
        )


def _refuse_missing_group(*, grouped: bool) -> None:
    """Refuse a sampler in a process that a launcher started, but that does not know the other processes.

    Raises:
        RuntimeError: There are others, and no process group.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if not grouped and world.isdigit() and int(world) > 1:
        raise RuntimeError(
            f"a launcher started {world} processes (WORLD_SIZE), but torch.distributed is not initialised, and every "
            "process would train on all samples: call init_process_group first, or give num_replicas and rank"
        )
