"""Planned lengths against the collator's: samples that are planned as cut, and collators that cut or pad otherwise."""

import logging
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from samplers.planning.options import Options
from samplers.planning.sorting import SortedLengths

# What an option by field has for a field that it does not name.
_ABSENT: Final = object()

_logger = logging.getLogger(__name__)


def count_longer(sorted_lengths: SortedLengths) -> int:
    """Planned samples that are longer, in any field, than the `max_length` with which they are planned.

    Args:
        sorted_lengths: From `sort_lengths`: the samples of one field are longest first.
    """
    max_length = sorted_lengths.max_length
    if max_length is None:
        return 0
    lengths, order = sorted_lengths.lengths, sorted_lengths.order
    if sorted_lengths.fields > 1:
        return int(np.greater(lengths[order], max_length).any(1).sum())
    # The longer samples come first: bisect for their end.
    return bisect_left(range(len(order)), -max_length, key=lambda i: -int(lengths[order[i]]))


def warn_of_longer(sorted_lengths: SortedLengths) -> None:
    """Log how many samples are planned as cut, where no collator is known to cut them."""
    longer = count_longer(sorted_lengths)
    if longer:
        _logger.warning(
            "%d of %d samples are longer than the sampler's max_length=%d. They are planned as cut, and batches exceed "
            "the budget unless they are cut: make the collator with PadCollator.for_sampler(sampler), or cut the "
            "samples yourself and give the sampler np.minimum(lengths, %d)",
            longer,
            len(sorted_lengths),
            sorted_lengths.max_length,
            sorted_lengths.max_length,
        )


def check_collator(collate_fn: Any, sorted_lengths: SortedLengths, options: Options, fields: Sequence[str]) -> None:
    """Check that a collator cuts and pads samples as they are planned, as far as its attributes tell.

    Args:
        collate_fn: Any function; a `PadCollator` has `max_length`, `widths` and `shapes`.
        sorted_lengths: The planned samples.
        options: The `max_length` and `widths` with which they are planned.
        fields: Names of the K fields.

    Raises:
        ValueError: A sample would have another length in its batch than in the plan, or a batch another width.
    """
    if hasattr(collate_fn, "max_length"):
        _check_cuts(collate_fn.max_length, sorted_lengths, options, fields)
    elif options.max_length is not None:
        _warn_of_unknown_cut(sorted_lengths, options.max_length)
    if getattr(collate_fn, "shapes", None) is None and hasattr(collate_fn, "widths"):
        _check_collator_widths(collate_fn.widths, options, fields)


def _check_cuts(collator_cut: Any, sorted_lengths: SortedLengths, options: Options, fields: Sequence[str]) -> None:
    """Refuse a collator whose `max_length` gives the longest sample of a field another length than the plan.

    Raises:
        ValueError: It does.
    """
    if collator_cut is None and options.max_length is None:
        return
    for name, longest in zip(fields, _find_longest(sorted_lengths), strict=True):
        cut = _option_for(collator_cut, name)
        if cut is _ABSENT:
            continue
        planned, collated = (longest if limit is None else min(longest, limit) for limit in (options.max_length, cut))
        if planned != collated:
            raise ValueError(
                f"collate_fn's max_length must be the stream's, got {cut} and {options.max_length}: the longest sample "
                f"of field {name!r} has {longest} steps, is planned with {planned} and would be collated with "
                f"{collated}; give max_length={options.max_length} to both, or {cut} to both"
            )


def _check_collator_widths(widths: Any, options: Options, fields: Sequence[str]) -> None:
    """Refuse a collator that rounds widths up otherwise than the plan.

    Raises:
        ValueError: It does.
    """
    # A multiple of one rounds nothing up, just like None.
    planned = options.allowed_widths or 1
    for name in fields:
        collated = _option_for(widths, name)
        if collated is not _ABSENT and (collated or 1) != planned:
            raise ValueError(
                f"collate_fn's widths must be the stream's, got {collated} and {options.allowed_widths} for field "
                f"{name!r}: batches are planned with the stream's; give the same widths to both"
            )


def _warn_of_unknown_cut(sorted_lengths: SortedLengths, max_length: int) -> None:
    """Log how many samples are planned as cut, where the collator does not tell whether it cuts them."""
    lengths = sorted_lengths.lengths[sorted_lengths.order]
    longer = int(np.greater(lengths.reshape(len(lengths), -1), max_length).any(1).sum())
    if longer:
        _logger.warning(
            "%d of %d samples are longer than the stream's max_length=%d. They are planned as cut, and batches exceed "
            "the budget unless collate_fn cuts them, which it does not say: give a PadCollator(max_length=%d) itself, "
            "or give your function an attribute max_length",
            longer,
            len(sorted_lengths),
            max_length,
            max_length,
        )


def _find_longest(sorted_lengths: SortedLengths) -> list[int]:
    """The largest length of each field of the planned samples, before any cut: `[K]`."""
    lengths = sorted_lengths.lengths[sorted_lengths.order]
    longest: list[int] = lengths.reshape(len(lengths), -1).max(0).tolist()
    return longest


def _option_for(option: Any, name: str) -> Any:
    """A collator's option for one field."""
    # The collator itself refuses a field that its mapping lacks, and names all fields that it has.
    return option.get(name, _ABSENT) if isinstance(option, Mapping) else option
