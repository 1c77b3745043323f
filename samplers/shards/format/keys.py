r"""Keys of samples: text in Python, UTF-8 bytes in tars and tables.

A tar may hold names that are not UTF-8. Their bytes survive the way to text and back:

>>> encode_key(decode_key(b"caf\xe9")) == b"caf\xe9"
True
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final, overload

import numpy as np

from samplers.shards.format.npy import AnyArray

# Keys that are decoded together.
_KEYS_AT_ONCE: Final = 1 << 12


def decode_key(key: bytes) -> str:
    """A key as text, whatever bytes it has."""
    return key.decode("utf-8", "surrogateescape")


def decode_all(keys: list[bytes]) -> list[str]:
    r"""Many keys as text.

    >>> decode_all([b"a", b"caf\xc3\xa9"]), decode_all([])
    (['a', 'caf\xe9'], [])
    """
    # Decoded at once: key by key takes twice as long.
    texts = b"\0".join(keys).decode("utf-8", "surrogateescape").split("\0")
    return texts if len(texts) == len(keys) else list(map(decode_key, keys))


def encode_key(key: str) -> bytes:
    """A key as the bytes that a tar holds."""
    return key.encode("utf-8", "surrogateescape")


def encode_keys(keys: AnyArray) -> AnyArray:
    """Keys as fixed-width bytes: `[n]` text to `[n]` bytes."""
    return np.asarray(np.strings.encode(keys, "utf-8", "surrogateescape"))


class Keys(Sequence[str]):
    """Keys of samples, decoded when they are used."""

    def __init__(self, keys: Any) -> None:
        self._keys = keys

    def __len__(self) -> int:
        return len(self._keys)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Keys": ...
    def __getitem__(self, index: int | slice) -> "str | Keys":
        if isinstance(index, slice):
            return Keys(self._keys[index])
        return decode_key(self._keys[index])

    def __iter__(self) -> Iterator[str]:
        for first in range(0, len(self), _KEYS_AT_ONCE):
            yield from decode_all(self._keys[first : first + _KEYS_AT_ONCE].tolist())
