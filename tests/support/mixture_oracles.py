"""Slow and plain: what any plan of a mixture must do, counted batch by batch."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from hypothesis import strategies as st

from samplers import LengthBucketBatchSampler, Mixture, PackingBatchSampler


class Case(NamedTuple):
    """A mixture and a sampler's options, from which any rank is made."""

    sources: dict[str, list[int]]
    weights: dict[str, float]
    mixture_options: dict[str, Any]
    packs: bool
    options: dict[str, Any]

    def mixture(self, **changed: Any) -> Mixture:
        return Mixture(self.sources, **{"weights": self.weights, **self.mixture_options, **changed})

    def sampler(self, num_replicas: int = 1, rank: Any = "all", mixture: Mixture | None = None) -> Any:
        kind = PackingBatchSampler if self.packs else LengthBucketBatchSampler
        return kind(mixture or self.mixture(), num_replicas=num_replicas, rank=rank, **self.options)

    @property
    def lengths(self) -> list[int]:
        return [length for lengths in self.sources.values() for length in lengths]

    def source_of(self, index: int) -> int:
        ends = np.cumsum([len(lengths) for lengths in self.sources.values()])
        return int(np.searchsorted(ends, index, side="right"))

    def units(self, batch: Sequence[int], index: int) -> int:
        """What one sample of a batch adds to its source."""
        if self.mixture_options.get("unit", "tokens") == "samples":
            return 1
        if self.mixture_options.get("unit") == "padded":
            multiple = self.options.get("widths", 1)
            return int(-(-max(self.lengths[each] for each in batch) // multiple) * multiple)
        return int(self.lengths[index])


@st.composite
def cases(draw: st.DrawFn, *, packs: bool | None = None, units: Sequence[str] = ("tokens", "samples")) -> Case:
    """Two to five sources of quite different sizes and lengths, under several kinds of budget."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count = draw(st.integers(1, 5))
    sources = {
        f"s{number}": rng.integers(1, draw(st.sampled_from([4, 9, 20])), draw(st.integers(20, 60))).tolist()
        for number in range(count)
    }
    weights = {name: float(draw(st.integers(1, 4))) for name in sources}
    packed = draw(st.booleans()) if packs is None else packs
    bucketed = [
        {"max_tokens": 60},
        {"batch_size": 3},
        {"max_tokens": 90, "widths": 4},
        {"max_tokens": 60, "batch_size": 4},
    ]
    packing = [{"capacity": 40}, {"capacity": 40, "rows": 2}, {"capacity": 40, "max_documents": 4}]
    mixture_options = {
        "unit": draw(st.sampled_from(list(units))),
        "stop": draw(st.sampled_from(["shortest", "longest", 40])),
        "within": draw(st.sampled_from(["batch", "sample"])),
    }
    options = draw(st.sampled_from(packing if packed else bucketed)) | {"seed": draw(st.integers(0, 9))}
    return Case(sources, weights, mixture_options, packed, options)


def check_passes(case: Case, batches: list[list[int]], seen: Counter[int] | None = None) -> Counter[int]:
    """Check that no sample comes again before its source is through; the samples that came, and how often."""
    times = Counter[int]() if seen is None else seen
    ends = np.cumsum([0, *(len(lengths) for lengths in case.sources.values())])
    for batch in batches:
        for index in batch:
            times[index] += 1
        for source in {case.source_of(index) for index in batch}:
            counts = [times[index] for index in range(ends[source], ends[source + 1])]
            assert max(counts) - min(counts) <= 1, f"source {source} repeats a sample before it is through: {counts}"
    return times


def measure_errors(case: Case, batches: list[list[int]], shares: Sequence[float]) -> tuple[np.ndarray, float]:
    """How far each source is from its share after each batch, `[batches, sources]`, and the largest batch, in units."""
    taken = np.zeros(len(case.sources))
    errors, largest = [], 0.0
    for batch in batches:
        before = taken.sum()
        for index in batch:
            taken[case.source_of(index)] += case.units(batch, index)
        largest = max(largest, taken.sum() - before)
        errors.append(taken - taken.sum() * np.array(shares))
    return np.array(errors), largest


def dealt(samplers: list[Any]) -> list[list[int]]:
    """The batches of all ranks, step by step."""
    lists = [list(sampler) for sampler in samplers]
    assert len({len(each) for each in lists}) == 1
    return [batch for step in zip(*lists, strict=True) for batch in step]
