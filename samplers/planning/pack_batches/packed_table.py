"""PackedTable: what all tables of packed batches have in common, wherever their rows come from."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from samplers.planning.budget import Integers
from samplers.planning.options import check_indices
from samplers.planning.pack_batches.cut_rows import arrange_rows
from samplers.planning.pack_batches.options import PackOptions
from samplers.planning.packs.documents import Pieces, longest_units, to_units
from samplers.planning.packs.pack_table import PackTable
from samplers.planning.packs.row_order import share_rows
from samplers.planning.sorting import IndexArray, digest_lengths
from samplers.planning.tables.epoch_table import KeptEpochs, Shape


class BatchRows(NamedTuple):
    """Rows of batches: samples `[n]`, documents of each row `[R]`, rows of each batch `[B]`."""

    samples: Integers
    documents: Integers
    rows: Integers

    @property
    def sizes(self) -> Integers:
        """Documents of each batch, int64 `[B]`."""
        return np.add.reduceat(self.documents, np.cumsum(self.rows) - self.rows)


@dataclass(frozen=True, eq=False)
class PackedTable(KeptEpochs):
    """Batches of rows of packs.

    Attributes:
        packs: All documents in length classes, with their limits.
        lengths: Of all samples, as given: integers `[N]` or `[N, K]`.
        options: The planner's.
        too_short: Samples that `min_length` leaves out.
    """

    packs: PackTable
    lengths: npt.NDArray[Any]
    options: PackOptions
    too_short: int = 0

    item: ClassVar[str] = "document"

    @abstractmethod
    def rows_of_batches(self, batch_ids: Integers) -> BatchRows:
        """The rows of these batches, int64 `[n]`, at least one, in the order in which a collator cuts them."""

    @property
    def planned(self) -> int:
        """Documents in an epoch."""
        return int(self.packs.classes.counts.sum())

    @property
    def dataset_size(self) -> int:
        """Samples in the dataset, and pieces of split ones, whose indices follow."""
        return len(self.lengths) + (0 if self.pieces is None else len(self.pieces.samples))

    def count_dropped(self, documents: int) -> int:
        """Documents of an epoch that `drop_last` leaves out, if it gives this many."""
        return self.planned - documents

    @property
    def dropped(self) -> int:
        """Samples that `overlong="drop"` leaves out."""
        return self.packs.dropped

    @property
    def longest_units(self) -> Integers:
        """The longest document in each field, in units of `multiple`: int64 `[K]`."""
        longest: Integers = self.packs.classes.units.max(0)
        return longest

    @property
    def pieces(self) -> Pieces | None:
        """Pieces of split samples, or None."""
        return self.packs.pieces

    @property
    def lengths_digest(self) -> str:
        """Sixteen hexadecimal digits that change when a length changes."""
        return digest_lengths(self.lengths)

    @cached_property
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change when the rows or the choice of samples change."""
        options = self.options
        text = repr((self.packs.digest, options.rows, options.drop_last, options.overlong, options.min_length))
        chosen = b""
        if options.indices is not None:
            chosen = check_indices(options.indices, len(self.lengths)).astype("<i8").tobytes()
        return blake2b(text.encode() + chosen, digest_size=8).hexdigest()

    @property
    def shapes(self) -> list[Shape]:
        """The one shape of all batches: rows, and the capacity of each field."""
        return [(self.options.rows, self.packs.limits.capacity)]

    def batch_rows(self, batch_ids: Integers) -> Integers:
        """Documents of these batches: int64 `[n]`."""
        return self.rows_of_batches(batch_ids).sizes if len(batch_ids) else batch_ids

    def batch_samples(self, batch_ids: Integers, key: int) -> tuple[IndexArray, Integers]:
        """The documents of these batches, row after row.

        Args:
            batch_ids: int64 `[n]`, each in `range(len(table))`.
            key: Not used: the order of rows has the keys of the epoch.

        Returns:
            Sample indices `[documents]`, and the documents of each batch, int64 `[n]`.
        """
        del key
        if len(batch_ids) == 0:
            return batch_ids, batch_ids
        batches = self.rows_of_batches(batch_ids)
        return batches.samples, batches.sizes

    def share_batches(self, batch_ids: Integers, key: int, num_replicas: int) -> list[IndexArray]:
        """The documents of the last rows, split into a piece for each replica."""
        del key
        return [share.samples for share in self.share_rows_of(batch_ids, num_replicas)]

    def share_rows_of(self, batch_ids: Integers, num_replicas: int) -> list[BatchRows]:
        """The rows of these batches, shared between replicas so that each has a document."""
        batches = self.rows_of_batches(batch_ids)
        rows = np.split(batches.samples, np.cumsum(batches.documents)[:-1])
        units = [to_units(self.sample_lengths(row), self.options.multiple) for row in rows]
        shares = share_rows(rows, units, self.packs.limits, num_replicas)
        return [
            self.arrange(
                BatchRows(np.concatenate(share), np.array([len(row) for row in share]), np.array([len(share)]))
            )
            for share in shares
        ]

    def sample_lengths(self, samples: IndexArray) -> Integers:
        """The steps of documents as planned, cut where they are cut: int64 `[n, K]`."""
        whole = np.minimum(samples, len(self.lengths) - 1)
        steps: Integers = self.lengths[whole].astype(np.int64).reshape(len(samples), -1)
        if self.pieces is not None:
            is_piece = samples >= len(self.lengths)
            numbers = samples[is_piece] - len(self.lengths)
            steps[is_piece, 0] = self.pieces.stops[numbers] - self.pieces.starts[numbers]
        return steps if self.max_length is None else np.minimum(steps, np.array(self.max_length))

    @cached_property
    def max_length(self) -> tuple[int, ...] | None:
        """With `overlong="cut"`, the steps that a document has at most in each field."""
        if self.options.overlong != "cut":
            return None
        limits = self.packs.limits
        return (longest_units(limits) * limits.multiple,) if len(limits.capacity) == 1 else limits.capacity

    def arrange(self, batches: BatchRows) -> BatchRows:
        """The same rows in the order from which a collator cuts them.

        It depends on nothing but the batch: a short batch of one row has the same order alone and among others.
        """
        if self.options.rows == 1 and (batches.rows == 1).all():
            return batches
        # A collator counts no step for a document without any, which is planned with one.
        steps = self.sample_lengths(batches.samples)
        sizes = -(-steps // self.options.multiple) * self.options.multiple
        return BatchRows(*arrange_rows(*batches, sizes, self.packs.limits))


def choose_samples(lengths: npt.NDArray[Any], options: PackOptions) -> tuple[Integers | None, int]:
    """The samples that are chosen and long enough, int64 `[n]` or None for all, and how many are too short.

    Raises:
        TypeError: Indices are not integers.
        ValueError: Indices are out of range, or no sample is long enough.
    """
    indices = None if options.indices is None else check_indices(options.indices, len(lengths))
    if not options.min_length:
        return indices, 0
    chosen = np.arange(len(lengths)) if indices is None else indices
    rows = lengths[chosen].reshape(len(chosen), -1)
    samples = chosen[np.greater_equal(rows, options.min_length).all(1)]
    too_short = len(chosen) - len(samples)
    if len(samples) == 0:
        raise ValueError(
            f"no sample is left to plan: min_length={options.min_length} leaves out {too_short}; lower min_length"
        )
    return samples, too_short


def build_packs(
    lengths: npt.NDArray[Any], options: PackOptions, indices: Integers | None, *, is_brief: bool = False
) -> PackTable:
    """The rows of these samples; the arguments and errors are those of `PackTable.build`."""
    return PackTable.build(
        lengths,
        capacity=options.capacity,
        multiple=options.multiple,
        max_documents=options.max_documents,
        cost=options.cost,
        max_cost=options.max_cost,
        overlong=options.overlong,
        seed=options.seed,
        shuffle=options.shuffle,
        indices=indices,
        is_brief=is_brief,
    )
