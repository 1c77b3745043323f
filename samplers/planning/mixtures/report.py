"""What each source of a mixture has given at a position, next to what its share wants."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from samplers.planning.budget import Floats


class SourceTotals(NamedTuple):
    """Samples, real tokens over all fields, and units of shares."""

    samples: int
    tokens: int
    units: int

    def plus(self, other: "SourceTotals") -> "SourceTotals":
        """The sum of both."""
        return SourceTotals(*(own + others for own, others in zip(self, other, strict=True)))


@dataclass(frozen=True, kw_only=True)
class SourceReport:
    """A source at a position.

    Attributes:
        name: Of the source.
        samples: Samples that it has given since the training began; those that were repeated count each time.
        tokens: Their real time steps, over all fields.
        passes: How often it has been through, in samples.
        units: What it has given in units of the mixture's shares.
        wanted_units: What its share wants it to have given: exact but for a batch.
        share: Its share of the units since the present weights took over; 0 before the first batch.
        wanted_share: The share that its weight gives it.
    """

    name: str
    samples: int
    tokens: int
    passes: float
    units: int
    wanted_units: float
    share: float
    wanted_share: float


@dataclass(frozen=True, kw_only=True)
class MixtureReport:
    """All sources of a mixture at a position.

    Attributes:
        unit: What shares count.
        sources: In the order of the mixture; without those of weight 0.
        error: The largest difference between what a source has given and what its share wants, in units.
    """

    unit: str
    sources: tuple[SourceReport, ...]
    error: float

    @classmethod
    def build(
        cls,
        names: Sequence[str],
        unit: str,
        shares: Floats,
        *,
        passes: Sequence[int],
        totals: Sequence[SourceTotals],
        began: Sequence[SourceTotals],
    ) -> "MixtureReport":
        """The report from what sources have given.

        Args:
            names: Of the sources.
            unit: What shares count.
            shares: Of the sources, float64 `[sources]`.
            passes: Samples of a pass of each.
            totals: What each has given since the training began.
            began: What each had given when the present weights took over.
        """
        since = [total.units - start.units for total, start in zip(totals, began, strict=True)]
        every = sum(since)
        sources = tuple(
            SourceReport(
                name=name,
                samples=total.samples,
                tokens=total.tokens,
                passes=total.samples / max(1, size),
                units=total.units,
                wanted_units=start.units + share * every,
                share=units / max(1, every),
                wanted_share=share,
            )
            for name, total, start, units, size, share in zip(
                names, totals, began, since, passes, shares.tolist(), strict=True
            )
        )
        return cls(unit=unit, sources=sources, error=max(abs(each.units - each.wanted_units) for each in sources))

    def __str__(self) -> str:
        head = f"{'source':<20}{'samples':>14}{'tokens':>18}{'passes':>10}{'share':>10}{'wanted':>10}"
        rows = [
            f"{each.name:<20}{each.samples:>14,}{each.tokens:>18,}{each.passes:>10.3f}{each.share:>10.3%}"
            f"{each.wanted_share:>10.3%}"
            for each in self.sources
        ]
        return "\n".join([head, *rows, f"largest error: {self.error:,.0f} {self.unit}"])
