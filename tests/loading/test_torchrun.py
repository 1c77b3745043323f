"""The batch sampler in real processes: who takes what, what a killed run loses, and the gradient they share."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import (
    CAPACITY,
    LENGTHS,
    MAX_TOKENS,
    PATIENCE,
    Record,
    Tagger,
    kill,
    make_loader,
    make_sampler,
    read,
    run,
    start,
    total_loss,
)

ALL = list(range(len(LENGTHS)))


def finish(processes: int, job: str, folder: Path, *options: object) -> list[list[Record]]:
    """Run a job that must end well, and read what its ranks recorded."""
    folder.mkdir(exist_ok=True)
    status, out = run(processes, "ranks.py", job, folder, *options)
    assert status == 0, out
    return read(folder)


def ids_of(records: Any) -> list[int]:
    return [sample for record in records for sample in record["ids"]]


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids="{}-processes".format)
def epochs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[list[list[Record]]]:
    """Three epochs of `[processes]` lists of records, each as long as its rank says an epoch is."""
    folder = tmp_path_factory.mktemp("epochs")
    ranks = finish(request.param, "take_epochs", folder)
    assert len(ranks) == request.param
    for rank, records in enumerate(ranks):
        assert len(records) == 3 * int((folder / f"{rank}.steps").read_text())
    return [[[line for line in records if line["epoch"] == epoch] for records in ranks] for epoch in range(3)]


def test_processes_take_every_sample_once_an_epoch(epochs: list[list[list[Record]]]) -> None:
    for ranks in epochs:
        assert sorted(sample for records in ranks for sample in ids_of(records)) == ALL


def test_every_process_takes_the_same_number_of_steps_in_each_epoch(epochs: list[list[list[Record]]]) -> None:
    steps = {tuple(line["step"] for line in records) for ranks in epochs for records in ranks}
    assert steps == {tuple(range(1, len(epochs[0][0]) + 1))}


def test_each_epoch_has_another_plan_and_it_is_the_one_that_was_announced(epochs: list[list[list[Record]]]) -> None:
    processes = len(epochs[0])
    plans = [make_sampler(num_replicas=processes, rank=0).plan(epoch).batches for epoch in range(3)]
    taken = [[step["ids"] for steps in zip(*ranks, strict=True) for step in steps] for ranks in epochs]
    assert taken == [list(plan) for plan in plans]
    assert len({str(plan) for plan in taken}) == 3


def test_batches_keep_the_budget_and_the_lengths_of_their_samples(epochs: list[list[list[Record]]]) -> None:
    for line in (line for ranks in epochs for records in ranks for line in records):
        assert line["lengths"] == [LENGTHS[sample] for sample in line["ids"]]
        assert line["padded"] == len(line["ids"]) * max(line["lengths"])
        assert line["padded"] <= MAX_TOKENS or len(line["ids"]) == 1


def test_in_a_step_no_process_has_much_more_to_do_than_another(epochs: list[list[list[Record]]]) -> None:
    for ranks in epochs:
        # The last step is a partial one, whose rows are shared out.
        for step in list(zip(*ranks, strict=True))[:-1]:
            padded, widths = [line["padded"] for line in step], [max(line["lengths"]) for line in step]
            assert max(padded) <= 1.25 * min(padded)
            assert max(widths) - min(widths) <= max(LENGTHS) / 6


def test_a_sampler_built_before_the_process_group_ends_the_run(tmp_path: Path) -> None:
    status, out = run(2, "ranks.py", "build_too_early", tmp_path)
    assert status == 1
    assert "RuntimeError: a launcher started 2 processes (WORLD_SIZE)" in out
    assert "call init_process_group first" in out


def steps_saved(folder: Path) -> int:
    file = folder / "saved.json"
    return json.loads(file.read_text())["steps"] if file.exists() else 0


def run_and_kill(processes: int, folder: Path, *before: Path, job: str = "train_until_killed") -> None:
    """Kill a run in mid-epoch, in the middle of the step that follows the third it saved."""
    folder.mkdir()
    process = start(processes, "ranks.py", job, folder, 0.3, *before)
    try:
        for _ in range(PATIENCE * 100):
            if process.poll() is not None or steps_saved(folder) >= 3:
                break
            time.sleep(0.01)
        # By now the next step's samples are taken, and its position is not saved.
        time.sleep(0.15)
        assert process.poll() is None, process.communicate()[0]
    finally:
        kill(process, folder)
    assert process.returncode == -9


def committed(folder: Path) -> list[int]:
    """Samples of the steps that were saved, over all ranks; what was taken after them does not count."""
    steps = steps_saved(folder)
    assert steps >= 3
    return [sample for records in read(folder) for sample in ids_of(records[:steps])]


def test_four_processes_then_three_then_one_lose_and_repeat_nothing(tmp_path: Path) -> None:
    four, three, one = (tmp_path / name for name in ("four", "three", "one"))
    run_and_kill(4, four)
    run_and_kill(3, three, four)
    [rest] = finish(1, "train_until_killed", one, 0, three)
    assert steps_saved(one) == len(rest)
    assert sorted(committed(four) + committed(three) + committed(one)) == ALL


def test_packs_of_4_killed_processes_then_3_then_8_hold_each_sample_once(tmp_path: Path) -> None:
    four, three, eight = (tmp_path / name for name in ("four", "three", "eight"))
    run_and_kill(4, four, job="pack_until_killed")
    run_and_kill(3, three, four, job="pack_until_killed")
    rest = finish(8, "pack_until_killed", eight, 0, three)
    assert {len(records) for records in rest} == {steps_saved(eight)}
    assert sorted(committed(four) + committed(three) + committed(eight)) == ALL
    for line in (line for records in rest for line in records):
        # Two rows at most, each within the capacity: the batch's shape has no other way to come about.
        assert line["padded"] in {CAPACITY, 2 * CAPACITY}
        assert sum(line["lengths"]) <= line["padded"]


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[list[torch.Tensor]]]]:
    """Of two ranks: the gradients of each step of an epoch, by the source of their scale."""
    folder = tmp_path_factory.mktemp("gradients")
    finish(2, "save_gradients", folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("scale", ["collective", "plan"])
def test_two_processes_have_the_gradient_of_one_with_the_whole_step(
    gradients: list[dict[str, list[list[torch.Tensor]]]], scale: str
) -> None:
    plan = make_sampler(num_replicas=2, rank=0).plan(0)
    steps = [plan.batches[2 * step] + plan.batches[2 * step + 1] for step in range(plan.steps)]
    model = Tagger()
    for step, batch in enumerate(make_loader(steps)):
        model.zero_grad()
        total_loss(model, batch, reduction="token").backward()
        expected = [weight.grad for weight in model.parameters()]
        for rank in gradients:
            torch.testing.assert_close(rank[scale][step], expected, rtol=1e-10, atol=1e-12)
    assert [len(rank[scale]) for rank in gradients] == [plan.steps] * 2
