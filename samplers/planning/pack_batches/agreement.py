"""A collator against the plan of packs: whether it makes the rows that are planned, as far as its attributes tell."""

from collections.abc import Mapping, Sequence
from typing import Any, Final, NoReturn

import numpy as np

from samplers.planning.pack_batches.packed_table import PackedTable

# The value of an option by field that does not name a field.
_ABSENT: Final = object()


def check_packing(collate_fn: Any, table: PackedTable, fields: Sequence[str]) -> None:
    """Check that a collator cuts the planned rows, and cuts documents as they are planned.

    Args:
        collate_fn: Any function; a `VarlenCollator` has `capacity`, `max_documents`, `align`, `arrange`,
            `rows` and `max_length`. Of a function without them nothing is known, and nothing is refused.
        table: The batches.
        fields: Names of the K fields.

    Raises:
        ValueError: Rows would be others than planned.
    """
    if hasattr(collate_fn, "widths") and not hasattr(collate_fn, "capacity"):
        raise ValueError(
            "collate_fn must put several samples into a row where a capacity is given, got a collator that pads each "
            "sample: give a VarlenCollator, or max_tokens in place of capacity"
        )
    if hasattr(collate_fn, "capacity"):
        _check_capacity(collate_fn.capacity, table, fields)
        _check_cut(collate_fn, table)
    if hasattr(collate_fn, "max_length"):
        _check_max_length(collate_fn.max_length, table, fields)


def _check_capacity(collated: Any, table: PackedTable, fields: Sequence[str]) -> None:
    """Refuse rows of another capacity; a batch of one row may be as long as its documents.

    Raises:
        ValueError: They have another.
    """
    planned = table.packs.limits.capacity
    if collated is None and table.options.rows == 1:
        return
    for name, steps in zip(fields, planned, strict=True):
        given = _of_field(collated, name)
        if given is not _ABSENT and given != steps:
            _refuse_other("capacity", given, steps, f" for field {name!r}")


def _check_cut(collate_fn: Any, table: PackedTable) -> None:
    """Refuse what cuts a list into other rows.

    Raises:
        ValueError: An option does.
    """
    options = table.options
    for name, planned in (("max_documents", options.max_documents), ("align", options.multiple)):
        given = getattr(collate_fn, name, planned)
        if given != planned:
            _refuse_other(name, given, planned)
    if options.rows == 1:
        # However it is arranged, a list that fits in one row is one row.
        return
    made = getattr(collate_fn, "rows", None)
    if made is not None and made < options.rows:
        _refuse_other("rows", made, options.rows)
    if getattr(collate_fn, "arrange", "given") != "given":
        _refuse_other("arrange", collate_fn.arrange, "given")
    if options.max_cost is not None:
        raise ValueError(
            f"max_cost must have rows=1 with this collate_fn, got rows={options.rows}: it does not know costs, and "
            "joins two rows that fit in one; give max_documents in place of max_cost, or rows=1"
        )


def _check_max_length(collated: Any, table: PackedTable, fields: Sequence[str]) -> None:
    """Refuse a cut that gives the longest document of a field another length than the plan.

    Raises:
        ValueError: It does.
    """
    cuts = table.max_length or (None,) * len(fields)
    for name, cut, longest in zip(fields, cuts, _longest_steps(table), strict=True):
        given = _of_field(collated, name)
        planned, made = (longest if limit in {None, _ABSENT} else min(longest, limit) for limit in (cut, given))
        if given is not _ABSENT and planned != made:
            raise ValueError(
                f"collate_fn's max_length must be the stream's, got {given} and {cut}: the longest document of field "
                f"{name!r} is planned with {planned} steps and would be collated with {made}; make the collator with "
                f"max_length={cut}, or set overlong='cut'"
            )


def _longest_steps(table: PackedTable) -> list[int]:
    """The largest length of each field, before any cut; of documents that are split or dropped, the capacity: `[K]`."""
    longest: list[int] = (table.longest_units * table.packs.limits.multiple).tolist()
    if table.options.overlong != "cut":
        return longest
    whole: list[int] = np.asarray(table.lengths.reshape(len(table.lengths), -1).max(0), np.int64).tolist()
    return whole


def _of_field(option: Any, name: str) -> Any:
    return option.get(name, _ABSENT) if isinstance(option, Mapping) else option


def _refuse_other(name: str, given: Any, planned: Any, where: str = "") -> NoReturn:
    """Refuse an option that differs.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"collate_fn's {name} must be the stream's, got {given!r} and {planned!r}{where}: rows are planned with the "
        "stream's; give the same to both"
    )
