"""The batch sampler under accelerate and Lightning, two processes each: which ways keep what it promises."""

from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import pytest
import torch
from ranks import LENGTHS, Tagger, make_loader, make_sampler, read, run, total_loss
from torch.optim import SGD

# Looked for and not imported: the trainers run in processes of their own.
pytestmark = pytest.mark.skipif(
    find_spec("accelerate") is None or find_spec("lightning") is None, reason="needs accelerate and lightning"
)
ALL = list(range(len(LENGTHS)))
PLANS = [list(make_sampler(num_replicas=2, rank=0).plan(epoch).batches) for epoch in range(3)]


@pytest.fixture(scope="module")
def trained() -> list[torch.Tensor]:
    """Weights after two epochs in one process, on each step's rows as one batch."""
    model = Tagger()
    optimizer = SGD(model.parameters(), lr=0.1)
    steps = [first + second for plan in PLANS[:2] for first, second in zip(plan[::2], plan[1::2], strict=True)]
    for batch in make_loader(steps):
        total_loss(model, batch, reduction="token").backward()
        optimizer.step()
        optimizer.zero_grad()
    return list(model.parameters())


@pytest.fixture(scope="module")
def accumulated() -> list[torch.Tensor]:
    """The same with the rows of three steps in each batch, fewer in the last of an epoch."""
    model = Tagger()
    optimizer = SGD(model.parameters(), lr=0.1)
    updates = [
        list(chain.from_iterable(plan[first : first + 6])) for plan in PLANS[:2] for first in range(0, len(plan), 6)
    ]
    for batch in make_loader(updates):
        total_loss(model, batch, reduction="token").backward()
        optimizer.step()
        optimizer.zero_grad()
    return list(model.parameters())


@pytest.fixture(scope="module")
def accelerated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one run of all ways into accelerate."""
    folder = tmp_path_factory.mktemp("accelerate")
    status, out = run(2, "trainers.py", "train_with_accelerate", folder)
    assert status == 0, out
    return folder


@pytest.fixture(scope="module")
def lightning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of Lightning, and of runs that continue from its checkpoints."""
    folder = tmp_path_factory.mktemp("lightning")
    status, out = run(2, "trainers.py", "train_with_lightning", folder)
    assert status == 0, out
    return folder


def batches_of(folder: Path, epoch: int) -> list[list[int]]:
    """An epoch's batches in the order of a plan; every rank must have as many."""
    first, second = ([line["ids"] for line in records if line["epoch"] == epoch] for records in read(folder))
    return [batch for step in zip(first, second, strict=True) for batch in step]


def check_training(folder: Path, weights: list[torch.Tensor]) -> None:
    """Two epochs as planned, and the weights of one process."""
    for epoch in range(2):
        assert sorted(sample for batch in batches_of(folder, epoch) for sample in batch) == ALL
        assert batches_of(folder, epoch) == PLANS[epoch]
    assert PLANS[0] != PLANS[1]
    check_weights(folder, weights)


def check_weights(folder: Path, weights: list[torch.Tensor]) -> None:
    for rank in range(2):
        torch.testing.assert_close(torch.load(folder / f"{rank}.pt"), weights, rtol=1e-9, atol=1e-9)


WAYS = pytest.mark.parametrize("way", ["prepared", "unseen"])


def test_accelerate_accumulates_to_the_gradient_of_one_batch(
    accelerated: Path, accumulated: list[torch.Tensor], trained: list[torch.Tensor]
) -> None:
    check_training(accelerated / "accumulated", accumulated)
    assert not all(torch.equal(one, other) for one, other in zip(accumulated, trained, strict=True))


def test_lightning_accumulates_to_the_gradient_of_one_batch(lightning: Path, accumulated: list[torch.Tensor]) -> None:
    check_training(lightning / "accumulated", accumulated)


@WAYS
def test_accelerate_trains_as_one_process_on_a_loader_dealt_once(
    way: str, accelerated: Path, trained: list[torch.Tensor]
) -> None:
    check_training(accelerated / way, trained)


@WAYS
def test_accelerate_goes_on_from_a_position(way: str, accelerated: Path) -> None:
    assert batches_of(accelerated / f"{way}-resumed", 1) == PLANS[1]
    assert batches_of(accelerated / f"{way}-resumed", 2) == PLANS[2]


def test_a_sampler_that_accelerate_might_deal_out_twice_asks_which_it_is(accelerated: Path) -> None:
    for rank in range(2):
        text = (accelerated / f"{rank}.txt").read_text()
        assert "accelerate runs 2 processes" in text
        assert 'give rank="all" to a batch sampler whose loader goes through prepare' in text


def test_lightning_trains_as_one_process_when_it_leaves_the_sampler_alone(
    lightning: Path, trained: list[torch.Tensor]
) -> None:
    check_training(lightning / "whole", trained)


@pytest.mark.parametrize("used", [0, 5], ids=["edge", "middle"])
def test_lightning_resumes_from_a_checkpoint_with_the_remaining_batches(
    used: int, lightning: Path, trained: list[torch.Tensor]
) -> None:
    checkpoint = f"step={len(PLANS[0]) // 2 + used}"
    assert batches_of(lightning / checkpoint, 0) == []
    assert batches_of(lightning / checkpoint, 1) == PLANS[1][2 * used :]
    check_weights(lightning / checkpoint, trained)


def test_lightning_refuses_to_shard_the_sampler(tmp_path: Path) -> None:
    status, out = run(2, "trainers.py", "train_with_lightning", tmp_path, "Lightning's")
    assert status == 1
    assert "set `Trainer(use_distributed_sampler=False)`" in out
