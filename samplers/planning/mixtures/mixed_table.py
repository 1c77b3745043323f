"""MixedTable: what the tables of mixtures have in common, whatever their batches are."""

from abc import abstractmethod
from dataclasses import replace
from typing import Any, Self

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.mixtures.mixed_plan import MixedPlan, Stage
from samplers.planning.mixtures.mixture import Mixture
from samplers.planning.mixtures.report import MixtureReport, SourceTotals
from samplers.planning.mixtures.sequence import MixedEpoch
from samplers.planning.sorting import digest_lengths


class MixedTable:
    """The batches of a mixture: stages, changes and reports.

    Attributes:
        mixed: The sources, and what each epoch takes of them.
    """

    mixed: MixedPlan

    @abstractmethod
    def batches_of(self, epoch: int, num_replicas: int) -> MixedEpoch:
        """The batches of an epoch that this many replicas begin."""

    @abstractmethod
    def units_of(self, samples: Integers, batches: MixedEpoch, positions: Integers) -> Integers:
        """What each of the samples of these batches adds to the units of its source: int64 `[n]`."""

    @abstractmethod
    def tokens_of(self, samples: Integers) -> Integers:
        """Real time steps of each of these samples, over all fields: int64 `[n]`."""

    @property
    def stage_text(self) -> str:
        """What was taken before the mixture took over from another, or the batches of its epochs; else empty."""
        return self.mixed.stage.as_text()

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
        changed: Any = replace(self, mixed=self.mixed.with_stage(stage), epoch_batches=None)  # type: ignore[type-var]
        return changed  # type: ignore[no-any-return]

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
        offsets = np.array([stream.offset for stream in self.mixed.streams])
        owners = np.searchsorted(offsets, self.whole_samples(samples), side="right") - 1
        columns = [
            np.bincount(owners, values.astype(np.float64), minlength=len(offsets))
            for values in (np.ones(len(samples)), self.tokens_of(samples), units)
        ]
        return [SourceTotals(*map(round, row)) for row in zip(*(column.tolist() for column in columns), strict=True)]

    def whole_samples(self, samples: Integers) -> Integers:
        """The sample of each index, which may be of a piece: int64 `[n]`."""
        return samples

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
