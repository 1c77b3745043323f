"""Which replica this process is: from the process group, a launcher's variables, or the user.

The first of these that says something counts: what the user gives; the process group; the variables of torchrun, which
demand a group; those of SLURM. `srun --ntasks=4 python train.py` starts four processes with

    SLURM_STEP_NUM_TASKS=4 SLURM_NTASKS=4 SLURM_PROCID=0 ... 3

A batch script, and a shell of `salloc --ntasks=4`, have SLURM_NTASKS=4 too, but are one process.
"""

import logging
import os
import sys
from typing import Final, NamedTuple

import torch.distributed as dist

from collate.widths import check_count

_logger = logging.getLogger(__name__)
# An empty value, as a script of a shell may export it, says as little as none.
_WORLD: Final = "WORLD_SIZE"
_TASKS: Final = "SLURM_NTASKS"
_STEP_TASKS: Final = "SLURM_STEP_NUM_TASKS"
_TASK: Final = "SLURM_PROCID"
# Tasks for which it was logged that ranks come from SLURM.
_LOGGED: Final[set[int]] = set()


class SlurmTask(NamedTuple):
    """Which of the processes that srun has started this one is.

    Attributes:
        tasks: Number of processes.
        number: Which of them.
        variable: The variable that has their number.
    """

    tasks: int
    number: int
    variable: str


def find_replica(num_replicas: int | None, rank: int | None) -> tuple[int, int]:
    """How many replicas there are, and which of them this process is.

    Args:
        num_replicas: None takes the initialised process group's size, the tasks of a SLURM step, or 1.
        rank: None takes the process group's rank, the number of the SLURM task, or 0 of 1.

    Raises:
        TypeError: One of them is not an int.
        ValueError: They are out of range, or `num_replicas` is given without a rank, there is no process group, and
            SLURM has not started as many tasks.
        RuntimeError: torchrun started several processes, and their process group is not initialised; WORLD_SIZE is no
            number; the process group has one process, and SLURM started several; variables of SLURM contradict each
            other; or accelerate may split the batches a second time.
    """
    grouped = dist.is_available() and dist.is_initialized()
    if num_replicas is None:
        if not grouped:
            _refuse_missing_group()
        num_replicas = _group_size() if grouped else _count_tasks()
        _refuse_second_sharding(num_replicas, rank)
    num_replicas = check_count("num_replicas", num_replicas, least=1, hint="one process is 1")
    if rank is None:
        rank = _find_rank(num_replicas, grouped=grouped)
    rank = check_count("rank", rank, least=0, hint="count replicas from 0")
    if rank >= num_replicas:
        raise ValueError(f"rank must be below num_replicas={num_replicas}, got {rank}: count replicas from 0")
    return num_replicas, rank


def require_group() -> None:
    """Refuse a process that a launcher started together with others, if there is no process group.

    Raises:
        RuntimeError: There are others.
    """
    _refuse_missing_group()
    task = find_slurm_task()
    if task is not None and task.tasks > 1:
        raise RuntimeError(
            f"SLURM started {task.tasks} tasks ({task.variable}), but torch.distributed is not initialised, and each "
            "would do all of it: call init_process_group first, or start one task"
        )


def find_slurm_task() -> SlurmTask | None:
    """What srun says of this process. None if it was not started by srun, or torchrun's variables count.

    Raises:
        RuntimeError: Its variables are no numbers, or contradict each other.
    """
    if os.environ.get(_WORLD) or _TASK not in os.environ:
        return None
    # A batch script is a single process, whatever number of tasks its job may start.
    if "SLURM_JOB_ID" in os.environ and not {"SLURM_STEP_ID", "SLURM_STEPID", _STEP_TASKS} & os.environ.keys():
        return None
    # An interactive shell has the allocation's SLURM_NTASKS, and is a step of one task.
    variable = _STEP_TASKS if _STEP_TASKS in os.environ else _TASKS
    tasks, number = os.environ.get(variable, "1"), os.environ[_TASK]
    if not (tasks.isdecimal() and number.isdecimal() and int(number) < int(tasks)):
        raise RuntimeError(
            f"SLURM says that this is task {_TASK}={number} of {variable}={tasks}, which cannot be: give num_replicas "
            "and rank, or unset these variables"
        )
    return SlurmTask(int(tasks), int(number), variable)


def _group_size() -> int:
    """The number of processes in the group.

    Raises:
        RuntimeError: It is one of one process, and SLURM started several.
    """
    size = dist.get_world_size()
    task = find_slurm_task() if size == 1 else None
    if task is not None and task.tasks > 1:
        raise RuntimeError(
            f"the process group has one process, but SLURM started {task.tasks} tasks ({task.variable}), and each "
            f"would train on all samples: call init_process_group with world_size={task.tasks} and "
            f"rank=int(os.environ['{_TASK}']); or give num_replicas=1 if the tasks are independent runs"
        )
    return size


def _count_tasks() -> int:
    """The number of tasks that SLURM has started. 1 without SLURM."""
    task = find_slurm_task()
    if task is None or task.tasks == 1:
        return 1
    if os.getpid() not in _LOGGED:
        _LOGGED.add(os.getpid())
        _logger.warning(
            "this is replica %d of %d, as %s and %s say, and takes its share of the samples: give num_replicas=1 if "
            "the tasks are independent runs",
            *(task.number, task.tasks, _TASK, task.variable),
        )
    return task.tasks


def _find_rank(num_replicas: int, *, grouped: bool) -> int:
    """The rank of this process, if there are that many replicas.

    Raises:
        ValueError: Nothing says it.
    """
    if num_replicas == 1:
        return 0
    if grouped:
        return dist.get_rank()
    task = find_slurm_task()
    if task is None:
        raise ValueError(f"rank must be given with num_replicas={num_replicas}: no process group is initialised")
    if task.tasks != num_replicas:
        raise ValueError(
            f"rank must be given with num_replicas={num_replicas}: no process group is initialised, and SLURM started "
            f"{task.tasks} tasks ({task.variable})"
        )
    return task.number


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


def _refuse_missing_group() -> None:
    """Refuse a sampler in a process that torchrun started, but that does not know the other processes.

    Raises:
        RuntimeError: There are others, or the variable is no number of processes.
    """
    said = os.environ.get(_WORLD) or "1"
    world = said.strip()
    # Of nine digits at most: Python refuses to read thousands.
    if not (world.isdecimal() and len(world) < 10 and int(world)):
        raise RuntimeError(f"{_WORLD}={said!r} is no number of processes: unset it, or give num_replicas and rank")
    if int(world) > 1:
        raise RuntimeError(
            f"a launcher started {world} processes ({_WORLD}), but torch.distributed is not initialised, and every "
            "process would train on all samples: call init_process_group first, or give num_replicas and rank"
        )
