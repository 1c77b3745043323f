"""Does a training step respect the lengths? A checker for users' own code.

The step is run again and again on batches that must make no difference (other values in the padding, more padding, rows
in another order, one row at a time) and on batches that must make one (another value at a row's last real step). A
mistake with padding moves the loss by a per cent and gradients by half, and nothing raises: only a comparison finds it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from collate.agreement import aligned
from collate.batch import LengthTrackedBatch
from collate.errors import LengthError
from collate.structure import map_parts
from collate.tracing import WithoutDropout, leaves_of

Step: TypeAlias = Callable[[Any], Tensor]

# Rows whose last step is tried, and how often: enough for a dead ReLU or a maximum elsewhere to be ruled out.
ROWS, TRIES = 8, 4
# The share of the loss that another value at a real step must move, at least: rounding of a single sum.
ROUNDING = 1e-9

_LIKELY = {
    "padding": (
        "a loss or mean that is not masked, or masked after it was reduced",
        "a length that is too large (padding run through the network as if it were real)",
        "a backward direction, a convolution, attention or a normalisation that reads padding",
        "a final state taken at the padded end instead of each row's last step",
        "a mask of the wrong polarity, or added where it should select",
    ),
    "width": (
        "a mean over the padded width, or over all B x T steps",
        "a final state or last step taken at the padded end",
        "an output trimmed to the longest row beside a mask or target that is not",
    ),
    "order": (
        "rows sorted for packing and never put back, or put back by the wrong permutation",
        "targets that do not follow the order of the packed steps",
        "a recurrent module without batch_first, so that state flows from row to row",
        "a mean of means over groups of rows",
    ),
    "company": (
        "a recurrent module without batch_first, so that state flows from row to row",
        "a normalisation over the batch",
        "a mean of means over groups of rows, or a denominator that is not the number of real steps or rows",
        "an ignore_index that is a real class",
    ),
    "dead step": (
        "a length that is too small (the last steps are never read)",
        "a row or a step that was dropped or trimmed away",
        "a mask of the wrong polarity, or guessed from values that can be real",
    ),
}


@dataclass(frozen=True)
class Finding:
    """One way in which a step does not respect the lengths.

    Attributes:
        probe: what was changed: `"padding"`, `"width"`, `"order"`, `"company"` or `"dead step"`.
        what: what happened, with field, row and step where they are known.
        drift: relative change of the loss, or of the gradients if that is greater; 0 for a dead step.
        likely: mistakes that look like this.
    """

    probe: str
    what: str
    drift: float
    likely: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join([f"{self.probe}: {self.what}", *(f"    perhaps {mistake}" for mistake in self.likely)])


@dataclass(frozen=True)
class StepReport:
    """What `check_step` found.

    Attributes:
        loss: of the batch as it was given.
        findings: laws that are broken; none for a step that respects the lengths.
        skipped: probes that could not be made, and why.
    """

    loss: float
    findings: tuple[Finding, ...]
    skipped: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def raise_if_broken(self) -> None:
        """Fail where something was found, as in a test.

        Raises:
            LengthError: With the whole report as its text.
        """
        if self.findings:
            raise LengthError(str(self))

    def __str__(self) -> str:
        head = "the step respects the lengths" if self.ok else f"the step breaks {len(self.findings)} law(s) of lengths"
        skipped = [f"not tried: {reason}" for reason in self.skipped]
        return "\n".join([f"{head} (loss {self.loss:.6g})", *map(str, self.findings), *skipped])


def check_step(
    step: Step, batch: Any, *, module: nn.Module | None = None, seed: int = 0, tolerance: float = 1e-4
) -> StepReport:
    """Run a training step on batches that must make no difference, and on some that must.

    Random state is held during the check and given back after it, and all dropout of torch's is switched off meanwhile.
    A step that draws random numbers nevertheless is tried only on what leaves them in place. Gradients of all leaves
    that the loss depends on are compared.

    Args:
        step: takes a batch and returns a scalar loss; it must not call `backward` nor move an optimizer.
        batch: a `LengthTrackedBatch`, or a mapping, tuple or list with at least one in it; tensors and lists with an
            entry per row go with the rows. It should hold rows of different lengths, none of them empty.
        module: what the step trains: its buffers, such as running means, are given back after the check.
        seed: of the values tried, and of the step's own random numbers.
        tolerance: relative change of loss or gradients that counts as a difference.

    Returns:
        The report.

    Raises:
        LengthError: The batch holds no `LengthTrackedBatch`, or none with padding to try.
    """
    with _undisturbed(module), WithoutDropout():
        return _Check(step, batch, seed, tolerance).report()


class _Check:
    """One check: the step, the batch, and what the step gives for the batch as it is."""

    def __init__(self, step: Step, batch: Any, seed: int, tolerance: float) -> None:
        self.step, self.batch, self.seed, self.tolerance = step, batch, seed, tolerance
        self.fields = dict(_fields(batch))
        if not self.fields:
            raise LengthError("the batch holds no LengthTrackedBatch: collate it with PadCollator")
        self.rows = len(next(iter(self.fields.values())))
        if all(int(field.lengths.min()) == field.padded.shape[1] for field in self.fields.values()):
            raise LengthError("no field has padding: check with rows of different lengths")
        self.values = torch.Generator().manual_seed(seed)
        inputs = {id(field.padded) for field in self.fields.values()}
        self.leaves = [leaf for leaf in leaves_of(self.loss_of(batch)) if id(leaf) not in inputs]
        self.loss, self.gradients = self.run(batch)
        self.skipped: list[str] = []

    def report(self) -> StepReport:
        found = [self.padding(), self.dead_step()]
        if self.is_random():
            self.skipped.append(
                "width, order and company: the step draws random numbers, other ones for a batch of another shape"
            )
        else:
            found += [self.width(), self.order(), self.company()]
        return StepReport(self.loss, tuple(finding for finding in found if finding), tuple(self.skipped))

    def loss_of(self, batch: Any, seed: int | None = None) -> Tensor:
        torch.manual_seed(self.seed if seed is None else seed)
        return self.step(batch)

    def run(self, batch: Any) -> tuple[float, list[Tensor]]:
        """The step's loss and gradients for a batch."""
        loss = self.loss_of(batch)
        if not self.leaves or not loss.requires_grad:
            return float(loss.detach()), []
        gradients = torch.autograd.grad(loss, self.leaves, allow_unused=True, materialize_grads=True)
        return float(loss.detach()), [gradient.detach() for gradient in gradients]

    def is_random(self) -> bool:
        return float(self.loss_of(self.batch, self.seed + 1).detach()) != self.loss

    def padding(self) -> Finding | None:
        """Other values in the padding, one field at a time."""
        for name, field in self.fields.items():
            if bool(field.mask.all()) or _is_marked(field):
                continue
            other = torch.where(aligned(field.mask, field.padded), field.padded, self.draw(field))
            found = self.compare("padding", self.swapped(name, field.with_padded(other)), f"the padding of {name}")
            if found:
                return found
        return None

    def width(self) -> Finding | None:
        """A few more steps of padding on every field."""
        return self.compare("width", _mapped(self.batch, _widened), "a wider batch")

    def order(self) -> Finding | None:
        """The same rows in two other orders."""
        orders = [torch.arange(self.rows).flip(0), torch.randperm(self.rows, generator=self.values)]
        try:
            drift = max(self.drift(*self.run(self.chosen(order))) for order in orders)
        except (RuntimeError, ValueError, IndexError) as error:
            # Not a mistake by itself: packing may rely on rows that are longest first.
            self.skipped.append(f"order: on rows in another order the step raises {error}")
            return None
        return self.found("order", "another order of the rows", drift)

    def company(self) -> Finding | None:
        """One row at a time: their losses must make up the batch's, as a sum or as a mean over rows or steps."""
        alone: list[tuple[float, list[Tensor]]] = []
        full = [row for row in range(self.rows) if all(field.lengths[row] for field in self.fields.values())]
        for row in full:
            try:
                alone.append(self.run(_mapped(self.chosen(torch.tensor([row])), _trimmed)))
            except (RuntimeError, ValueError, IndexError) as error:
                return Finding("company", f"row {row} alone raises {error}", math.inf, _LIKELY["company"])
        weights = [[1.0] * len(full), [1 / len(full)] * len(full), [1 / self.rows] * len(full)]
        for field in self.fields.values():
            counts = field.lengths[full].tolist()
            weights.append([count / sum(counts) for count in counts])
        drift = min(self.drift(*_combined(alone, shares)) for shares in weights)
        if drift <= self.tolerance:
            return None
        what = f"rows one at a time make up another loss or gradient, as a sum or as any mean, off by {drift:.2%}"
        return Finding("company", what, drift, _LIKELY["company"])

    def dead_step(self) -> Finding | None:
        """Another value at a row's last real step must move the loss."""
        for name, field in self.fields.items():
            rows = [row for row in range(self.rows) if field.lengths[row]][:ROWS]
            dead = [row for row in rows if not self.matters(name, field, row, int(field.lengths[row]) - 1)]
            # A field that is not read at all is none of our business, and a model of the first step alone, such as one
            # that reads a class token, means what it does.
            if dead and not (
                dead == rows and (self.is_unread(name, field) or self.reads_first_only(name, field, rows))
            ):
                row = dead[0]
                what = f"step {int(field.lengths[row]) - 1} of row {row} of {name}, its last, never counts"
                return Finding(
                    "dead step", f"{what} ({len(dead)} of {len(rows)} rows tried)", 0.0, _LIKELY["dead step"]
                )
        return None

    def matters(self, name: str, field: LengthTrackedBatch, row: int, step: int) -> bool:
        where = torch.zeros_like(field.mask)
        where[row, step] = True
        return self.moves(name, field, where)

    def is_unread(self, name: str, field: LengthTrackedBatch) -> bool:
        return not self.moves(name, field, field.mask)

    def moves(self, name: str, field: LengthTrackedBatch, where: Tensor) -> bool:
        """Whether other values at these steps move the loss."""
        for _ in range(TRIES):
            padded = torch.where(aligned(where, field.padded), self.draw(field), field.padded)
            loss, _ = self.run(self.swapped(name, field.with_padded(padded)))
            if not abs(loss - self.loss) <= ROUNDING * abs(self.loss):
                return True
        return False

    def reads_first_only(self, name: str, field: LengthTrackedBatch, rows: Sequence[int]) -> bool:
        long = [row for row in rows if field.lengths[row] > 1]
        first = all(self.matters(name, field, row, 0) for row in long)
        return bool(long) and first and not any(self.matters(name, field, row, 1) for row in long)

    def compare(self, probe: str, batch: Any, changed: str) -> Finding | None:
        try:
            drift = self.drift(*self.run(batch))
        except (RuntimeError, ValueError, IndexError) as error:
            return Finding(probe, f"{changed} makes the step raise {error}", math.inf, _LIKELY[probe])
        return self.found(probe, changed, drift)

    def found(self, probe: str, changed: str, drift: float) -> Finding | None:
        if drift <= self.tolerance:
            return None
        return Finding(probe, f"{changed} moves the loss or its gradients by {drift:.2%}", drift, _LIKELY[probe])

    def drift(self, loss: float, gradients: list[Tensor]) -> float:
        """Relative distance from the batch as it was given; infinite where it is not a number."""
        apart = [abs(loss - self.loss) / max(abs(self.loss), 1e-12)]
        if gradients:
            distance = sum(
                float((a - b).double().square().sum()) for a, b in zip(gradients, self.gradients, strict=True)
            )
            size = sum(float(gradient.double().square().sum()) for gradient in self.gradients)
            apart.append(math.sqrt(distance) / max(math.sqrt(size), 1e-12))
        return max((part if part == part else math.inf) for part in apart)

    def draw(self, field: LengthTrackedBatch) -> Tensor:
        """Other values for a block, such as real steps could hold: for whole numbers those of other steps."""
        real, shape = field.flat().detach().cpu(), tuple(field.padded.shape)
        if not real.is_floating_point():
            known: Tensor = torch.unique(real)
            # Of two classes every second draw would be what is there already, and four in a row are no rarity.
            present = torch.searchsorted(known.long(), field.padded.detach().cpu().long())
            shift = torch.randint(1, max(len(known), 2), shape, generator=self.values)
            return known[(present + shift) % len(known)].to(field.device)
        spread = real.double().std(correction=0) + 1
        noise = torch.randn(shape, generator=self.values, dtype=torch.float64)
        values: Tensor = real.double().mean() + 4 * spread * noise
        return values.to(device=field.device, dtype=real.dtype)

    def swapped(self, name: str, field: LengthTrackedBatch) -> Any:
        """The batch with another field of this name."""
        original = self.fields[name]
        return _mapped(self.batch, lambda part: field if part is original else part)

    def chosen(self, rows: Tensor) -> Any:
        """The batch with some rows only, in this order; whatever has an entry per row goes with them."""

        def choose(part: Any) -> Any:
            if isinstance(part, LengthTrackedBatch):
                padded = part.padded.index_select(0, rows.to(part.device))
                return LengthTrackedBatch(padded, part.lengths[rows], padding_value=part.padding_value)
            if isinstance(part, Tensor) and part.dim() and len(part) == self.rows:
                return part.index_select(0, rows.to(part.device))
            if isinstance(part, list) and len(part) == self.rows:
                return [part[row] for row in rows.tolist()]
            return map_parts(part, choose)

        return choose(self.batch)


@contextmanager
def _undisturbed(module: nn.Module | None) -> Iterator[None]:
    """Give back random states, and a module's buffers, however the check ends."""
    kept = [(buffer, buffer.clone()) for buffer in (module.buffers() if module else [])]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for buffer, value in kept:
                buffer.data.copy_(value)


def _fields(batch: Any, name: str = "") -> Iterator[tuple[str, LengthTrackedBatch]]:
    if isinstance(batch, LengthTrackedBatch):
        yield name or "the batch", batch
    elif isinstance(batch, dict):
        for key, part in batch.items():
            yield from _fields(part, f"{name}.{key}" if name else str(key))
    elif isinstance(batch, (tuple, list)):
        for place, part in enumerate(batch):
            yield from _fields(part, f"{name}.{place}" if name else str(place))


def _mapped(batch: Any, change: Callable[[LengthTrackedBatch], LengthTrackedBatch]) -> Any:
    if isinstance(batch, LengthTrackedBatch):
        return change(batch)
    return map_parts(batch, lambda part: _mapped(part, change))


def _is_marked(field: LengthTrackedBatch) -> bool:
    """Whether whole numbers are padded by a mark that no real step can be mistaken for, such as -100."""
    value = field.padding_value
    return not field.padded.is_floating_point() and value is not None and value < 0 <= int(field.flat().min())


def _widened(field: LengthTrackedBatch, steps: int = 3) -> LengthTrackedBatch:
    value = 0 if field.padding_value is None else field.padding_value
    more = field.padded.new_full((len(field), steps, *field.padded.shape[2:]), value)
    padded = torch.cat([field.padded, more], 1)
    return LengthTrackedBatch(padded, field.lengths, permutation=field.permutation, padding_value=field.padding_value)


def _trimmed(field: LengthTrackedBatch) -> LengthTrackedBatch:
    width = max(int(field.lengths.max()), 1)
    return LengthTrackedBatch(field.padded[:, :width], field.lengths, padding_value=field.padding_value)


def _combined(alone: list[tuple[float, list[Tensor]]], shares: list[float]) -> tuple[float, list[Tensor]]:
    loss = sum(share * one for share, (one, _) in zip(shares, alone, strict=True))
    columns = zip(*(gradients for _, gradients in alone), strict=True)
    gradients = [sum((s * g for s, g in zip(shares, column, strict=True)), torch.zeros(())) for column in columns]
    return loss, gradients
