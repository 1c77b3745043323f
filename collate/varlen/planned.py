"""The options by which a packing sampler plans rows, as a collator takes them."""

from collections.abc import Mapping
from typing import Any, NoReturn, Protocol


class PlansRows(Protocol):
    """The options of a sampler by which rows are planned; it may have `max_length`, `rows` and `max_cost` too."""

    @property
    def capacity(self) -> Any:
        """Steps of a row, or one number for each field."""

    @property
    def max_documents(self) -> Any:
        """Documents in a row at most, or None."""

    @property
    def multiple(self) -> Any:
        """Documents take steps up to a multiple of it."""


def planned_options(sampler: PlansRows, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a collator that cuts the planned rows, with those that were given.

    Args:
        sampler: What plans the rows.
        options: What was given for the collator.

    Raises:
        TypeError: The sampler plans no rows.
        ValueError: An option differs from the sampler's, is missing for a field, or the collator could not cut the
            planned rows.
    """
    names = ("capacity", "max_documents", "multiple")
    missing = [name for name in names if not hasattr(sampler, name)]
    if missing:
        raise TypeError(
            f"a {type(sampler).__name__} has no {' and no '.join(missing)}: give a packing sampler; for a "
            "length-bucketing one make the collator with PadCollator.for_sampler"
        )
    _check_rows(sampler, options)
    planned = {"max_documents": sampler.max_documents, "align": sampler.multiple, "arrange": "given"}
    for name in planned.keys() & options.keys():
        if options[name] != planned[name]:
            _refuse_other(name, options[name], planned[name])
    capacity = _by_field("capacity", sampler.capacity, options)
    chosen = {**options, **planned, "capacity": capacity}
    cut = getattr(sampler, "max_length", None)
    if cut is not None:
        chosen["max_length"] = _by_field("max_length", cut, options)
    elif options.get("max_length") is not None and min(_numbers(options["max_length"])) < max(_numbers(capacity)):
        _refuse_other("max_length", options["max_length"], None)
    return chosen


def _check_rows(sampler: PlansRows, options: Mapping[str, Any]) -> None:
    """Refuse what makes other rows whatever the capacity.

    Raises:
        ValueError: There are fewer rows than planned, or rows have a limit of cost, which no collator knows.
    """
    rows = getattr(sampler, "rows", 1)
    if options.get("rows") is not None and options["rows"] < rows:
        _refuse_other("rows", options["rows"], rows)
    if rows > 1 and getattr(sampler, "max_cost", None) is not None:
        raise ValueError(
            f"a sampler of max_cost={sampler.max_cost} must have rows=1, got rows={rows}: a collator does not know "  # type: ignore[attr-defined]
            "costs, and joins two rows that fit in one; give the sampler max_documents in place of max_cost, or rows=1"
        )


def _by_field(name: str, planned: Any, options: Mapping[str, Any]) -> Any:
    """An option that has a number for each field; which field has which, only the collator's mapping says.

    Raises:
        ValueError: It is another one, or none is given for several fields.
    """
    given = options.get(name)
    if given is None and len(set(_numbers(planned))) > 1:
        raise ValueError(
            f"{name} must be given by field, as a mapping, got none: the sampler has {_numbers(planned)} for its fields"
        )
    if given is None:
        return _numbers(planned)[0]
    agrees = sorted(_numbers(given)) == sorted(_numbers(planned))
    if not agrees and (isinstance(given, Mapping) or set(_numbers(given)) != set(_numbers(planned))):
        _refuse_other(name, given, planned)
    return given


def _numbers(option: Any) -> list[int]:
    """The numbers of an option for all fields, or of one for each."""
    if isinstance(option, Mapping):
        return list(option.values())
    return [option] if isinstance(option, int) else [int(number) for number in option]


def _refuse_other(name: str, given: Any, planned: Any) -> NoReturn:
    """Refuse an option that differs.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"{name}={given!r} differs from the sampler's {planned!r}, by which rows are planned: leave it out, or give it "
        "to the sampler"
    )
