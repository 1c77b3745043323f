"""Variants of samples for probes, and what a user's collate function made of the samples."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor

from collate.batch import LengthTrackedBatch
from collate.tensors.nested import columns_of, map_parts
from collate.training.checking.variants import counts_of, drawn, holds_one_number, parts_of

Collate: TypeAlias = Callable[[list[Any]], Any]
"""From a list of samples to a batch: a `collate_fn`."""


@dataclass(frozen=True)
class Guess:
    """Lengths that a collate function takes from values.

    Attributes:
        what: What was observed, for the report.
        can_be_real: Whether a real step can hold padding's value: always for floats; a whole number if a sample holds
            it.
        batch: The batch in which the last step of one sample equals padding.
        otherwise: The same batch with the true lengths.
    """

    what: str
    can_be_real: bool
    batch: Any
    otherwise: Any


class SampleVariants:
    """Variants of a list of samples; the checked step takes the list, and collates it first."""

    kind = "sample"

    def __init__(self, samples: Sequence[Any], collate: Collate, generator: torch.Generator) -> None:
        self.whole, self.collate, self.generator = list(samples), collate, generator
        self.rows = len(self.whole)
        columns = {name: [_as_tensor(value) for value in values] for name, values in columns_of(self.whole).items()}
        known = {name: [v for v in values if v is not None] for name, values in columns.items()}
        self.numbers = {name: values for name, values in known.items() if len(values) == self.rows}
        self.fields = {name: values for name, values in self.numbers.items() if all(value.dim() for value in values)}
        self.lengths = {name or "the samples": [len(value) for value in values] for name, values in self.fields.items()}

    def of(self, whole: list[Any]) -> "SampleVariants":
        """As in `Variants`."""
        return SampleVariants(whole, self.collate, self.generator)

    def chosen(self, rows: Sequence[int]) -> list[Any]:
        """As in `Variants`."""
        return [self.whole[row] for row in rows]

    def alone(self, row: int) -> list[Any]:
        """As in `Variants`; the width is what the collate function makes it."""
        return self.chosen([row])

    def counts(self, row: int) -> list[float]:
        """As in `Variants`."""
        sample = [count for values in self.fields.values() for count in counts_of(values[row][None])]
        return [*sample, *counts_of(self.collate(self.alone(row)))]

    def is_alike(self, name: str) -> bool:
        """As in `Variants`."""
        return holds_one_number(self._steps(name))

    def changed(self, name: str, row: int | None, steps: slice, *, wild: bool) -> list[Any]:
        """As in `Variants`."""
        real = self._steps(name)
        samples = list(self.whole)
        for index in range(self.rows) if row is None else [row]:
            value = self._values(name)[index].clone()
            value[steps] = drawn(real, value[steps], self.generator, wild=wild)
            samples[index] = _replaced(samples[index], name, value)
        return samples

    def cut(self, name: str, row: int, steps: int) -> "SampleVariants":
        """As in `Variants`."""
        samples = list(self.whole)
        for other, lengths in self.lengths.items():
            if lengths == self.lengths[name]:
                samples[row] = _replaced(samples[row], other, self._values(other)[row][: lengths[row] - steps])
        return self.of(samples)

    def _values(self, name: str) -> list[Tensor]:
        """The samples' values of a field."""
        return self.fields[name] if name in self.fields else self.fields[""]

    def _steps(self, name: str) -> Tensor:
        """All time steps of a field: `[M, *F]`."""
        return torch.cat(self._values(name))

    # --- what the collate function did, for the text of a finding

    def disagreement(self) -> str | None:
        """A sentence on two parts of the batch whose rows are in different orders; None if no such parts are seen."""
        rows_of = {name: self._rows_of(name) for name in self.numbers}
        known = {name: rows for name, rows in rows_of.items() if rows is not None}
        for name, rows in known.items():
            first, order = next(iter(known.items()))
            if rows != order:
                return (
                    f"the collate function puts the samples' {first} in rows {order}, but their {name} in rows {rows}"
                )
        for name, rows in known.items():
            if name in self.fields and (other := self._other_lengths(name, rows)):
                return other
        return None

    def lost_step(self) -> str | None:
        """A sentence on a last step that never gets into the batch, though other steps of its field do; else None."""
        for name, lengths in self.lengths.items():
            full = [row for row, length in enumerate(lengths) if length]
            lost = [row for row in full if self._loses(name, row, slice(lengths[row] - 1, None))]
            if lost and not all(self._loses(name, row, slice(None)) for row in full):
                row = lost[0]
                return f"the collate function leaves step {lengths[row] - 1} of sample {row} of {name} out of the batch"
        return None

    # --- lengths that are guessed from values, as by x != 0

    def guessed(self) -> "Guess | None":
        """Find parts of the batch that state lengths but take them from values; None if there are none.

        The last step of a sample gets the values of other steps, and then padding's value. A part is guessed from
        values if it states the true lengths for all of the former, and other lengths for the latter.
        """
        for name, lengths in self.lengths.items():
            real, few = self._steps(name), _some(self._steps(name))
            for row in dict.fromkeys([int(np.argmax(lengths)), int(np.argmin(lengths))] if few else []):
                for value in self._paddings(name) if lengths[row] else ():
                    others = [step for step in few if not bool((step == value).all())]
                    if len(others) < 2:
                        continue
                    padding = torch.full_like(others[0], value)
                    filled = self._without(name, padding, others[0])
                    batches = [filled.ending_in(name, row, step) for step in others]
                    batch = filled.ending_in(name, row, padding)
                    if parts := _parts_that_follow(sorted(lengths), batches, batch):
                        what = (
                            f"the collate function takes the lengths of {name} from its values: with {value:g} at "
                            f"step {lengths[row] - 1}, the last of sample {row}, {' and '.join(parts)} of the batch "
                            "leave that step out"
                        )
                        can_be_real = real.is_floating_point() or bool((real == value).any())
                        return Guess(what, can_be_real, batch, _with_parts(batch, batches[0], parts))
        return None

    def _without(self, name: str, padding: Tensor, other: Tensor) -> "SampleVariants":
        """The samples with `other` in place of every step that equals padding, so that only last steps are tested."""
        samples = list(self.whole)
        for row, value in enumerate(self._values(name)):
            is_padding = (value == padding)[..., None].flatten(1).all(1)
            if is_padding.any():
                value = value.clone()
                value[is_padding] = other
                samples[row] = _replaced(samples[row], name, value)
        return self.of(samples)

    def ending_in(self, name: str, row: int, step: Tensor) -> Any:
        """The batch of the samples, one of which gets this last step."""
        value = self._values(name)[row].clone()
        value[-1] = step
        return self.collate([*self.whole[:row], _replaced(self.whole[row], name, value), *self.whole[row + 1 :]])

    def _paddings(self, name: str) -> list[float]:
        """Candidates for the value of a field's padding: 0, and the values at the ends of rows of the batch."""
        real = self._values(name)[0]
        found = {0.0}
        for _, part in parts_of(self.collate(self.whole)):
            values = part.padded if isinstance(part, LengthTrackedBatch) else part
            if isinstance(values, Tensor) and values.dim() == real.dim() + 1 and values.dtype == real.dtype:
                found |= {float(end.flatten()[0]) for end in values[:, -1] if bool((end == end.flatten()[0]).all())}
        # A negative whole number means "no target", as -100 does.
        exact = not real.is_floating_point()
        return sorted(value for value in found if value == value and not (exact and value < 0))[:4]

    def _loses(self, name: str, row: int, steps: slice) -> bool:
        """Whether the batch stays the same when these time steps of a sample get other values."""
        base, wild = self._parts(self.whole), (False, False, True, True)
        changed = (self.changed(name, row, steps, wild=each) for each in wild)
        return not any(_rows_that_differ(base, self._parts(samples)) for samples in changed)

    def _rows_of(self, name: str) -> list[int] | None:
        """The row of each sample, found by changing one sample at a time; None if that is ambiguous."""
        base, rows = self._parts(self.whole), []
        real = torch.cat([value.reshape(-1, *value.shape[1:]) for value in self.numbers[name]])
        for index, value in enumerate(self.numbers[name]):
            other = drawn(real, value, self.generator, wild=False)
            samples = [*self.whole[:index], _replaced(self.whole[index], name, other), *self.whole[index + 1 :]]
            differ = _rows_that_differ(base, self._parts(samples))
            # No row: the field is not read. Several rows: the collate function mixes samples.
            if len(differ) != 1:
                return None
            rows += differ
        return rows if len(set(rows)) == self.rows else None

    def _other_lengths(self, name: str, rows: Sequence[int]) -> str | None:
        """A sentence on a part of the batch that holds the right lengths in another order; None if there is none."""
        lengths = [length for _, length in sorted(zip(rows, self.lengths[name], strict=True))]
        for part, values in self._parts(self.whole).items():
            found = [int(value) for value in values] if all(map(_is_integer, values)) else []
            if sorted(found) == sorted(lengths) and found != lengths:
                return (
                    f"{part or 'a part'} of the batch holds the lengths {found}, but the rows of {name} have {lengths}"
                )
        return None

    def _parts(self, samples: list[Any]) -> dict[str, list[Any]]:
        """The rows of each part of the batch that the samples make."""
        return dict(_rows_of_parts(self.collate(samples), self.rows))


def _as_tensor(value: object) -> Tensor | None:
    """Numbers of any kind as a tensor on the host; None for anything else."""
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        array = np.asarray(value)
    except ValueError:
        return None
    # A copy, since torch warns of arrays that cannot be written to.
    return torch.from_numpy(np.array(array)) if array.dtype.kind in "biufc" else None


def _as_before(original: object, value: Tensor) -> object:
    """A value in the type that the sample's field had."""
    if isinstance(original, Tensor):
        return value.to(original.device)
    if isinstance(original, (np.ndarray, np.generic)):
        return value.numpy().astype(original.dtype)
    return value.tolist()


def _replaced(sample: Any, name: str, value: Tensor) -> Any:
    """The sample with another value in a field of this dotted name."""
    if not isinstance(sample, (dict, tuple)) and not hasattr(sample, "keys"):
        return _as_before(sample, value)
    labels = list(sample) if hasattr(sample, "keys") else getattr(sample, "_fields", range(len(sample)))
    names = iter(map(str, labels))

    def change(part: Any) -> Any:
        label = next(names)
        if name == label:
            return _replaced(part, "", value)
        return _replaced(part, name[len(label) + 1 :], value) if name.startswith(f"{label}.") else part

    return map_parts(sample, change)


def _rows_of_parts(batch: Any, rows: int) -> Iterator[tuple[str, list[Any]]]:
    """The rows of each part of a batch that has an entry per sample.

    Yields:
        Pairs of a part's name and its rows.
    """
    for name, part in parts_of(batch):
        if isinstance(part, LengthTrackedBatch) and len(part) == rows:
            yield name, list(part.padded)
            yield f"{name}.lengths".lstrip("."), list(part.lengths)
        elif isinstance(part, (Tensor, np.ndarray)) and part.ndim and len(part) == rows:
            yield name, list(part if isinstance(part, Tensor) else torch.from_numpy(part))
        elif isinstance(part, (list, tuple)) and len(part) == rows:
            yield name, list(part)


def _rows_that_differ(base: dict[str, list[Any]], other: dict[str, list[Any]]) -> list[int]:
    """The rows in which two batches differ in any part."""
    rows = set()
    for name, values in base.items():
        for row, (a, b) in enumerate(zip(values, other.get(name, values), strict=False)):
            same = a.shape == b.shape and bool((a == b).all()) if isinstance(a, Tensor) else a == b
            if not same:
                rows.add(row)
    return sorted(rows)


def _some(steps: Tensor, count: int = 6) -> list[Tensor]:
    """Up to `count` different steps of `[M, *F]`."""
    if steps.dtype == torch.bool or steps.is_complex():
        return []
    # Of 40 different steps, those of index 0, 6, 12, 18, 24 and 30.
    distinct = torch.unique(steps, dim=0)
    return list(distinct[:: max(1, len(distinct) // count)][:count])


def _parts_that_follow(lengths: list[int], batches: Sequence[Any], batch: Any) -> list[str]:
    """The parts that state these sorted lengths in each of `batches`, and other lengths in `batch`."""
    before = [dict(_stated_lengths(other)) for other in batches]
    return [
        part
        for part, stated in _stated_lengths(batch)
        if stated != lengths and all(other.get(part) == lengths for other in before)
    ]


def _stated_lengths(batch: Any) -> Iterator[tuple[str, list[int]]]:
    """The lengths that each part of a batch states, sorted.

    Yields:
        Pairs of a part's name and lengths.
    """
    for name, part in parts_of(batch):
        if (lengths := _as_lengths(part)) is not None:
            yield name or "a part", sorted(lengths)


def _with_parts(batch: Any, other: Any, names: Sequence[str]) -> Any:
    """A batch with some of its parts taken from another one."""
    parts, others = dict(parts_of(batch)), dict(parts_of(other))
    replacements = {id(parts[name]): others[name] for name in names if name in parts}

    def change(part: Any) -> Any:
        return replacements[id(part)] if id(part) in replacements else map_parts(part, change)

    return change(batch)


def _as_lengths(part: object) -> list[int] | None:
    """The length of each row that a part of a batch states: integers `[B]`, or a mask `[B, T]` of either polarity."""
    if isinstance(part, LengthTrackedBatch):
        return cast("list[int]", part.lengths.tolist())
    if isinstance(part, (list, tuple)):
        return [int(value) for value in part] if all(map(_is_integer, part)) else None
    if not isinstance(part, (Tensor, np.ndarray)):
        return None
    values = part.detach().cpu().numpy() if isinstance(part, Tensor) else part
    if values.ndim == 1 and values.dtype.kind in "iu":
        return cast("list[int]", values.tolist())
    if values.ndim == 2 and values.size and bool(((values == 0) | (values == 1)).all()):
        # The first step of each row is real, which tells the polarity of a mask.
        counts = (values if values[:, 0].all() else 1 - values).sum(1)
        return [int(count) for count in counts]
    return None


def _is_integer(value: object) -> bool:
    """Whether a value is one whole number."""
    if isinstance(value, Tensor):
        return value.dim() == 0 and not value.is_floating_point() and not value.is_complex()
    return isinstance(value, (int, np.integer))
