"""torch's default device, which is for what a program makes: batches stay where their samples are, lengths on the host.

The default is meta here, where nothing has values: what is wrongly made there cannot be used by accident.
"""

from collections.abc import Callable
from typing import Any

import numpy.typing as npt
import pytest
import torch
from torch import nn

from collate import (
    LengthTrackedBatch,
    PadCollator,
    apply_rnn,
    check_step,
    last_step,
    masked_mean,
    sequence_loss,
    token_scale,
)

# Counts of steps that are scattered, joined, written row by row; and none at all.
LENGTHS = {"short": (3, 1, 0, 5), "long": (900, 1300, 0, 40), "huge": (70_000, 30_000), "empty": (0, 0)}
KINDS = {
    "tensors": lambda rows: rows,
    "arrays": lambda rows: [row.numpy() for row in rows],
    "lists": lambda rows: [row.tolist() for row in rows],
}


def squares(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square()


def all_of_it(rows: list[list[float] | npt.NDArray[Any] | torch.Tensor]) -> list[torch.Tensor]:
    """Everything that a batch goes through: what comes of it, as plain tensors and numbers."""
    batch = LengthTrackedBatch.from_sequences(rows, padding_value=2, widths=4)
    again = LengthTrackedBatch(batch.padded, batch.lengths.tolist())
    pieces = [
        LengthTrackedBatch.concat(batch.split(1)),
        *batch.split_steps(1 + batch.padded.shape[1] // 3)[:2],
        batch.to(torch.float64),
    ]
    results = [part for made in (batch, again, *pieces) for part in (made.padded, made.mask, made.permutation)]
    target = batch.map(torch.cos)
    if batch.num_tokens:
        unpacked = batch.unpack(batch.pack())
        results += [unpacked.padded, batch.nested().values()]
        target = unpacked.map(torch.cos)
    for reduction in ("token", "sequence", "sum"):
        results.append(sequence_loss(squares, batch, target, weights=batch.mask.float(), reduction=reduction))
    results += [batch.unsort().padded, batch.unsort(batch.lengths), batch.flat(), masked_mean(batch), last_step(batch)]
    results += [batch.cu_seqlens, batch.position_ids, batch.key_padding_mask, token_scale(batch.num_tokens)]
    return results


@pytest.fixture(params=["with", "set"])
def on_meta(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """What makes meta the default device, by either of torch's ways."""

    def run(call: Callable[..., Any]) -> Any:
        if request.param == "with":
            with torch.device("meta"):
                return call()
        torch.set_default_device("meta")
        try:
            return call()
        finally:
            torch.set_default_device(None)

    return run


def agree(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right, strict=True):
        assert one.device == other.device == torch.device("cpu")
        assert torch.equal(one, other)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", LENGTHS)
def test_a_batch_goes_its_whole_way_whatever_the_default_device(
    on_meta: Callable[..., Any], size: str, kind: str
) -> None:
    """Red before: from_sequences, the constructor and all that send integers raised or gave what has no values."""
    rows = KINDS[kind]([torch.rand(n, generator=torch.Generator().manual_seed(n)) for n in LENGTHS[size]])
    if size == "empty" and kind == "lists":
        rows = [[], [0.5]]
    agree(on_meta(lambda: all_of_it(rows)), all_of_it(rows))


def test_a_collator_makes_its_fields_on_the_host(on_meta: Callable[..., Any]) -> None:
    """Red before."""
    samples = [
        {"x": torch.rand(n, 2), "y": [1] * n, "label": n, "weight": 0.5, "shape": torch.ones(2), "id": str(n)}
        for n in (2, 5, 3)
    ]
    collate = PadCollator({"x": 0, "y": -100}, stack=["shape"], shapes=[(4, 8)])
    with_default, without = on_meta(lambda: collate(samples)), collate(samples)
    for name in ("x", "y"):
        agree([with_default[name].padded], [without[name].padded])
    agree(*[[batch[name] for name in ("label", "weight", "shape")] for batch in (with_default, without)])
    assert with_default["id"] == without["id"]


@pytest.mark.parametrize("counts", [(3, 1, 0, 5), (0, 0)])
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_modules_run_whatever_the_default_device(
    on_meta: Callable[..., Any], kind: type[Any], counts: tuple[int, ...]
) -> None:
    """Red before."""
    torch.manual_seed(0)
    rnn, rows = kind(2, 3, bidirectional=True), [torch.rand(n, 2) for n in counts]

    def run() -> list[torch.Tensor]:
        output, state = apply_rnn(rnn, LengthTrackedBatch.from_sequences(rows))
        return [output.padded, output.lengths, *(state if isinstance(state, tuple) else (state,))]

    agree(on_meta(run), run())


def test_a_step_is_checked_whatever_the_default_device(on_meta: Callable[..., Any]) -> None:
    """Red before."""
    torch.manual_seed(0)
    rnn, head = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 1)
    samples = [{"x": torch.randn(n, 2), "y": torch.randint(3, (n,))} for n in (4, 2, 3)]

    def right(batch: dict[str, LengthTrackedBatch]) -> torch.Tensor:
        return apply_rnn(rnn, batch["x"])[0].map(head).flat().square().sum() + batch["y"].flat().float().exp().sum()

    collate = PadCollator({"x": 0, "y": -100})
    for given in ({"batch": collate(samples)}, {"samples": samples, "collate": collate}):
        reports = on_meta(lambda given=given: check_step(right, **given)), check_step(right, **given)
        assert reports[0].ok, reports[0]
        assert str(reports[0]) == str(reports[1])
