"""The batch samplers for a `DataLoader`, for any number of replicas: batches of similar lengths, and full rows."""

from collections.abc import Sequence
from typing import Literal, Unpack

from samplers.planning.mixtures.bucketed import make_bucket_mixture
from samplers.planning.mixtures.mixture import Mixture
from samplers.planning.mixtures.packed import make_pack_mixture
from samplers.planning.options import PlanOptions, check_epoch, make_options
from samplers.planning.pack_batches.options import PackingOptions, PackOptions, make_pack_options
from samplers.planning.pack_batches.packed_table import PackedTable
from samplers.planning.pack_batches.plan import PackPlan, rows_of_steps
from samplers.planning.pack_batches.table import pack_batches
from samplers.planning.packs.documents import Pieces
from samplers.planning.schedules.updates import RowsOf
from samplers.planning.sorting import Lengths
from samplers.planning.tables.batch_table import BatchTable
from samplers.planning.tables.clipping import warn_of_longer
from samplers.planning.tables.pool_table import choose_table
from samplers.progress.loader import BucketLoader
from samplers.progress.planned_sampler import PlannedBatchSampler


class LengthBucketBatchSampler(BucketLoader, PlannedBatchSampler):
    """Batches of samples of similar length, each sample once an epoch: a `batch_sampler` of lists of Python ints.

    All replicas take the same number of batches in every epoch. The epoch advances by itself when an iterator takes its
    first batch. The state is in the iterators, whose `state_dict` and `load_state_dict` a `StatefulDataLoader` uses;
    for any other loader `position` and `seek` do the same.

    Args:
        lengths: Lengths of all samples, in time steps: integers `[N]`, or `[N, K]` for samples of K fields; a list, an
            array or a memory map, or an index that holds them; or a `Mixture` of several sources.
        max_tokens: Tokens in a batch at most, counted as `count_tokens` says. This, `batch_size` or `cost` must be
            given; a batch keeps all limits that are given.
        batch_size: Rows in a batch at most.
        cost: A custom cost function: a batch fits if `cost(rows, width) <= 1`. It is called with int64 arrays `[n]`
            (`width` is `[n, K]` for K fields), returns `[n]` numbers, and must not fall as rows or width grow.
        count_tokens: `"padded"` (default): `max_tokens` limits rows x padded width, summed over fields. `"real"`: it
            limits the sum of lengths, for training without padding.
        window: Samples that are sorted by length together. More samples give less padding, and more pairs that share a
            batch again in the next epoch. It is rounded so that windows are even. There are at least two windows: with
            one, all epochs would have the same batches. None (default) chooses from the number of batches.
        shuffle: False for batches in the order of length, longest first, the same each epoch. Default True.
        seed: Seed of the shuffles, 0 to 2**64 - 1. Default 0.
        min_length: Shorter samples are left out and counted (with several fields: if any field is shorter). Default 0.
        max_length: Longer samples count as this long; the collator's `max_length` cuts them. Make the collator with
            `PadCollator.for_sampler(sampler)`, and both have the same; otherwise the first iteration logs a warning
            with the number of longer samples. Default None.
        overlong: What happens to a sample that alone exceeds the budget: `"error"` (default), `"drop"` (left out and
            counted) or `"alone"` (a batch of one row, counted).
        drop_last: Drop the last, partial step, and the batch that `batch_size` leaves short, instead of splitting the
            rows of that step among the replicas. Default False.
        widths: Padded widths, as the collator's: a multiple, or the allowed widths; None (default) pads to the longest
            row. The collator must have the same, as one from `PadCollator.for_sampler(sampler)` has.
        indices: Plan these samples only; None (default) plans all.
        num_replicas: W; None takes the initialised process group's size, the number of SLURM's tasks, or 1.
        rank: Rank of this process; None takes the group's or task's, or 0. `"all"` gives the batches of all replicas,
            step by step, to a loader that deals them itself, as accelerate's `prepare` does: batch i goes to replica
            i % W.

    Raises:
        TypeError: Lengths or an option have the wrong type, or an option is unknown.
        LengthError: A length is negative, above every allowed width, or over the budget with `overlong="error"`.
        ValueError: An option is out of its range, no budget is given, no batch is left to plan, or the last step has
            fewer rows than replicas.
        RuntimeError: A launcher started several processes, and their process group is not initialised; or accelerate
            may split the batches a second time.

    Examples:
        >>> sampler = LengthBucketBatchSampler([3, 9, 4, 8, 3], max_tokens=20, shuffle=False)
        >>> list(sampler), sampler.epoch
        ([[1, 3], [2, 0, 4]], 1)
    """

    _table: BatchTable

    def __init__(
        self,
        lengths: Lengths | Mixture,
        *,
        num_replicas: int | None = None,
        rank: int | Literal["all"] | None = None,
        **options: Unpack[PlanOptions],
    ) -> None:
        self.options = make_options(options)
        super().__init__(lengths, num_replicas, rank)
        self._is_cut_known = self.options.max_length is None

    def acknowledge_max_length(self) -> None:
        """Say that longer samples are cut to `max_length`, so that no warning is logged.

        `PadCollator.for_sampler` calls it; call it if your own function cuts them.
        """
        self._is_cut_known = True

    def _note_start(self) -> None:
        """Log how many samples are longer than `max_length`, unless that is known or was logged."""
        if not self._is_cut_known:
            for part in self._table.parts:
                warn_of_longer(part)
            self._is_cut_known = True

    def _make_table(self, lengths: Lengths | Mixture) -> BatchTable:
        """The batches of any epoch of these lengths, with this sampler's options."""
        if isinstance(lengths, Mixture):
            return make_bucket_mixture(lengths, self.options, self.num_replicas)
        return choose_table(lengths, self.options)


class PackingBatchSampler(PlannedBatchSampler):
    """Batches of full rows, each sample once an epoch: a `batch_sampler` of lists of Python ints, in row order.

    Rows are planned again in each epoch, always equally many, and hold other neighbours each time. A collator cuts a
    batch's list into the planned rows by `capacity` and `max_documents` alone: `VarlenCollator.for_sampler(sampler)`
    makes one that has the same.

    All replicas take the same number of batches in every epoch. The epoch advances by itself when an iterator takes its
    first batch. The state is in the iterators, whose `state_dict` and `load_state_dict` a `StatefulDataLoader` uses;
    for any other loader `position` and `seek` do the same.

    Args:
        lengths: Lengths of all samples, in time steps: integers `[N]`, or `[N, K]` for samples of K fields; a list, an
            array or a memory map, or an index that holds them; or a `Mixture` of several sources.
        capacity: Time steps that a row holds; one number for each of several fields.
        rows: Rows of a batch. Where two rows of a batch fit in one, they may become one. Default 1.
        multiple: Documents take steps up to a multiple of it, as the collator's `align`; `capacity` must be one.
            Default 1.
        max_documents: Documents in a row at most. None (default) is no limit.
        cost: Cost of documents, `cost(lengths)` -> `[n]` numbers from 0, which must not fall with the length. It is
            called with lengths rounded up to `multiple`, int64 `[n]` (`[n, K]` for K fields). Rows of like cost form a
            step, so that replicas finish together. None (default) shuffles all rows.
        max_cost: Sum of the costs of a row's documents at most; a batch costs at most `rows` times as much. A collator
            does not know costs: with several rows in a batch it may join two that are short, but fit the capacity.
        overlong: What happens to a document that does not fit in a row alone: `"error"` (default), `"drop"` (left out
            and counted), `"cut"` (planned with `max_length` steps; the collator must cut it) or `"split"` (into pieces
            that fit, see `pieces`).
        shuffle: False for the same rows in each epoch. Default True.
        seed: Seed of the shuffles, 0 to 2**64 - 1; the number of rows does not depend on it. Default 0.
        min_length: Shorter samples are left out and counted (with several fields: if any field is shorter). Default 0.
        drop_last: Drop the rows that do not fill a step, others in each epoch, instead of sharing their documents among
            the replicas. Default False.
        indices: Plan these samples only; None (default) plans all.
        num_replicas: W; None takes the initialised process group's size, the number of SLURM's tasks, or 1.
        rank: Rank of this process; None takes the group's or task's, or 0. `"all"` gives the batches of all replicas,
            step by step, to a loader that deals them itself, as accelerate's `prepare` does: batch i goes to replica
            i % W.

    Raises:
        TypeError: Lengths or an option have the wrong type, `capacity` is missing, or an option is unknown.
        LengthError: A length is negative or above 2**40, or a document does not fit in a row, with `overlong="error"`.
        ValueError: An option is out of its range, no sample is left to plan, or the last rows have fewer documents than
            replicas.
        RuntimeError: A launcher started several processes, and their process group is not initialised; or accelerate
            may split the batches a second time.

    Examples:
        >>> sampler = PackingBatchSampler([3, 9, 4, 8, 3, 2], capacity=10, shuffle=False)
        >>> list(sampler), sampler.epoch
        ([[1], [2, 0, 4], [3, 5]], 1)
    """

    options: PackOptions
    _table: PackedTable

    def __init__(
        self,
        lengths: Lengths | Mixture,
        *,
        num_replicas: int | None = None,
        rank: int | Literal["all"] | None = None,
        **options: Unpack[PackingOptions],
    ) -> None:
        self.options = make_pack_options(options)
        super().__init__(lengths, num_replicas, rank)

    @property
    def capacity(self) -> int | Sequence[int]:
        """Time steps that a row holds, as given."""
        return self.options.capacity

    @property
    def max_documents(self) -> int | None:
        """Documents in a row at most, as given."""
        return self.options.max_documents

    @property
    def multiple(self) -> int:
        """Documents take steps up to a multiple of it, as given."""
        return self.options.multiple

    @property
    def rows(self) -> int:
        """Rows of a batch, as given."""
        return self.options.rows

    @property
    def max_cost(self) -> float | None:
        """Sum of the costs of a row's documents at most, as given."""
        return self.options.max_cost

    @property
    def max_length(self) -> int | tuple[int, ...] | None:
        """With `overlong="cut"`, the steps to which the collator must cut documents: one number for each field."""
        cut = self._table.max_length
        return cut[0] if cut is not None and len(cut) == 1 else cut

    @property
    def pieces(self) -> Pieces | None:
        """The pieces of samples that `overlong="split"` splits: piece j has the index N + j; None if there are none.

        `SplitDataset(dataset, sampler.pieces)` resolves such indices, and so does `ShardDataset.with_pieces`.
        """
        return self._table.pieces

    def plan(self, epoch: int) -> PackPlan:
        """All batches of an epoch, over all replicas.

        Raises:
            TypeError: The epoch is not an int.
            ValueError: The epoch is negative.
        """
        return PackPlan(self._table, check_epoch(epoch), self.num_replicas)

    def _rows_of(self) -> RowsOf:
        return rows_of_steps

    def _make_table(self, lengths: Lengths | Mixture) -> PackedTable:
        """The batches of any epoch of these lengths, with this sampler's options."""
        if isinstance(lengths, Mixture):
            return make_pack_mixture(lengths, self.options, self.num_replicas)
        return pack_batches(lengths, self.options)
