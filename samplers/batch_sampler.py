"""LengthBucketBatchSampler: batches of similar lengths for a `DataLoader`, for any number of replicas."""

from typing import Literal, Unpack

from samplers.planning.clipping import warn_of_longer
from samplers.planning.options import PlanOptions, make_options
from samplers.planning.sorting import Lengths
from samplers.planning.tables.batch_table import BatchTable
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
            array or a memory map, or an index that holds them.
        max_tokens: Tokens in a batch at most, counted as `count_tokens` says. This, `batch_size` or `cost` must be
            given; a batch holds all limits that are.
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
        num_replicas: W; None takes the initialised process group's size, or 1.
        rank: Rank of this process; None takes the process group's, or 0. `"all"` gives the batches of all replicas,
            step by step, to a loader that deals them itself, as accelerate's `prepare` does: batch i goes to replica
            i % W.

    Raises:
        TypeError: Lengths or an option have the wrong type, or an option is unknown.
        LengthError: A length is negative, above every allowed width, or over the budget with `overlong="error"`.
        ValueError: An option is out of its range, no budget is given, no batch is left to plan, or the last step has
            fewer rows than replicas.
        RuntimeError: A launcher started several processes, and their process group is not initialised; or accelerate
            may split the batches a second time.

    Example:
        >>> sampler = LengthBucketBatchSampler([3, 9, 4, 8, 3], max_tokens=20, shuffle=False)
        >>> list(sampler), sampler.epoch
        ([[1, 3], [2, 0, 4]], 1)
    """

    _table: BatchTable

    def __init__(
        self,
        lengths: Lengths,
        *,
        num_replicas: int | None = None,
        rank: int | Literal["all"] | None = None,
        **options: Unpack[PlanOptions],
    ) -> None:
        self.options = make_options(options)
        super().__init__(lengths, choose_table(lengths, self.options), num_replicas, rank)
        self._is_cut_known = self.options.max_length is None

    def acknowledge_max_length(self) -> None:
        """Say that longer samples are cut to `max_length`, so that no warning is logged.

        `PadCollator.for_sampler` calls it; call it if a function of your own cuts them.
        """
        self._is_cut_known = True

    def _note_start(self) -> None:
        """Log how many samples are longer than `max_length`, unless that is known or was logged."""
        if not self._is_cut_known:
            warn_of_longer(self._table.sorted_lengths)
            self._is_cut_known = True
