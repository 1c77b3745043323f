"""MixedPlan: what every epoch of a mixture takes from each source, and where each source stands at any position."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from typing import Any, Final, NamedTuple

import numpy as np

from samplers.planning.budget import Floats, Integers
from samplers.planning.keyed_shuffle import derive_key
from samplers.planning.mixtures.mixture import Mixture
from samplers.planning.mixtures.sequence import MixedEpoch, lay_out
from samplers.planning.mixtures.shares import count_batches_of, spread_phases
from samplers.planning.mixtures.streams.source_stream import Cut, SourceStream, StreamStart
from samplers.planning.options import Options, check_indices
from samplers.planning.pack_batches.options import PackOptions
from samplers.planning.sorting import IndexedLengths, Lengths, digest_lengths
from samplers.planning.tables.epoch_table import EpochTable, keep

# Purpose of a key: the seed of a source.
SOURCES: Final = 63
# Batches of an epoch at most: a position has no larger number.
_MOST_BATCHES: Final = 2**31 - 1
# Boundaries of epochs that are kept: an epoch needs two.
_KEPT_BOUNDARIES: Final = 4


class PlannedSource(NamedTuple):
    """A source that is read: its name and lengths, its options, and its first sample index."""

    name: str
    lengths: Lengths
    options: Any
    offset: int


def options_of_sources(mixture: Mixture, options: Options | PackOptions) -> Iterator[PlannedSource]:
    """The sources that are read, each with options of its own: its seed, and its part of `indices`.

    The seed depends on the name: the same lengths under two names have different shuffles, and a source keeps its own
    when others are added.

    Yields:
        The sources of a share above 0.

    Raises:
        ValueError: `indices` leaves a source without samples.
    """
    indices: Any = getattr(options, "indices", None)
    chosen = None if indices is None else check_indices(indices, mixture.size)
    for name, lengths, offset, size in zip(
        mixture.names, mixture.sources.values(), mixture.starts.tolist(), mixture.sizes.tolist(), strict=True
    ):
        if mixture.weights is not None and not mixture.weights[name]:
            continue
        changed: dict[str, Any] = {"seed": derive_key(options.seed, SOURCES, _hash_name(name))}
        if chosen is not None:
            changed["indices"] = chosen[(chosen >= offset) & (chosen < offset + size)] - offset
            if not len(changed["indices"]):
                raise ValueError(
                    f"source {name!r} must have a sample to plan, got none of its {size} in indices: give it the "
                    "weight 0, or leave it out"
                )
        yield PlannedSource(name, lengths, options.for_source(**changed), offset)


class Stage(NamedTuple):
    """What was taken when a mixture took over from another, and how long its epochs are.

    Attributes:
        epoch: Its first epoch.
        batches: Batches of each of its epochs: a multiple of the replicas with which it began.
        starts: Where the stream of each source begins, by name; those that are not named begin with their first pass.
    """

    epoch: int = 0
    batches: int = 0
    starts: Mapping[str, StreamStart] = {}

    def as_text(self) -> str:
        """The stage as JSON."""
        starts = {name: [start.first_pass, *map(list, start.cuts)] for name, start in self.starts.items()}
        return json.dumps([self.epoch, self.batches, starts], separators=(",", ":"))

    @classmethod
    def from_text(cls, text: str) -> "Stage":
        """The stage of a text.

        Raises:
            ValueError: It is not one.
        """
        try:
            epoch, batches, starts = json.loads(text)
            return cls(
                int(epoch),
                int(batches),
                {
                    str(name): StreamStart(int(first), tuple(Cut(*map(int, cut)) for cut in cuts))
                    for name, (first, *cuts) in starts.items()
                },
            )
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise ValueError(f"a position's mixture must be the text that position() gave, got {text!r}") from error


FIRST_STAGE: Final = Stage()


@dataclass(frozen=True, eq=False)
class MixedPlan:
    """The epochs of a mixture.

    Attributes:
        mixture: As given.
        streams: The batches of each source that is read.
        shares: The share of each of them, float64 `[streams]`; the sum is 1.
        first_stage: The stage with which a training begins.
        stage: Where the streams begin.
    """

    mixture: Mixture
    streams: tuple[SourceStream, ...]
    shares: Floats
    first_stage: Stage = FIRST_STAGE
    stage: Stage = FIRST_STAGE
    _boundaries: dict[int, Integers] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name in self.__dataclass_fields__} | {
            "_boundaries": {}
        }

    @property
    def batches(self) -> int:
        """Batches of every epoch."""
        return self.stage.batches

    @cached_property
    def samples_per_epoch(self) -> int:
        """Samples in an epoch, as far as all epochs have equally many."""
        # Of the first epoch, whichever epochs are asked for: windows are made from this number.
        counts = self.counts_after(1)
        rows = [stream.table.planned / stream.batches_per_pass for stream in self.streams]
        return max(1, round(float(counts @ np.array(rows))))

    @property
    def batch_shares(self) -> Floats:
        """The part of all batches that are of each stream, in the long run: float64 `[streams]`; the sum is 1."""
        parts: Floats = self.shares / self._units_per_batch_of
        parts /= parts.sum()
        return parts

    @property
    def _mean_counts(self) -> Floats:
        return self.batches * self.batch_shares

    @cached_property
    def lengths_digest(self) -> str:
        """Sixteen hexadecimal digits that change when a name or a length changes."""
        parts = [
            (name, lengths.fingerprint if isinstance(lengths, IndexedLengths) else digest_lengths(np.asarray(lengths)))
            for name, lengths in self.mixture.sources.items()
        ]
        return blake2b(repr(parts).encode(), digest_size=8).hexdigest()

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change when batches of a source, shares, or the end of epochs change."""
        tables = [(stream.name, *_digest_table(stream.table)) for stream in self.streams]
        shares = [share.hex() for share in self.shares.tolist()]
        text = repr((tables, shares, self.mixture.unit, self.mixture.within, self.batches, self.stage.as_text()))
        return blake2b(text.encode(), digest_size=8).hexdigest()

    def counts_after(self, epochs: int) -> Integers:
        """Batches of each stream in this many epochs of the stage: int64 `[streams]`."""
        if epochs == 0:
            return np.zeros(len(self.streams), np.int64)
        if epochs not in self._boundaries:
            keep(self._boundaries, epochs, self._count(epochs * self.batches), most=_KEPT_BOUNDARIES)
        return self._boundaries[epochs]

    def epoch(self, epoch: int, num_replicas: int) -> MixedEpoch:
        """The batches of an epoch that this many replicas begin."""
        first, end = self.bounds(epoch)
        num_replicas = self._laid_for(num_replicas)
        return lay_out(self.streams, self.shares, first, end, epoch=epoch, num_replicas=num_replicas)

    def _laid_for(self, num_replicas: int) -> int:
        """The replicas for which batches of one source are laid out: one, if their samples are divided again."""
        return num_replicas if self.mixture.within == "batch" else 1

    def bounds(self, epoch: int) -> tuple[Integers, Integers]:
        """Where each stream stands when an epoch begins and when it ends: int64 `[streams]` each.

        Raises:
            ValueError: The epoch is before the stage.
        """
        number = epoch - self.stage.epoch
        if number < 0:
            raise ValueError(
                f"epoch must be at least {self.stage.epoch}, in which this mixture took over from another, got {epoch}"
            )
        return self.counts_after(number), self.counts_after(number + 1)

    def stage_after(self, epoch: int, num_replicas: int, taken: Integers) -> Stage:
        """What another mixture begins with.

        Args:
            epoch: The present epoch.
            num_replicas: The replicas for which it was laid out.
            taken: Batches of each stream that were taken in this epoch, int64 `[streams]`.
        """
        starts = dict(self.stage.starts)
        for stream, start in zip(self.streams, self.starts_after(epoch, num_replicas, taken), strict=True):
            starts.pop(stream.name, None)
            if start != StreamStart():
                starts[stream.name] = start
        return Stage(epoch, 0, starts)

    def starts_after(self, epoch: int, num_replicas: int, taken: Integers) -> list[StreamStart]:
        """Where each stream goes on after these many of its batches of an epoch; the arguments are those above."""
        num_replicas = self._laid_for(num_replicas)
        bounds = zip(self.streams, *(array.tolist() for array in (*self.bounds(epoch), taken)), strict=True)
        return [
            stream.start_after(first, end, count, epoch=epoch, num_replicas=num_replicas)
            for stream, first, end, count in bounds
        ]

    def with_stage(self, stage: Stage) -> "MixedPlan":
        """The same mixture, where streams begin after what was taken before."""
        starts = [stage.starts.get(stream.name, StreamStart()) for stream in self.streams]
        streams = tuple(stream.begin_at(start) for stream, start in zip(self.streams, starts, strict=True))
        return replace(self, streams=streams, stage=stage, _boundaries={})

    def _count(self, batches: int) -> Integers:
        return count_batches_of(
            self.streams,
            self.shares,
            batches,
            units_per_batch=self.units_per_batch,
            per_epoch=self._mean_counts,
        )

    @property
    def units_per_batch(self) -> float:
        """About as many units as a batch has."""
        return float(1 / (self.shares / self._units_per_batch_of).sum())

    @property
    def _units_per_batch_of(self) -> Floats:
        """Mean units of a batch of each stream: float64 `[streams]`."""
        return np.array([stream.units_per_pass / stream.batches_per_pass for stream in self.streams])


def make_plan(mixture: Mixture, streams: Sequence[SourceStream], num_replicas: int) -> MixedPlan:
    """Shares and the length of an epoch.

    Args:
        mixture: As given.
        streams: The batches of each source that is read.
        num_replicas: W, for a mixture that stops after a number of steps.

    Raises:
        ValueError: A source needs more passes than it may have, or has no tokens; or an epoch is too long.
    """
    _check_tokens(mixture, streams)
    units = dict(zip((stream.name for stream in streams), (stream.units_per_pass for stream in streams), strict=True))
    all_shares = mixture.shares_of([int(units.get(name, 0)) for name in mixture.names])
    shares = all_shares[[name in units for name in mixture.names]]
    per_batch = np.array([stream.units_per_pass / stream.batches_per_pass for stream in streams])
    phases = spread_phases(per_batch / shares)
    streams = [replace(stream, phase=phase) for stream, phase in zip(streams, phases, strict=True)]
    plan = MixedPlan(mixture, tuple(streams), shares / shares.sum())
    if isinstance(mixture.stop, int):
        batches = mixture.stop * num_replicas
        _check_batches(mixture, batches)
    else:
        batches = _count_epoch(plan, num_replicas)
    stage = Stage(0, batches)
    plan = replace(plan, first_stage=stage, stage=stage, _boundaries={})
    _check_passes(plan)
    return plan


def _count_epoch(plan: MixedPlan, num_replicas: int) -> int:
    """Batches of an epoch that ends as the mixture says: whole steps of this many replicas.

    Raises:
        ValueError: There is no whole step, or there are too many.
    """
    passes = [plan.mixture.passes.get(stream.name, 1.0) for stream in plan.streams]
    units = np.array([stream.units_per_pass for stream in plan.streams])
    if plan.mixture.stop == "longest":
        total, step = float((units / plan.shares).max()), 1
    else:
        total, step = float((units * np.array(passes) / plan.shares).min()), -1
    _check_batches(plan.mixture, total / plan.units_per_batch)
    bounds = [
        int(np.floor(stream.batches_per_pass * (most if step < 0 else 1)))
        for stream, most in zip(plan.streams, passes, strict=True)
    ]
    within = [
        stream.batches_within(share * total) for stream, share in zip(plan.streams, plan.shares.tolist(), strict=True)
    ]
    batches = max(1, sum(within))
    if step < 0:
        # Also in the mean of all epochs no source has more than its passes, unless an epoch is a single step. A whole
        # number may be off by rounding.
        most_batches = np.array([stream.batches_per_pass for stream in plan.streams]) * passes
        batches = min(batches, max(num_replicas, int((most_batches / plan.batch_shares).min() + 1e-6)))
    # Rounding may give a source a batch more than its passes, or a batch less.
    while batches > 1 or step > 0:
        counts = replace(plan, stage=Stage(0, batches), _boundaries={}).counts_after(1)
        if ((counts - np.array(bounds)) * step >= 0).all():
            break
        batches += step
    if batches < num_replicas and step < 0:
        raise ValueError(
            f"an epoch must have a batch for each of {num_replicas} replicas, got {batches} batches until the first "
            "source is through: use fewer replicas, smaller batches, more passes, or another stop"
        )
    return -(-batches // num_replicas) * num_replicas if step > 0 else batches // num_replicas * num_replicas


def _check_tokens(mixture: Mixture, streams: Sequence[SourceStream]) -> None:
    """Check that each source has some of what shares count: otherwise it would be read again and again.

    Raises:
        ValueError: One has only samples without tokens.
    """
    for stream in streams:
        if mixture.unit == "tokens" and not stream.units_of_first_pass:
            raise ValueError(
                f"source {stream.name!r} must have tokens to have a share of them, got samples of length 0 only: leave "
                "it out, or count unit='samples'"
            )


def _check_batches(mixture: Mixture, batches: float) -> None:
    """Check that an epoch has an end that can be counted.

    Raises:
        ValueError: It has too many batches.
    """
    if batches > _MOST_BATCHES:
        raise ValueError(
            f"an epoch must have at most {_MOST_BATCHES} batches, got about {batches:.3g} with stop={mixture.stop!r}: "
            "give sources of little weight more, or end the epoch after a number of steps"
        )


def _check_passes(plan: MixedPlan) -> None:
    """Check that no source needs more passes in an epoch than it may have.

    Raises:
        ValueError: One does.
    """
    first, mean = plan.counts_after(1).tolist(), (plan.batches * plan.batch_shares).tolist()
    for stream, count, usual, share in zip(plan.streams, first, mean, plan.shares.tolist(), strict=True):
        most = plan.mixture.passes.get(stream.name)
        needed = max(count if count > 1 else 0, usual - 1e-6) / stream.batches_per_pass
        if most is not None and needed > most:
            raise ValueError(
                f"passes[{stream.name!r}] must be at least {needed:.3g}, got {most:g}: an epoch of {plan.batches} "
                f"batches gives the source a share of {share:.4g} of the {plan.mixture.unit}, and one pass of it has "
                f"{stream.units_per_pass:.0f}; allow more passes, lower its weight, or end the epoch sooner with stop"
            )


def _digest_table(table: EpochTable) -> tuple[str | int, ...]:
    """What tells the batches of a source from others."""
    return (table.digest,) if table.other_windows is None else (table.digest, table.other_windows)


def _hash_name(name: str) -> int:
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
