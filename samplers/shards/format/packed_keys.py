"""Keys of an index without the text that all of them share, decoded when they are used.

The keys `tokens-00000000` to `tokens-00099999` share ten characters, which are stored once. The last five are digits;
with one more character before them they are three bytes, because a byte holds two characters of at most sixteen:

>>> keys = np.array([f"tokens-{number:08}".encode() for number in range(100_000)])
>>> form = find_key_form([keys])
>>> form.prefix, form.alphabet, form.encode(keys[[0, 45679]]).tolist()
(b'tokens-00', b'0123456789', [[0, 0, 0], [4, 86, 121]])
>>> PackedKeys(form, form.encode(keys))[[45679, 2]]
array([b'tokens-00045679', b'tokens-00000002'], dtype='|S15')

Keys of more than sixteen characters (letters, words) lose only their common start.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np

from samplers.shards.format.npy import AnyArray

# Characters of which two fit a byte.
PAIRED: Final = 16
# A longer common start is stored with each key. So a small file cannot stand for a table that fills the memory.
LONGEST_PREFIX: Final = 255
# Keys that are looked at together, which bounds the memory.
_AT_ONCE: Final = 1 << 16


@dataclass(frozen=True)
class KeyForm:
    """How keys are stored.

    Attributes:
        prefix: The start that all keys have in common, or a part of it.
        width: Bytes of the longest remainder, at least 1.
        alphabet: The bytes of all remainders, ascending, if a byte holds two of them. Empty if not.
    """

    prefix: bytes
    width: int
    alphabet: bytes

    @property
    def dtype(self) -> str:
        """The dtype of the stored array."""
        return "|u1" if self.alphabet else f"|S{self.width}"

    @property
    def shape(self) -> tuple[int, ...]:
        """The axes of the stored array behind the first."""
        return (-(-self.width // 2),) if self.alphabet else ()

    @cached_property
    def key_dtype(self) -> np.dtype[Any]:
        """The dtype of whole keys."""
        return np.dtype(f"S{len(self.prefix) + self.width}")

    @property
    def _stored_width(self) -> int:
        # An odd remainder is padded.
        return self.width + self.width % 2 if self.alphabet else self.width

    @cached_property
    def _prefix_bytes(self) -> AnyArray:
        return np.frombuffer(self.prefix, np.uint8)

    @cached_property
    def pairs(self) -> AnyArray:
        """The two characters that a byte stands for: bytes `[256, 2]`, as uint16 `[256]`."""
        characters = np.frombuffer(self.alphabet.ljust(PAIRED, b"\0"), np.uint8)
        table: AnyArray = np.stack([characters.repeat(PAIRED), np.tile(characters, PAIRED)], 1)
        return np.ascontiguousarray(table).view(np.uint16).reshape(-1)

    def encode(self, keys: AnyArray) -> AnyArray:
        """Keys `[n]` as they are stored: bytes of one width `[n]`, or uint8 `[n, width / 2]`."""
        remainders = _as_columns(keys, len(self.prefix) + self._stored_width)[:, len(self.prefix) :]
        if not self.alphabet:
            return np.ascontiguousarray(remainders).view(f"S{self.width}").reshape(-1)
        codes = np.zeros(256, np.uint8)
        codes[np.frombuffer(self.alphabet, np.uint8)] = np.arange(len(self.alphabet))
        stored: AnyArray = codes[remainders[:, ::2]] << 4 | codes[remainders[:, 1::2]]
        return stored

    def decode(self, stored: AnyArray) -> AnyArray:
        """The keys of stored rows `[n]`: bytes of one width `[n]`."""
        start, count = len(self.prefix), len(stored)
        if not self.alphabet and not start:
            return np.array(stored)
        keys = np.empty((count, start + self.width), np.uint8)
        keys[:, :start] = self._prefix_bytes
        remainders = self.pairs.take(stored) if self.alphabet else np.ascontiguousarray(stored)
        keys[:, start:] = remainders.view(np.uint8).reshape(count, self._stored_width)[:, : self.width]
        return keys.view(self.key_dtype)[:, 0]


class PackedKeys:
    """The keys of N samples, as an array of bytes of one width: decoded row by row, because the table is a memory map.

    Args:
        form: How they are stored.
        stored: The stored array, `[N]` or `[N, width / 2]`.
    """

    def __init__(self, form: KeyForm, stored: AnyArray) -> None:
        self.form, self.stored = form, stored
        self.dtype = form.key_dtype
        self.shape: tuple[int, ...] = stored.shape[:1]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> Any:
        if isinstance(rows, slice):
            return self.form.decode(self.stored[rows])
        if np.ndim(rows) == 0:
            return self.form.decode(self.stored[[rows]])[0]
        rows = np.asarray(rows)
        # Four times as fast as an index in brackets, which may also be a mask.
        stored = self.stored.take(rows, axis=0) if rows.dtype.kind in "iu" else self.stored[rows]
        return self.form.decode(stored)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> AnyArray:  # noqa: FBT001 (NumPy's protocol)
        keys = self.form.decode(self.stored)
        return keys if dtype is None else keys.astype(dtype)

    def tolist(self) -> list[bytes]:
        """All keys."""
        keys: list[bytes] = np.asarray(self).tolist()
        return keys


def find_key_form(parts: Iterable[AnyArray]) -> KeyForm:
    """The smallest form of some keys, given in parts `[n]`."""
    used = np.zeros((1, 256), np.bool_)
    for keys in parts:
        width = keys.dtype.itemsize
        if width > len(used):
            # Keys of earlier parts that end before these columns are padded with zeros there.
            more = np.zeros((width - len(used), 256), np.bool_)
            more[:, 0] = used.any()
            used = np.concatenate([used, more])
        for first in range(0, len(keys), _AT_ONCE):
            columns = _as_columns(keys[first : first + _AT_ONCE], len(used))
            for column, used_bytes in zip(columns.T, used, strict=True):
                used_bytes |= np.bincount(column, minlength=256) > 0
    return _choose_form(used)


def _choose_form(used: AnyArray) -> KeyForm:
    """The form of keys whose column c has the bytes that `used[c]` names: bool `[width, 256]`."""
    shared = (used.sum(1) == 1) & ~used[:, 0]
    shared[LONGEST_PREFIX:] = False
    start = int(np.argmin(shared)) if not shared.all() else len(used)
    # A remainder has at least one byte. Two of them share a byte, so an odd one takes one of the common start with it.
    firsts = [first for first in (start, start - 1, start - 2) if 0 <= first < len(used)]
    prefix = np.argmax(used[:start], axis=1).astype(np.uint8).tobytes()
    for first in firsts:
        alphabet = np.flatnonzero(used[first:].any(0)).astype(np.uint8).tobytes()
        if len(alphabet) <= PAIRED and (len(used) - first) % 2 == 0:
            return KeyForm(prefix[:first], len(used) - first, alphabet)
    alphabet = np.flatnonzero(used.any(0)).astype(np.uint8).tobytes()
    if firsts[0] == 0 and len(alphabet) < PAIRED:
        # Without a common start, an odd remainder is padded.
        return KeyForm(b"", len(used), bytes(sorted({0, *alphabet})))
    return KeyForm(prefix[: firsts[0]], len(used) - firsts[0], b"")


def _as_columns(keys: AnyArray, width: int) -> AnyArray:
    """Keys `[n]` as bytes `[n, width]`, padded with zeros, or cut where they hold zeros only."""
    return np.ascontiguousarray(keys.astype(f"S{width}")).view(np.uint8).reshape(len(keys), width)
