"""Planned lengths and the collator's: samples that are planned as cut, and collators that pad or cut otherwise."""

import logging
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from samplers.planning.options import Options
from samplers.planning.sorting import Corpus

_ABSENT: Final = object()

_logger = logging.getLogger(__name__)


def count_longer(corpus: Corpus) -> int:
    """Planned samples that are longer, in any field, than the `max_length` they are planned with.

    Args:
        corpus: from `rank_lengths`: the samples of one field are longest first.
    """
    most = corpus.max_length
    if most is None:
        return 0
    if corpus.fields > 1:
        return int(np.greater(corpus.lengths[corpus.order], most).any(1).sum())
    # The longer samples come first, so that a search by halves finds where they end.
    return bisect_left(range(len(corpus)), -most, key=lambda place: -int(corpus.lengths[corpus.order[place]]))


def warn_of_longer(corpus: Corpus) -> None:
    """Log how many samples are planned as cut, where nobody is known to cut them."""
    longer = count_longer(corpus)
    if longer:
        _logger.warning(
            "%d of %d samples are longer than the sampler's max_length=%d. They are planned as cut, and batches exceed "
            "the budget unless they are cut: make the collator with PadCollator.for_sampler(sampler), or cut the "
            "samples yourself and give the sampler np.minimum(lengths, %d)",
            longer,
            len(corpus),
            corpus.max_length,
            corpus.max_length,
        )


def check_collator(collate_fn: Any, corpus: Corpus, options: Options, fields: Sequence[str]) -> None:
    """Check that a collator cuts and pads samples as they are planned, as far as it says how it does.

    Args:
        collate_fn: any function; a `PadCollator` has `max_length`, `widths` and `shapes`.
        corpus: the planned samples, in any order.
        options: which `max_length` and `widths` they are planned with.
        fields: the names of the K fields.

    Raises:
        ValueError: A sample would have another length in its batch than in the plan, or a batch another width.
    """
    if hasattr(collate_fn, "max_length"):
        _check_cuts(collate_fn.max_length, corpus, options, fields)
    elif options.max_length is not None:
        _warn_of_unknown_cut(corpus, options.max_length)
    if getattr(collate_fn, "shapes", None) is None and hasattr(collate_fn, "widths"):
        _check_widths(collate_fn.widths, options, fields)


def _check_cuts(cuts: Any, corpus: Corpus, options: Options, fields: Sequence[str]) -> None:
    if cuts is None and options.max_length is None:
        return
    for name, longest in zip(fields, _longest(corpus), strict=True):
        cut = _option_of(cuts, name)
        if cut is _ABSENT:
            continue
        planned, collated = (longest if most is None else min(longest, most) for most in (options.max_length, cut))
        if planned != collated:
            raise ValueError(
                f"collate_fn's max_length must be the stream's, got {cut} and {options.max_length}: the longest sample "
                f"of field {name!r} has {longest} steps, is planned with {planned} and would be collated with "
                f"{collated}; give max_length={options.max_length} to both, or {cut} to both"
            )


def _check_widths(widths: Any, options: Options, fields: Sequence[str]) -> None:
    # A multiple of one rounds nothing up, as None does.
    planned = options.allowed_widths or 1
    for name in fields:
        padded = _option_of(widths, name)
        if padded is not _ABSENT and (padded or 1) != planned:
            raise ValueError(
                f"collate_fn's widths must be the stream's, got {padded} and {options.allowed_widths} for field "
                f"{name!r}: batches are planned with the stream's; give the same widths to both"
            )


def _warn_of_unknown_cut(corpus: Corpus, most: int) -> None:
    rows = corpus.lengths[corpus.order]
    longer = int(np.greater(rows.reshape(len(rows), -1), most).any(1).sum())
    if longer:
        _logger.warning(
            "%d of %d samples are longer than the stream's max_length=%d. They are planned as cut, and batches exceed "
            "the budget unless collate_fn cuts them, which it does not say: give a PadCollator(max_length=%d) itself, "
            "or give your function an attribute max_length",
            longer,
            len(corpus),
            most,
            most,
        )


def _longest(corpus: Corpus) -> list[int]:
    """The greatest length of each field of the planned samples, uncut: `[K]`."""
    rows = corpus.lengths[corpus.order]
    longest: list[int] = rows.reshape(len(rows), -1).max(0).tolist()
    return longest


def _option_of(option: Any, name: str) -> Any:
    # A field that a mapping lacks is refused by the collator, with the names of all fields that it has.
    return option.get(name, _ABSENT) if isinstance(option, Mapping) else option
