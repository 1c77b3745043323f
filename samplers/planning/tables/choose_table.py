"""Lengths to the batches of any epoch: which kind of layout a corpus has."""

from samplers.planning.options import Options
from samplers.planning.sorting import Lengths, rank_lengths
from samplers.planning.tables.batch_table import Layout, in_order
from samplers.planning.tables.buckets import cut_turns
from samplers.planning.tables.pool_table import lay_out_chunks


def lay_out(lengths: Lengths, options: Options) -> Layout:
    """Sort the lengths and cut the batch edges, once for all epochs.

    Raises:
        TypeError: Lengths or indices are not integers.
        LengthError: A length is negative, above every allowed width, or over the budget with `overlong="error"`.
        ValueError: Lengths have the wrong shape, or no batch is left to plan.
    """
    corpus = rank_lengths(lengths, options)
    small = lay_out_chunks(corpus, options)
    if small is not None:
        return small
    first, *others = (tuple(in_order(edges, options)) for edges in cut_turns(corpus, options))
    layout = Layout(corpus, first, options, turns=tuple(Layout(corpus, edges, options) for edges in others))
    if not first or len(layout) == 0:
        raise ValueError(
            f"no batch is left to plan: drop_last drops all {len(corpus)} samples, fewer than "
            f"batch_size={options.batch_size}; lower batch_size or keep the last batch"
        )
    return layout
