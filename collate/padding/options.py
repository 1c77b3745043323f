"""Options that say how to pad, for all fields or for each: widths, shapes, `max_length`."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np

from collate.widths import PaddedShape, check_count

Option = TypeVar("Option")
Checked = TypeVar("Checked")


def option_of(option: Option | Mapping[str, Option], name: str) -> Option:
    """The value of an option for one field."""
    # isinstance(option, Mapping) takes longer for an int than all the rest.
    if option is None or type(option) is int:
        return option
    return option[name] if isinstance(option, Mapping) else option


def each_checked(
    option: Option | Mapping[str, Option], check: Callable[[Option], Checked]
) -> Checked | Mapping[str, Checked]:
    """Check an option, or each field's."""
    if isinstance(option, Mapping):
        return {name: check(value) for name, value in option.items()}
    return check(option)


def check_max_length(steps: int | None) -> int | None:
    """Check a `max_length` option.

    Raises:
        TypeError: It is not an int.
        ValueError: It is below one.
    """
    if steps is None:
        return None
    return check_count("max_length", steps, least=1, hint="give the time steps to keep, or None to keep all")


def check_shape_list(shapes: Sequence[PaddedShape]) -> list[PaddedShape]:
    """Check a `shapes` option, and sort it by size: the first that holds a batch then has the least padding.

    >>> check_shape_list([(4, 32), [8, (4, 8)]])
    [(8, (4, 8)), (4, 32)]

    Raises:
        TypeError: A number is not an int.
        ValueError: There is no shape, one is not a pair, or a number is below one.
    """
    if len(shapes) == 0:
        raise ValueError("shapes must name at least one (rows, width), got none; None pads to the longest row")
    return sorted(map(_check_shape, shapes), key=lambda shape: shape[0] * int(np.sum(shape[1])))


def field_widths(shape: PaddedShape, fields: Sequence[str]) -> dict[str, int]:
    """The width of each field in a shape: its own, or the one for all.

    >>> field_widths((8, 16), ["tokens", "tags"]), field_widths((8, (16, 4)), ["tokens", "tags"])
    ({'tokens': 16, 'tags': 16}, {'tokens': 16, 'tags': 4})

    Raises:
        ValueError: The shape has another number of widths.
    """
    width = shape[1]
    if isinstance(width, tuple) and len(width) != len(fields):
        raise ValueError(
            f"the shape {shape} has {len(width)} widths, the variable-length fields are {sorted(fields)}: give one "
            "width for each, or one for all"
        )
    widths = width if isinstance(width, tuple) else (width,) * len(fields)
    return dict(zip(fields, widths, strict=True))


def _check_shape(shape: PaddedShape) -> PaddedShape:
    """A pair of Python ints, also if the shape comes from JSON, which has lists for tuples.

    Raises:
        TypeError: A number is not an int.
        ValueError: It is no pair, or a number is below one.
    """
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise ValueError(f"shapes must be pairs (rows, width), got {shape!r}")
    rows, width = shape
    hint = f"shapes are pairs (rows, width) of ints, got {(rows, width)!r}"
    if isinstance(width, (tuple, list)):
        widths = tuple(check_count("a width of shapes", entry, least=1, hint=hint) for entry in width)
        # A sampler of one field gives `(rows, (width,))`: one width is for all fields, however many there are.
        return check_count("rows of shapes", rows, least=1, hint=hint), widths[0] if len(widths) == 1 else widths
    return (
        check_count("rows of shapes", rows, least=1, hint=hint),
        check_count("a width of shapes", width, least=1, hint=hint),
    )
