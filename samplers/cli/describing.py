"""Counts, durations and indexes as text."""

from collections.abc import Sequence
from typing import Final

from samplers.cli.arguments import printable
from samplers.shards.format.header_lengths import header_length_of
from samplers.shards.indexing.index import LengthIndex, tables_of

MINUTE: Final = 60
HOUR: Final = 3600


def describe_index(corpus: LengthIndex, fields: Sequence[str] | None = None) -> str:
    """An index as text, or of some of its fields."""
    shards = count(len(corpus.shards), "shard")
    names = corpus.fields if fields is None else fields
    how = _describe_measure(corpus) if set(names) & set(tables_of(corpus).measured) else ""
    return printable(f"{count(len(corpus), 'sample')} in {shards}, lengths of {', '.join(names)}{how}")


def _describe_measure(corpus: LengthIndex) -> str:
    """What measured the lengths that are not of arrays."""
    header = header_length_of(corpus.length_id)
    measured = "" if corpus.length_id is None else f"measured by {corpus.length_id}"
    rates = sorted({rate for values in corpus.rates.values() for rate in values})
    hertz = " and ".join(f"{rate:,}" for rate in rates) + " Hz" * bool(rates)
    text = ", ".join(filter(None, [measured if header is None else header.id, hertz]))
    return f" ({text})" if text else ""


def count(number: int, unit: str) -> str:
    """A number with its unit, for example 1,200 samples."""
    return f"{number:,} {unit}{'s' * (number != 1)}"


def describe_seconds(seconds: float) -> str:
    """A duration as text.

    >>> describe_seconds(4.256), describe_seconds(754), describe_seconds(7260)
    ('4.26 s', '12.6 min', '2.02 h')
    """
    if seconds < MINUTE:
        return f"{seconds:.2f} s"
    return f"{seconds / MINUTE:.1f} min" if seconds < HOUR else f"{seconds / HOUR:,.2f} h"
