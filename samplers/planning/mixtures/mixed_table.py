"""MixedTable: what the tables of mixtures have in common, whatever their batches are."""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final, Self

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.keyed_shuffle import derive_key
from samplers.planning.mixtures.blending import Cutter, blend
from samplers.planning.mixtures.mixed_plan import MixedPlan, Stage
from samplers.planning.mixtures.mixture import Mixture
from samplers.planning.mixtures.report import MixtureReport, SourceTotals
from samplers.planning.mixtures.sequence import MixedEpoch
from samplers.planning.sorting import digest_lengths
from samplers.planning.tables.epoch_order import EpochOrder, PositionOrder
from samplers.planning.tables.epoch_table import KeptEpochs

# Purpose of a key: batches of several sources.
BLENDS: Final = 64


@dataclass(frozen=True, eq=False)
class MixedOrder(PositionOrder):
    """The order of a mixture's batches, which are numbered as an epoch takes them.

    Attributes:
        groups: The read group at each position, int64 `[B]`; None where sources are not read in windows.
    """

    groups: Integers | None = None

    def group_at_position(self, positions: Integers) -> Integers:
        """The read group at these positions: batches of one group are read together; int64 `[n]`."""
        return super().group_at_position(positions) if self.groups is None else self.groups[positions]


class MixedTable(KeptEpochs):
    """The batches of a mixture: epochs, stages, changes and reports. Batch ids are positions in the epoch's order.

    Attributes:
        mixed: The sources, and what each epoch takes of them.
        epoch_batches: The batches of the epoch to which this table belongs; None before an epoch is chosen.
    """

    mixed: MixedPlan
    epoch_batches: MixedEpoch | None

    @abstractmethod
    def _padded_units(self, samples: Integers, batches: MixedEpoch, positions: Integers) -> Integers:
        """The padded time steps that each of the samples of these batches adds to its source: int64 `[n]`, n > 0."""

    @property
    @abstractmethod
    def _cutter(self) -> Cutter:
        """What divides the samples of a window again, with `within="sample"`."""

    @property
    @abstractmethod
    def _window_batches(self) -> int | None:
        """Batches of such a window; None chooses from their number."""

    def __getstate__(self) -> dict[str, Any]:
        state: Any = super().__getstate__()
        return {name: value for name, value in state.items() if name != "_epochs"} | {"epoch_batches": None}

    def __len__(self) -> int:
        """Batches of every epoch."""
        return self.mixed.batches

    @property
    def planned(self) -> int:
        """Samples in an epoch, as far as all epochs have equally many."""
        return self.mixed.samples_per_epoch

    @property
    def lengths_digest(self) -> str:
        """Sixteen hexadecimal digits that change when a length or a name of a source changes."""
        return self.mixed.lengths_digest

    @property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change when the sources' batches or the shares change."""
        return self.mixed.digest

    @property
    def trial_epochs(self) -> Iterable[int]:
        """Epochs that show whether replicas can share the last step of every epoch."""
        return (self.mixed.stage.epoch,)

    def order(self, epoch: int, num_replicas: int) -> EpochOrder:
        """The order of this table's batches, which is that of their ids."""
        groups = None if self.epoch_batches is None else self.epoch_batches.groups
        return MixedOrder(len(self), self.options, epoch, num_replicas, groups)

    def count_dropped(self, sequences: int) -> int:
        """Samples of an epoch that `drop_last` leaves out, if it gives this many."""
        return len(self._batches.samples) - sequences

    def batches_of(self, epoch: int, num_replicas: int) -> MixedEpoch:
        """The batches of an epoch that this many replicas begin."""
        return self.for_epoch(epoch, num_replicas)._batches  # noqa: SLF001

    def tokens_of(self, samples: Integers) -> Integers:
        """Real time steps of each of these samples, over all fields: int64 `[n]`."""
        return self.sample_lengths(samples).sum(1) if len(samples) else samples

    def units_of(self, samples: Integers, batches: MixedEpoch, positions: Integers) -> Integers:
        """What each of the samples of these batches adds to the units of its source: int64 `[n]`."""
        if self.mixed.mixture.unit == "samples":
            return np.ones_like(samples)
        if self.mixed.mixture.unit == "tokens" or not len(samples):
            return self.tokens_of(samples)
        return self._padded_units(samples, batches, positions)

    def units_by_source(self, batches: MixedEpoch) -> Integers:
        """Units of each source in each of these batches, which lie in their order: int64 `[n, sources]`."""
        units = self.units_of(batches.samples, batches, np.arange(len(batches.sizes)))
        return batches.sum_by(self._owners_of(batches.samples), units, len(self.mixed.streams))

    @property
    def stage_text(self) -> str:
        """What was taken before the mixture took over from another, or the batches of its epochs; else empty."""
        return self.mixed.stage.as_text()

    @property
    def mixture_digest(self) -> str:
        """Sixteen hexadecimal digits that change with the mixture, and not with what was taken before."""
        return self.mixed.with_stage(self.mixed.first_stage).digest

    def with_stage_text(self, text: str) -> Self:
        """The table of the stage to which a position with this text belongs.

        Raises:
            ValueError: The text is not one of a mixture's positions.
        """
        if text == self.stage_text:
            return self
        return self.with_stage(Stage.from_text(text) if text else self.mixed.first_stage)

    def with_stage(self, stage: Stage) -> Self:
        """The table of a stage."""
        return self._with(mixed=self.mixed.with_stage(stage), epoch_batches=None)

    def follow(self, before: "MixedTable", epoch: int, num_replicas: int, taken: int) -> Self:
        """This mixture, where it takes over from another.

        Args:
            before: The other, with the same options.
            epoch: The epoch in which it takes over.
            num_replicas: The replicas for which that epoch was laid out.
            taken: Batches of that epoch that were taken.

        Raises:
            ValueError: A source has other lengths than it had, `within` changes where small sources depend on it, or
                batches of several sources were begun.
        """
        _check_same_sources(before.mixed.mixture, self.mixed.mixture)
        _check_same_batches(before.mixed, self.mixed)
        batches = before.batches_of(epoch, num_replicas)
        batches.check_whole(taken)
        counts = np.bincount(batches.sources[:taken], minlength=len(before.mixed.streams))
        stage = before.mixed.stage_after(epoch, num_replicas, counts)
        return self.with_stage(stage._replace(batches=self.mixed.first_stage.batches))

    def report_at(self, epoch: int, num_replicas: int, taken: int) -> MixtureReport:
        """What each source has given from the start of the training on.

        Args:
            epoch: The present epoch.
            num_replicas: The replicas for which it was laid out.
            taken: Batches of the epoch that were taken.
        """
        nothing = np.zeros(len(self.mixed.streams), np.int64)
        starts = self.mixed.starts_after(epoch, num_replicas, nothing)
        before = [stream.begin_at(start) for stream, start in zip(self.mixed.streams, starts, strict=True)]
        batches, positions = self.batches_of(epoch, num_replicas), np.arange(taken)
        samples, _ = batches.samples_of(positions)
        present = self._count(samples, self.units_of(samples, batches, positions))
        totals = [self._count_before(stream) for stream in before]
        began = [self._count_before(stream) for stream in self.mixed.streams]
        return MixtureReport.build(
            [stream.name for stream in self.mixed.streams],
            self.mixed.mixture.unit,
            self.mixed.shares,
            passes=[self._samples_per_pass(stream) for stream in self.mixed.streams],
            totals=[first.plus(then) for first, then in zip(totals, present, strict=True)],
            began=began,
        )

    def _count(self, samples: Integers, units: Integers) -> list[SourceTotals]:
        """Samples, tokens and units of each stream."""
        owners = self._owners_of(samples)
        columns = [
            np.bincount(owners, values.astype(np.float64), minlength=len(self.mixed.streams))
            for values in (np.ones(len(samples)), self.tokens_of(samples), units)
        ]
        return [SourceTotals(*map(round, row)) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def whole_samples(self, samples: Integers) -> Integers:
        """The sample of each index, which may be of a piece: int64 `[n]`."""
        return samples

    def _owners_of(self, samples: Integers) -> Integers:
        """The number of the stream of each sample, int64 `[n]`."""
        offsets = [stream.offset for stream in self.mixed.streams]
        return np.searchsorted(offsets, self.whole_samples(samples), side="right") - 1

    def _make_epoch(self, epoch: int, num_replicas: int) -> Self:
        """The table of an epoch that this many replicas begin."""
        batches = self.mixed.epoch(epoch, num_replicas)
        if self.mixed.mixture.within == "sample":
            batches = blend(
                batches,
                self._cutter,
                self.mixed.shares,
                units_by_source=self.units_by_source,
                num_replicas=num_replicas,
                window=self._window_batches,
                key=derive_key(self.options.seed, epoch, BLENDS),
            )
        return self._with(epoch_batches=batches)

    @property
    def _batches(self) -> MixedEpoch:
        """The batches of this table's epoch; those of the stage's first epoch, if it belongs to none."""
        return self.batches_of(self.mixed.stage.epoch, 1) if self.epoch_batches is None else self.epoch_batches

    def _with(self, **changes: Any) -> Self:
        changed: Any = replace(self, **changes)  # type: ignore[type-var]
        return changed  # type: ignore[no-any-return]

    def _count_before(self, stream: Any) -> SourceTotals:
        """What a stream has given before it begins: whole passes, and what the present one lacks."""
        start = stream.start
        missing = np.setdiff1d(np.arange(stream.batches_per_pass), stream.order_of(start.first_pass))
        totals = self._count_batches(stream, start.first_pass, missing)
        if start.first_pass:
            whole = self._count_batches(stream, 0, np.arange(stream.batches_per_pass))
            totals = totals.plus(SourceTotals(*(start.first_pass * value for value in whole)))
        return totals

    def _count_batches(self, stream: Any, pass_number: int, batch_ids: Integers) -> SourceTotals:
        loaded = stream.load(pass_number, batch_ids)
        return SourceTotals(len(loaded.samples), int(self.tokens_of(loaded.samples).sum()), int(loaded.units.sum()))

    def _samples_per_pass(self, stream: Any) -> int:
        return int(stream.load(0, np.arange(stream.batches_per_pass)).sizes.sum())


def _check_same_sources(before: Mixture, after: Mixture) -> None:
    """Check that sources of one name are the same.

    Raises:
        ValueError: One has other lengths.
    """
    for name in before.sources.keys() & after.sources.keys():
        old, new = (_fingerprint(mixture.sources[name]) for mixture in (before, after))
        if old != new:
            raise ValueError(
                f"source {name!r} must have the lengths that it had before the change, got others: give another corpus "
                "another name"
            )


def _check_same_batches(before: MixedPlan, after: MixedPlan) -> None:
    """Check that each source has the batches in which it was begun: those of small ones depend on `within`.

    Raises:
        ValueError: One has others, or had them before it left.
    """
    old = {stream.name: stream.table.digest for stream in before.streams}
    new = {stream.name: stream.table.digest for stream in after.streams}
    changed = [name for name in old.keys() & new.keys() if old[name] != new[name]]
    if before.mixture.within != after.mixture.within:
        changed += before.stage.starts.keys() - old.keys()
    if changed:
        raise ValueError(
            f"within must stay {before.mixture.within!r} when a mixture changes, got {after.mixture.within!r}: source "
            f"{min(changed)!r} has other batches with it, so that its samples would be lost or repeated"
        )


def _fingerprint(lengths: Any) -> str:
    return str(getattr(lengths, "fingerprint", None) or digest_lengths(np.asarray(lengths)))
