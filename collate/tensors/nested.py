"""Nested containers: samples taken apart into named fields and put together again, and one walker over parts.

A field's name is its key or index, joined by dots where samples are nested; a sample without structure is the one
field `""`:

>>> fields = columns_of([{"x": 1, "y": (2, 3)}, {"x": 4, "y": (5, 6)}])
>>> fields
{'x': [1, 4], 'y.0': [2, 5], 'y.1': [3, 6]}
>>> assemble({"x": 1, "y": (2, 3)}, {name: sum(values) for name, values in fields.items()})
{'x': 5, 'y': (7, 9)}
"""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from copy import copy
from typing import Any, TypeAlias, cast

# The values of each field by its name.
FieldValues: TypeAlias = dict[str, list[object]]


def columns_of(samples: Sequence[object], name: str = "") -> FieldValues:
    """Turn B samples of one structure into fields of B values each.

    Raises:
        TypeError: Samples differ in structure; the message names the first that does.
        ValueError: A sample lacks a field or has one more, or two fields have one name.
    """
    keys = _field_labels(samples[0])
    if keys is None:
        return {name: list(samples)}
    _check_alike(samples, name)
    columns: FieldValues = {}
    for key, label in keys.items():
        values = [cast("Mapping[object, object]", sample)[key] for sample in samples]
        inner = columns_of(values, f"{name}.{label}" if name else label)
        if inner.keys() & columns.keys():
            raise ValueError(f"two fields are called {min(inner.keys() & columns.keys())!r}: rename one of them")
        columns |= inner
    return columns


def assemble(sample: object, fields: Mapping[str, object], name: str = "") -> object:
    """Put fields together in the structure of one sample; mappings become dicts."""
    keys = _field_labels(sample)
    if keys is None:
        return fields[name]
    parts = {
        key: assemble(cast("Mapping[object, object]", sample)[key], fields, f"{name}.{label}" if name else label)
        for key, label in keys.items()
    }
    if isinstance(sample, Mapping):
        return parts
    kind = cast("Any", type(sample))
    # A named tuple takes its fields one by one, a tuple takes them as one iterable.
    return kind(*parts.values()) if hasattr(sample, "_fields") else kind(parts.values())


def map_parts(batch: Any, change: Callable[[Any], Any]) -> Any:
    """A mapping, tuple, named tuple or list of changed parts; anything else comes back as it is.

    The types stay, except that a mapping that cannot be changed becomes a dict.
    """
    if isinstance(batch, Mapping):
        parts = {key: change(part) for key, part in batch.items()}
        if type(batch) is dict or not isinstance(batch, MutableMapping):
            return parts
        # A copy keeps the type and its attributes, such as those of a tokenizer's BatchEncoding.
        changed = copy(batch)
        changed.update(parts)
        return changed
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(change, batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(map(change, batch))
    return batch


def labelled_parts(container: Any) -> list[tuple[str, Any]]:
    """The parts of a mapping, tuple or list with their keys or indices as text; none for anything else.

    >>> labelled_parts({"x": 1}), labelled_parts([7, 8]), labelled_parts(9)
    ([('x', 1)], [('0', 7), ('1', 8)], [])
    """
    if isinstance(container, Mapping):
        return [(str(key), part) for key, part in container.items()]
    return [(str(index), part) for index, part in enumerate(container)] if isinstance(container, (tuple, list)) else []


def _field_labels(sample: object) -> dict[object, str] | None:
    """The key and the name of each field; None where a sample is a field itself."""
    if isinstance(sample, Mapping):
        return {key: str(key) for key in sample}
    if isinstance(sample, tuple):
        labels = getattr(sample, "_fields", range(len(sample)))
        return {index: str(label) for index, label in enumerate(labels)}
    return None


def _check_alike(samples: Sequence[object], name: str) -> None:
    """Check that samples have the type and the fields of the first.

    Raises:
        TypeError: One has another type.
        ValueError: One has other fields.
    """
    first = cast("Mapping[object, object]", samples[0])
    # Asked once, not for each sample.
    are_mappings, fields = isinstance(first, Mapping), first.keys() if isinstance(first, Mapping) else None
    context = f"field {name!r} of " if name else ""
    for index, sample in enumerate(samples):
        # Mappings of different types may be mixed, since they become dicts anyway.
        if type(sample) is not type(first) and not (are_mappings and isinstance(sample, Mapping)):
            raise TypeError(
                f"{context}sample {index} must be a {type(first).__name__} like sample 0, got {type(sample).__name__}"
            )
        other = cast("Mapping[object, object]", sample)
        if len(other) != len(first) or (are_mappings and other.keys() != fields):
            raise ValueError(f"{context}sample {index} must have the fields of sample 0: {_difference(first, other)}")


def _difference(first: Mapping[object, object], other: Mapping[object, object]) -> str:
    """What one sample lacks or has in addition, for the message."""
    if not isinstance(first, Mapping):
        return f"got {len(other)} instead of {len(first)}"
    lacks, has = sorted(map(repr, first.keys() - other.keys())), sorted(map(repr, other.keys() - first.keys()))
    return " and ".join(
        part for part in (lacks and f"it lacks {', '.join(lacks)}", has and f"has {', '.join(has)} besides") if part
    )
