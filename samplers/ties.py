"""Strata of one length trade places: samples that are as good as each other need not stay among the same neighbours.

A shuffle that keeps to its strata lets a sample meet only those of its own edge. Where many samples have one length,
or one padded width, whole strata of them may stand in one another's places, anew in each epoch, at no cost in padding.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from samplers.budget import Integers
from samplers.shuffle import stream_keys


@dataclass(frozen=True, eq=False)
class Ties:
    """Groups of strata that may trade places.

    Attributes:
        group: of each stratum, -1 for one that stays where it is: int64 `[strata]`.
        rank: of each stratum in its group: int64 `[strata]`.
        sizes: strata of each group: int64 `[groups]`.
        starts: where each group begins in `places`: int64 `[groups]`.
        places: where the strata of the groups begin in the order, group after group: int64 `[members]`.
    """

    group: Integers
    rank: Integers
    sizes: Integers
    starts: Integers
    places: Integers

    @classmethod
    def find(cls, places: Integers, samples: Integers, first: Integers, last: Integers) -> Self | None:
        """Group strata that hold one width only, and as many samples.

        Args:
            places: where each stratum begins in the order, int64 `[strata]`.
            samples: of each stratum, 0 for one that must stay.
            first: padded width of each stratum's longest sample.
            last: padded width of its shortest.

        Returns:
            The groups, or None where there are none.
        """
        uniform = np.flatnonzero((first == last) & (samples > 0))
        if not len(uniform):
            return None
        kinds = first[uniform] * (samples.max() + 1) + samples[uniform]
        _, owner, counts = np.unique(kinds, return_inverse=True, return_counts=True)
        # Stable, so that every machine ranks the strata of a group alike.
        by_group = np.argsort(owner, kind="stable")
        starts = counts.cumsum() - counts
        group, rank = np.full(len(places), -1), np.zeros(len(places), np.int64)
        group[uniform] = owner
        rank[uniform[by_group]] = np.arange(len(uniform)) - np.repeat(starts, counts)
        return cls(group, rank, counts, starts, places[uniform[by_group]])

    def move(self, strata: Integers, places: Integers, key: int) -> Integers:
        """Where strata begin in an epoch.

        Args:
            strata: their numbers, int64 `[n]`.
            places: where they begin by themselves, int64 `[n]`.
            key: of the epoch.
        """
        group = self.group[strata]
        moving = np.flatnonzero(group >= 0)
        if not len(moving):
            return places
        group, rank = group[moving], self.rank[strata[moving]]
        factors, shifts = turns(self.sizes, key)
        moved = places.copy()
        moved[moving] = self.places[self.starts[group] + (factors[group] * rank + shifts[group]) % self.sizes[group]]
        return moved


def turns(sizes: Integers, key: int) -> tuple[Integers, Integers]:
    """For each size a factor that shares no divisor with it, and a shift: r -> (factor * r + shift) % size.

    Any two ranks of a prime size come to stand any distance apart, each as likely; of others nearly so.
    """
    numbers = 2 * np.arange(len(sizes))
    factors: Integers = (stream_keys(key, numbers) % np.maximum(sizes, 1).astype(np.uint64)).astype(np.int64)
    shifts: Integers = (stream_keys(key, numbers + 1) % np.maximum(sizes, 1).astype(np.uint64)).astype(np.int64)
    while len(bad := np.flatnonzero(np.gcd(factors, sizes) != 1)):
        factors[bad] = (factors[bad] + 1) % np.maximum(sizes[bad], 2)
    return factors, shifts
