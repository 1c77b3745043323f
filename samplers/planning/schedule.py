"""An epoch as one flat sequence of batches, and how any number of replicas takes what is left of it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heapreplace
from typing import Final

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.keyed_shuffle import derive_key, draw, permute, permute_one
from samplers.planning.sorting import Places
from samplers.planning.tables.batch_table import Layout, Sizes

# What a key is for: samples within strata, steps within the epoch, batches within a step, the step that is dropped.
SAMPLES, STEPS, SLOTS, DROPPED = range(4)

# Batches are computed for many steps at once, as many as hold about so many samples: enough to hide the cost of a
# NumPy call, few enough that the arrays stay in the processor's cache.
CHUNK_SAMPLES: Final = 1 << 16
EVENING_ROUNDS: Final = 4
UNITS: Final = 1 << 20


@dataclass(frozen=True, eq=False)
class Epoch:
    """The sequence of an epoch's batches, laid out for the replicas with which it began.

    Batches alike in width form a step, so that replicas wait for nobody, and steps are shuffled over the whole epoch.
    The last of the sequence is a batch of most rows, since the last step of a course may have to be split by rows.

    Attributes:
        layout: the batches by number.
        epoch: which one.
        replicas: batches in a step.
    """

    layout: Layout
    epoch: int
    replicas: int

    def batches_at(self, positions: Integers) -> Integers:
        """The numbers, in the layout, of the batches at these positions of the sequence: int64 `[n]`."""
        if not self.layout.options.shuffle:
            return positions
        steps, slots = np.divmod(positions, self.replicas)
        shuffled = steps < self._shuffled
        steps = np.where(
            shuffled, permute(np.minimum(steps, self._shuffled - 1), self._shuffled, self._key(STEPS)), steps
        )
        turned = (slots + draw(steps, self.replicas, self._key(SLOTS))) % self.replicas
        numbers = steps * self.replicas + np.where(shuffled, turned, slots)
        return self._around_dropped(numbers)

    def samples_at(self, positions: Integers) -> tuple[Places, Integers]:
        """The samples at these positions, batch after batch `[sum(rows)]`, and the rows of each: int64 `[n]`."""
        return self.layout.samples_of(self.batches_at(positions), self._key(SAMPLES))

    def _key(self, purpose: int) -> int:
        return derive_key(self.layout.options.seed, self.epoch, purpose)

    @cached_property
    def _shuffled(self) -> int:
        """How many of the first steps are shuffled."""
        steps, partial = divmod(len(self.layout), self.replicas)
        return steps if partial or self.layout.options.drop_last else steps - 1

    def _around_dropped(self, numbers: Integers) -> Integers:
        """With `drop_last`, let a step's worth of batches from anywhere stand last, or the same ones always would."""
        steps, partial = divmod(len(self.layout), self.replicas)
        if not self.layout.options.drop_last or partial == 0:
            return numbers
        hole = permute_one(0, steps + 1, self._key(DROPPED)) * self.replicas
        whole = steps * self.replicas
        return np.where(numbers >= whole, numbers - whole + hole, numbers + partial * (numbers >= hole))


@dataclass(frozen=True, eq=False)
class Course:
    """What is left of an epoch after `taken` batches, as `replicas` take it: in step t, replica r takes one batch.

    Batches of a course are numbered step by step: number `t * replicas + r`.

    Attributes:
        epoch: the sequence.
        taken: batches of the sequence that were taken before.
        replicas: who takes the rest; not always as many as the epoch was laid out for.
    """

    epoch: Epoch
    taken: int
    replicas: int

    def __post_init__(self) -> None:
        if self.taken > len(self.epoch.layout):
            raise ValueError(f"a position must lie in an epoch of {len(self.epoch.layout)} batches, got {self.taken}")
        if self.partial and not self._drops and self.last_rows < self.replicas:
            raise ValueError(
                f"the last step must have a row for each of {self.replicas} replicas, got {self.last_rows} rows in "
                f"{self.partial} batches: set drop_last=True, use fewer replicas, or allow batches of more rows"
            )

    @property
    def batches(self) -> int:
        """Batches of the course, over all replicas. No `__len__`: a course with nothing left would be false."""
        return self.steps * self.replicas

    @property
    def whole(self) -> int:
        """Steps in which every replica takes a whole batch."""
        return (len(self.epoch.layout) - self.taken) // self.replicas

    @property
    def partial(self) -> int:
        """Batches left for the last step, fewer than replicas."""
        return (len(self.epoch.layout) - self.taken) % self.replicas

    @property
    def steps(self) -> int:
        """Steps of every replica."""
        return self.whole + (self.partial > 0 and not self._drops)

    @property
    def last_rows(self) -> int:
        """Rows in the batches of the last, partial step."""
        return int(self.epoch.layout.rows_of(self.epoch.batches_at(self._last_positions)).sum())

    def taken_after(self, steps: int) -> int:
        """Batches of the sequence that are taken when so many steps of this course are done."""
        return min(self.taken + steps * self.replicas, len(self.epoch.layout))

    def samples_of(self, numbers: Integers) -> tuple[Places, Integers]:
        """The samples of these batches of the course, one batch after the other, and how many each has.

        Args:
            numbers: int64 `[n]`, ascending, each in `range(course.batches)`.
        """
        whole = self.whole * self.replicas
        positions = self.taken + numbers[numbers < whole]
        if len(positions) == len(numbers):
            return self.epoch.samples_at(positions)
        pieces = [self._pieces[number - whole] for number in numbers[numbers >= whole].tolist()]
        samples, rows = self.epoch.samples_at(positions)
        return np.concatenate([samples, *pieces]), np.concatenate([rows, [len(piece) for piece in pieces]])

    def lists_of(self, numbers: Integers) -> list[list[int]]:
        """The samples of these batches as lists of Python ints."""
        samples, rows = self.samples_of(numbers)
        flat, ends = samples.tolist(), np.cumsum(rows).tolist()
        return [flat[end - count : end] for end, count in zip(ends, rows.tolist(), strict=True)]

    def chunks(self) -> Iterator[Integers]:
        """All batches, as many at a time as are well computed together.

        Yields:
            Numbers of batches, int64 `[n]`.
        """
        size = chunk_steps(self.epoch.layout)
        for first in range(0, self.batches, size):
            yield np.arange(first, min(first + size, self.batches))

    @property
    def _drops(self) -> bool:
        return self.epoch.layout.options.drop_last

    @property
    def _last_positions(self) -> Integers:
        end = len(self.epoch.layout)
        return np.arange(end - self.partial, end)

    @cached_property
    def _pieces(self) -> list[Places]:
        """The last step, split by rows: a piece for each replica."""
        samples, rows = self.epoch.samples_at(self._last_positions)
        return self._even_pieces(samples) or split_each(np.split(samples, np.cumsum(rows)[:-1]), self.replicas)

    def _even_pieces(self, samples: Places) -> list[Places] | None:
        """Cut the rows of the last step, pooled and sorted, into pieces of even cost, if they hold the budget so."""
        layout = self.epoch.layout
        samples = samples[np.argsort(-layout.corpus.lengths_of(samples).sum(1), kind="stable")]
        weights = _cost_units(layout, layout.sizes_of(samples, np.ones(len(samples), np.int64)))
        best, pieces = UNITS, None
        for _ in range(EVENING_ROUNDS):
            rows = cut_evenly(weights, self.replicas)
            if rows.min() < 1:
                break
            costs = _cost_units(layout, layout.sizes_of(samples, rows))
            if costs.max() <= best:
                best, pieces = int(costs.max()), np.split(samples, rows.cumsum()[:-1])
            # A piece costs more than its rows do one by one, the more so the further apart their lengths lie.
            apart = np.add.reduceat(weights, rows.cumsum() - rows)
            weights = np.maximum(1, weights * np.repeat(costs, rows) // np.repeat(apart, rows))
        return pieces


def chunk_steps(layout: Layout) -> int:
    """How many batches are well computed together."""
    return 1 + CHUNK_SAMPLES * len(layout) // len(layout.corpus)


def cut_evenly(weights: Integers, pieces: int) -> Integers:
    """The lengths of runs of `weights` `[n]` whose sums are as even as whole rows allow: int64 `[pieces]`."""
    ends = weights.cumsum()
    goals = np.arange(1, pieces) * (2 * int(ends[-1])) // pieces
    # A run ends with the row in whose middle the goal lies.
    return np.diff(np.searchsorted(2 * ends - weights, goals), prepend=0, append=len(weights))


def split_each(batches: list[Places], replicas: int) -> list[Places]:
    """Split each batch of a step on its own, so that the greatest piece has as few rows as can be.

    Args:
        batches: samples of each, at most as many batches as replicas, and at least as many rows.
        replicas: how many pieces there must be.
    """
    shares = [1] * len(batches)
    largest = [(-float(len(batch)), place) for place, batch in enumerate(batches)]
    heapify(largest)
    for _ in range(replicas - len(batches)):
        place = largest[0][1]
        shares[place] += 1
        heapreplace(largest, (-len(batches[place]) / shares[place], place))
    return [piece for batch, share in zip(batches, shares, strict=True) for piece in np.array_split(batch, share)]


def _cost_units(layout: Layout, sizes: Sizes) -> Integers:
    """Shares of the budget, or of the rows of a shape as wide if that is more, in whole units.

    Units are rounded up, and whole because sums of floats may differ between machines.
    """
    shares = np.minimum(np.maximum(layout.use_of(sizes), layout.fill_of(sizes)), 2.0)
    units: Integers = np.maximum(1, np.ceil(shares * UNITS)).astype(np.int64)
    return units
