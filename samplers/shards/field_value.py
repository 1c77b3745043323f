"""The value of a field of a plain sample: decoded, and with the length that the index says."""

from collections.abc import Callable, Mapping
from typing import Any

from collate.errors import LengthError
from samplers.shards.format.samples import decode_member, field_of
from samplers.shards.indexing.index_file import REBUILD
from samplers.shards.indexing.measuring import Decoder
from samplers.shards.indexing.tables import Field


def as_decoders(decode: Mapping[str, Decoder] | None) -> dict[str, Decoder]:
    """The functions by field.

    Raises:
        TypeError: It is one function, of no field.
    """
    if callable(decode):
        raise TypeError(f"decode must say for which field: give {{'wav': {getattr(decode, '__name__', decode)}}}")
    return dict(decode or {})


def decode_field(field: Field, data: bytes, decoder: Decoder | None, context: Callable[[], str]) -> Any:
    """Decode a member, by the user's function if there is one.

    Making the context takes a quarter of the time of reading a sample, so it is a function, for errors alone.
    """
    return _call_decoder(decoder, data, context) if decoder else _decode(field, data, context)


def _call_decoder(decode: Decoder, data: bytes, context: Callable[[], str]) -> Any:
    try:
        return decode(data)
    except Exception as error:
        error.add_note(f"decode= was called with {context()}")
        raise


def _decode(field: Field, data: bytes, context: Callable[[], str]) -> Any:
    """Decode a member by its suffix."""
    encoding = field_of(field.suffix)[1]
    try:
        return decode_member(encoding, data, "")
    except ValueError:
        # Again, for a message with the context.
        return decode_member(encoding, data, context())


def check_length(value: Any, expected: int, context: Callable[[], str], decoder: Decoder | None) -> None:
    """Compare the length of a value with the index.

    Raises:
        LengthError: They differ.
    """
    try:
        steps = len(value)
    except TypeError:
        raise LengthError(
            f"{context()}: the index says {expected} steps, the shard holds a single value: {_way_out(value, decoder)}"
        ) from None
    if steps != expected:
        raise LengthError(
            f"{context()}: the index says {expected} steps, the shard {steps}: {_way_out(value, decoder)}"
        )


def _way_out(value: Any, decoder: Decoder | None) -> str:
    """How to correct a wrong length: the function that made the value comes first."""
    if decoder is None:
        return REBUILD
    return f"decode= returned a {type(value).__name__}, and must return the steps that the index counts; or {REBUILD}"
