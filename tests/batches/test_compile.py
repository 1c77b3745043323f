"""torch.compile and torch.export: what breaks a graph, how often, and what is said where nothing can be exported."""

import itertools
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from shutil import which
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from collate import LengthError, LengthTrackedBatch, apply_rnn, last_step, masked_mean, sequence_loss

pytestmark = [
    # Torch's own: it hides the first where nobody makes errors of warnings.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]
NEEDS_COMPILER = pytest.mark.skipif(which("g++") is None, reason="needs a C++ compiler")
BACKENDS = ["eager", pytest.param("inductor", marks=NEEDS_COMPILER)]


class Tagger(nn.Module):
    """A recurrent tagger."""

    def __init__(self, kind: type[Any]) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(3, 3), kind(3, 4), nn.Linear(4, 2)

    def forward(self, batch: LengthTrackedBatch) -> torch.Tensor:
        hidden, _ = apply_rnn(self.rnn, batch.map(self.embed))
        logits = hidden.map(self.head)
        return sequence_loss(lambda x, y: (x - y).square().sum(-1), logits, logits.with_padded(logits.padded * 0 + 1))


class Packer(nn.Module):
    """Everything that depends on host lengths but a recurrent module."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 3)

    def forward(self, batch: LengthTrackedBatch) -> torch.Tensor:
        hidden = batch.map(self.embed)
        packed = hidden.pack()
        again = hidden.unpack(PackedSequence(packed.data * 2, *packed[1:])).map(self.embed)
        return again.flat().square().sum() + masked_mean(again).sum() + hidden.num_tokens


class Places(nn.Module):
    """The views for attention."""

    def forward(self, batch: LengthTrackedBatch) -> torch.Tensor:
        return batch.position_ids.sum() + batch.cu_seqlens.sum() + batch.flat().sum()


MODELS = {"LSTM": lambda: Tagger(nn.LSTM), "GRU": lambda: Tagger(nn.GRU), "packs": Packer, "places": Places}


def batches(count: int, seed: int = 0) -> Iterator[Any]:
    """Batches of many shapes, with empty rows."""
    rng = torch.Generator().manual_seed(seed)
    for number in range(count):
        counts = torch.randint(0, 9, (2 + number % 5,), generator=rng).tolist()
        yield LengthTrackedBatch.from_sequences([torch.randn(n, 3, generator=rng) for n in [*counts, 2 + number % 7]])


def counting(backend: str) -> tuple[Callable[..., Any], list[Any]]:
    """A backend, and the names of the code whose graphs it was given."""
    graphs = []

    def compiler(graph: Any, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    return compiler, graphs


@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_a_model_that_packs_is_compiled_once_for_batches_of_fifty_shapes(
    backend: str, dynamic: bool | None, model: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Red before: the third batch raised, with `dynamic=True` the first."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = model()
    compiler, graphs = counting(backend)
    compiled = torch.compile(model, backend=compiler, dynamic=dynamic)
    made = []
    for batch in batches(50):
        loss, expected = compiled(batch), model(batch)
        torch.testing.assert_close(loss, expected)
        weights = list(model.parameters())
        if weights:
            for ours, theirs in zip(*[torch.autograd.grad(x, weights) for x in (loss, expected)], strict=True):
                torch.testing.assert_close(ours, theirs)
        made.append(len(graphs))
    # Torch breaks a graph at any recurrent module, and then compiles what is called one by one: six parts at most, each
    # made for the first shape, for any, and where it meets a size of one.
    assert made[-1] <= 6 * (1 if dynamic else 3)
    # What is made for any shape is made within the first few batches.
    assert made[-1] == made[12]
    # A torch for CUDA says once that it has found none.
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage() for record in warned if record.name != "torch.utils.cpp_extension"] == []


@pytest.mark.parametrize("model", ["LSTM", "packs"])
def test_one_shape_is_compiled_once_whatever_the_lengths(model: str) -> None:
    torch.compiler.reset()
    model = MODELS[model]()
    compiler, graphs = counting("eager")
    compiled = torch.compile(model, backend=compiler, dynamic=False)
    made = []
    for counts in itertools.product((0, 3, 7), repeat=2):
        batch = LengthTrackedBatch(torch.randn(3, 7, 3), [*counts, 5])
        torch.testing.assert_close(compiled(batch), model(batch))
        made.append(len(graphs))
    assert made[-1] == made[0]


def test_fullgraph_says_what_cannot_be_in_a_graph_and_what_to_do() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda batch: batch.flat().sum(), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match="cannot be in a graph.*Compile without fullgraph=True"):
        compiled(next(batches(1)))


def test_bounds_of_rows_are_in_the_graph() -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda batch: batch.cu_seqlens, backend="eager", fullgraph=True)
    for batch in batches(5):
        assert torch.equal(compiled(batch), batch.cu_seqlens)
        assert compiled(batch).dtype == torch.int32


def test_lengths_made_in_a_compiled_model_are_checked_at_their_use() -> None:
    torch.compiler.reset()
    compiled = torch.compile(
        lambda batch, lengths: LengthTrackedBatch(batch.padded * 2, lengths), backend="eager", fullgraph=True
    )
    batch = LengthTrackedBatch(torch.randn(2, 3, 1), [3, 1])
    made = compiled(batch, torch.tensor([2, 3]))
    assert torch.equal(made.flat(), torch.cat([made.padded[0, :2], made.padded[1]]))
    with pytest.raises(LengthError, match="length of row 1 is 4, it must be from 0 to the padded width 3"):
        compiled(batch, torch.tensor([2, 4])).pack()


def test_importing_and_running_loads_no_compiler() -> None:
    """To mark functions with `torch.compiler.disable` would, and take as long as importing torch."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "from collate import LengthTrackedBatch, apply_rnn\n"
        "batch = LengthTrackedBatch.from_sequences([torch.zeros(2, 3)])\n"
        "apply_rnn(torch.nn.GRU(3, 4), batch)[0].flat()\n"
        "print([name for name in set(sys.modules) - before if name.startswith('torch._dynamo')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_export_says_what_to_export_instead(strict: bool, model: Callable[..., Any]) -> None:
    """Red before: errors of torch's about `.numpy()` and data-dependent expressions."""
    model = model()
    batch = next(batches(1))
    with pytest.raises(Exception, match=r"(?s)cannot be in a graph.*docs/export\.md"):
        torch.export.export(model, (batch,), strict=strict)


class Padded(nn.Module):
    """What the error of `apply_rnn` says to export instead."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 4, num_layers=2, batch_first=True)

    def forward(self, batch: LengthTrackedBatch) -> tuple[LengthTrackedBatch, torch.Tensor]:
        hidden = batch.with_padded(self.rnn(batch.padded)[0])
        return hidden, last_step(hidden)


@pytest.mark.filterwarnings("ignore:The tensor attributes self.rnn._flat_weights")
def test_what_is_said_to_be_exported_instead_gives_the_same_at_real_steps() -> None:
    model = Padded()
    batch = next(batches(1))
    exported = torch.export.export(model, (batch,)).module()
    hidden, last = exported(batch)
    expected, state = apply_rnn(model.rnn, batch)
    for ours, theirs in zip(hidden.sequences(), expected.sequences(), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(last, state[-1])
