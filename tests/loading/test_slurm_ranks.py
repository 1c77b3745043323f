"""Ranks from SLURM's variables: real processes that have them share an epoch, and what contradicts them is an error."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from collate import PadCollator
from samplers import LengthBucketBatchSampler, PackingBatchSampler, ShardStream, ShardWriter, run_in_order
from samplers.progress import replica
from samplers.progress.replica import find_replica

COUNT = 90
TASKS = 3
# What a process that srun has started has, and one in a batch script or a shell.
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "3", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2"}
SCRIPT = """
import json, sys
from collate import PadCollator
from samplers import LengthBucketBatchSampler, PackingBatchSampler, ShardStream
lengths = [1 + number % 17 for number in range(90)]
bucketed = LengthBucketBatchSampler(lengths, max_tokens=40)
packed = PackingBatchSampler(lengths, capacity=20)
stream = ShardStream(sys.argv[1], collate_fn=lambda samples: [s["__key__"] for s in samples], batch_size=4)
rows = {"bucketed": list(bucketed), "packed": list(packed), "stream": list(stream)}
print(json.dumps({"ranks": [[each.num_replicas, each.rank] for each in (bucketed, packed, stream)], "rows": rows}))
"""


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets the launcher's variables; it begins without any."""
    for name in list(os.environ):
        if name.startswith("SLURM_") or name in {"RANK", "WORLD_SIZE", "LOCAL_RANK"}:
            monkeypatch.delenv(name)
    monkeypatch.setattr(replica, "_LOGGED", set())

    def set_all(variables: dict[str, str]) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


def write_corpus(folder: Path) -> str:
    with ShardWriter(folder, max_samples=10) as writer:
        for number in range(COUNT):
            writer.write({"__key__": str(number), "tokens": np.arange(1 + number % 17)})
    return str(folder)


def test_processes_of_srun_share_an_epoch(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    kept = {name: value for name, value in os.environ.items() if name not in {"RANK", "WORLD_SIZE"}}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT, corpus],
            env={**kept, **STEP, "SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for task in range(TASKS)
    ]
    told = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0] * TASKS, told
    found = [json.loads(out) for out, _ in told]
    # Red when SLURM was not looked at: each process took all samples.
    assert [each["ranks"] for each in found] == [[[TASKS, task]] * 3 for task in range(TASKS)]
    for kind in ("bucketed", "packed", "stream"):
        rows = [each["rows"][kind] for each in found]
        assert sorted(int(sample) for batches in rows for batch in batches for sample in batch) == list(range(COUNT))
        assert len({len(batches) for batches in rows}) == 1
    # Not in silence.
    assert all(f"replica {task} of 3, as SLURM_PROCID" in err for task, (_, err) in enumerate(told))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (1, 0)),
        (STEP, (3, 2)),
        # Of torchrun in a step: they win, also with fewer processes.
        ({**STEP, "WORLD_SIZE": "1", "RANK": "0"}, (1, 0)),
        # A batch script, and a shell of salloc, are one process, whatever the job may start.
        (JOB, (1, 0)),
        ({name: value for name, value in JOB.items() if name != "SLURM_PROCID"}, (1, 0)),
        # An interactive step has the variables of its allocation, but one task.
        ({**JOB, "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"}, (1, 0)),
        # A step of fewer tasks than the job has.
        ({**STEP, "SLURM_NTASKS": "8"}, (3, 2)),
        # A variable without a value says nothing. Red when it hid the step: each task took all samples.
        ({**STEP, "WORLD_SIZE": ""}, (3, 2)),
        # What programs set that imitate SLURM.
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, (2, 1)),
    ],
)
def test_who_takes_part_by_the_variables(slurm: Any, variables: dict[str, str], expected: tuple[int, int]) -> None:
    slurm(variables)
    assert find_replica(None, None) == expected
    # What the user gives counts first.
    assert find_replica(5, 4) == (5, 4)
    assert find_replica(1, None) == (1, 0)


def test_the_log_says_once_that_ranks_come_from_slurm(slurm: Any, caplog: pytest.LogCaptureFixture) -> None:
    slurm(STEP)
    with caplog.at_level(logging.WARNING, "samplers"):
        samplers = [LengthBucketBatchSampler([3] * 9, batch_size=1), PackingBatchSampler([3] * 9, capacity=4)]
    assert [sampler.rank for sampler in samplers] == [2, 2]
    assert len(caplog.records) == 1
    assert "num_replicas=1 if the tasks are independent" in caplog.text


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({**STEP, "SLURM_PROCID": "3"}, "SLURM_PROCID=3 of SLURM_STEP_NUM_TASKS=3"),
        ({"SLURM_NTASKS": "many", "SLURM_PROCID": "1"}, "SLURM_PROCID=1 of SLURM_NTASKS=many"),
        ({**STEP, "WORLD_SIZE": "3", "RANK": "1"}, "3 processes .WORLD_SIZE., but torch.distributed"),
        # Red when these were taken for 1: each process took all samples.
        ({**STEP, "WORLD_SIZE": " 3"}, "3 processes .WORLD_SIZE., but torch.distributed"),
        ({**STEP, "WORLD_SIZE": "$SLURM_NTASKS"}, r"WORLD_SIZE='\$SLURM_NTASKS'.* no number of processes"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE='0'.* no number of processes"),
    ],
)
def test_variables_that_contradict_are_named(slurm: Any, variables: dict[str, str], message: str) -> None:
    slurm(variables)
    with pytest.raises(RuntimeError, match=message):
        LengthBucketBatchSampler([3] * 9, batch_size=1)


def test_what_the_user_gives_must_fit_the_tasks_or_be_whole(slurm: Any, tmp_path: Path) -> None:
    slurm(STEP)
    assert find_replica(3, None) == (3, 2)
    with pytest.raises(ValueError, match=r"num_replicas=2: no process group .* SLURM started 3 tasks .SLURM_STEP_NUM"):
        find_replica(2, None)
    with pytest.raises(RuntimeError, match="SLURM started 3 tasks .*call init_process_group first"):
        run_in_order(len, [[1]], lengths=[1], collate_fn=PadCollator(), batch_size=1)
    corpus = write_corpus(tmp_path / "corpus")
    assert ShardStream(corpus, collate_fn=len, batch_size=4, num_replicas=1).rank == 0


def test_a_group_counts_before_slurm_unless_it_is_of_one(slurm: Any, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        assert find_replica(None, None) == (1, 0)
        slurm(STEP)
        with pytest.raises(RuntimeError, match="group has one process, but SLURM started 3 tasks .*world_size=3"):
            find_replica(None, None)
        assert find_replica(1, None) == (1, 0)
        slurm({"WORLD_SIZE": "1"})
        assert find_replica(None, None) == (1, 0)
    finally:
        dist.destroy_process_group()
