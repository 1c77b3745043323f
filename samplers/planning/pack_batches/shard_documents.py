"""ShardDocuments: the documents of a corpus in shards, with length classes that all of its windows share.

One pass over the lengths finds the classes. After that a window is known by how many documents it has of each class,
and nothing is sorted or searched again until its rows are due. Twelve samples in four shards of three:

>>> lengths = np.array([7, 3, 5, 2, 2, 9, 4, 1, 6, 3, 8, 5])
>>> documents = make_shard_documents(lengths, np.arange(0, 13, 3), PackOptions(capacity=16), None)
>>> documents.counts.tolist(), documents.prove((0, 2)), documents.prove((1, 3))
([3, 3, 3, 3], Proof(rows=2, rung=15), Proof(rows=2, rung=15))
>>> table = documents.table((1, 3), rows=2, proof=documents.prove((1, 3)))
>>> samples, sizes = table.rows(0, np.arange(2))
>>> [lengths[row].tolist() for row in np.split(samples, sizes.cumsum()[:-1])]
[[9, 2, 2], [8, 5, 3]]
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from samplers.planning.budget import Integers
from samplers.planning.pack_batches.options import PackOptions
from samplers.planning.pack_batches.packed_table import build_packs
from samplers.planning.packs.ladder import LADDER, Rung
from samplers.planning.packs.length_classes import LengthClasses
from samplers.planning.packs.pack_table import PackTable, make_task
from samplers.planning.packs.row_count import Proof, RowPlan, prove_rows


@dataclass(frozen=True, eq=False)
class ShardDocuments:
    """All documents, shard after shard.

    Attributes:
        packs: The classes, the limits and the rungs of the whole corpus, without its documents.
        class_of: The class of each document, unsigned integers `[M]`.
        samples: The sample index of each, int64 `[M]`; None where document i is sample i.
        starts: The first document of each shard, then M: int64 `[shards + 1]`.
    """

    packs: PackTable
    class_of: npt.NDArray[np.unsignedinteger]
    samples: Integers | None
    starts: Integers

    @property
    def counts(self) -> Integers:
        """Documents of each shard, int64 `[shards]`."""
        return np.diff(self.starts)

    @property
    def has_several_limits(self) -> bool:
        """Whether rows have other limits than one capacity."""
        limits = self.packs.limits
        return len(limits.capacity) > 1 or limits.max_documents is not None or limits.max_cost is not None

    def prove(self, shards: Sequence[int]) -> Proof:
        """A number of rows that holds the documents of these shards."""
        classes = np.concatenate([self.class_of[slice(*self.starts[shard : shard + 2])] for shard in shards])
        return prove_rows(make_task(self._classes(classes), self.packs.limits), self.packs.plan, self._bound)

    def table(self, shards: Sequence[int], *, rows: int, proof: Proof) -> PackTable:
        """The rows of these shards.

        Args:
            shards: Which.
            rows: In every epoch: at least those of the proof, and at most as many as documents.
            proof: What `prove` gave.
        """
        chosen = np.concatenate([np.arange(*self.starts[shard : shard + 2]) for shard in shards])
        classes = self.class_of[chosen]
        order = np.argsort(classes, kind="stable").astype(np.int32)
        return replace(
            self.packs,
            classes=self._classes(classes, order),
            samples=chosen if self.samples is None else self.samples[chosen],
            plan=RowPlan(rows, self._rungs, proof),
            _recipes={},
        )

    def _classes(self, classes: Integers, order: npt.NDArray[np.int32] | None = None) -> LengthClasses:
        """The classes that some documents have; `order` sorts the documents by them."""
        counts = np.bincount(classes, minlength=len(self.packs.classes.counts))
        present = np.flatnonzero(counts)
        counts = counts[present]
        # `tokens` and `rows` stay those of the corpus: nothing reads those of a window.
        return replace(
            self.packs.classes,
            units=self.packs.classes.units[present],
            counts=counts,
            starts=np.cumsum(counts) - counts,
            order=self.packs.classes.order if order is None else order,
        )

    @cached_property
    def _bound(self) -> int:
        return make_task(self.packs.classes, self.packs.limits).bound

    @cached_property
    def _rungs(self) -> tuple[Rung, ...]:
        """The rungs of the corpus, and some further down: in a window with fewer rows, more attempts fail."""
        first = LADDER.index(self.packs.plan.rungs[0])
        further = (LADDER[min(first + number, len(LADDER) - 1)] for number in (3, 6, 10))
        return tuple(dict.fromkeys((*self.packs.plan.rungs, *further)))


def make_shard_documents(
    lengths: npt.NDArray[Any], shard_starts: Integers, options: PackOptions, indices: Integers | None
) -> ShardDocuments:
    """Sort the documents of a corpus into classes; the errors are those of `PackTable.build`.

    Args:
        lengths: Of all samples, in the order of their shards: integers `[N]` or `[N, K]`.
        shard_starts: Index of each shard's first sample, then N: int64 `[shards + 1]`.
        options: The planner's.
        indices: The samples that take part, ascending; None for all.
    """
    packs = build_packs(lengths, options, indices)
    classes, samples = packs.classes, packs.samples
    by_start = np.argsort(classes.starts)
    class_of = np.empty(len(classes.order), np.min_scalar_type(len(by_start)))
    class_of[classes.order] = np.repeat(by_start, classes.counts[by_start])
    packs = replace(packs, classes=replace(classes, order=np.empty(0, np.int32)), samples=None, _recipes={})
    owners = np.arange(len(class_of)) if samples is None else samples
    if samples is not None and packs.pieces is not None:
        # Pieces stand behind all samples: they go to the shard of theirs.
        is_piece = samples >= len(lengths)
        owners = samples.copy()
        owners[is_piece] = packs.pieces.samples[samples[is_piece] - len(lengths)]
        order = np.argsort(owners, kind="stable")
        owners, samples, class_of = owners[order], samples[order], class_of[order]
    return ShardDocuments(packs, class_of, samples, np.searchsorted(owners, shard_starts))
