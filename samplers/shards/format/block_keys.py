r"""The keys of a block: compressed text in version 2 of the format, text of one width in version 1.

Version 2 is an array of bytes: the keys in UTF-8 with a NUL between them, compressed with zlib. Two thousand keys such
as `tokens-00000001` take 4 KB, and 120 KB in version 1, where a character has four bytes:

>>> keys = [f"tokens-{number:08}" for number in range(2000)]
>>> small, large = encode_block_keys(keys, version=2), encode_block_keys(keys, version=1)
>>> len(small) < 5000, len(large), read_block_keys(small, lambda: 2000, "here")[-1]
(True, 120128, b'tokens-00001999')

Without this library: `zlib.decompress(np.load(file).tobytes()).split(b"\0")`.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final
from zlib import compress, decompressobj
from zlib import error as ZlibError

import numpy as np

from samplers.shards.format.keys import encode_keys
from samplers.shards.format.npy import check_npy_size, decode_text_npy, find_npy_header, npy_header, read_npy_header

KEYS: Final = "block.keys.npy"
# Text may be at most 64 times as large as its compressed form, and 64 KiB. So a small file cannot fill the memory.
_MOST_TIMES: Final = 64
_FREE_BYTES: Final = 1 << 16
# Bytes that are inflated at a time. zlib's own buffer grows in steps, to four times the text.
_PIECE: Final = 1 << 16
# zlib's level that stores text as it is, and its default, which is as small here as its best.
_STORED, _LEVEL = 0, 6
# The dtype of version 2, as it stands in the header. All others are left to version 1.
_BYTES: Final = b"{'descr': '|u1', "


def encode_block_keys(keys: list[str], *, version: int) -> bytes:
    """The member with the keys of a block: an `.npy` file."""
    if version == 1:
        table = np.array(keys).astype("<U")
        return npy_header(table.dtype.str, table.shape) + table.tobytes()
    text = "\0".join(keys).encode()
    data = compress(text, _LEVEL)
    if len(text) > _limit(len(data)):
        data = compress(text, _STORED)
    return npy_header("|u1", (len(data),)) + data


def read_block_keys(data: bytes, count_samples: Callable[[], int], context: str) -> list[bytes]:
    """The keys of a block, in UTF-8.

    Args:
        data: The member `block.keys.npy`.
        count_samples: Counts the samples of the block by another member, which bounds what is allocated for keys that
            are compressed.
        context: Shard and group, for messages.

    Raises:
        ValueError: The member does not hold text, or in version 2 another number of keys.
    """
    context = f"{context}: {KEYS}"
    if not is_compressed(data):
        return list(encode_keys(decode_text_npy(data, context)).tolist())
    header = read_npy_header(data, context)
    check_npy_size(header, len(data), context)
    if len(header.shape) != 1:
        raise ValueError(f"{context}: compressed keys have one axis, got {list(header.shape)}")
    text = _inflate(memoryview(data)[header.size :], context)
    count, samples = text.count(b"\0") + 1, count_samples()
    if count != samples:
        raise ValueError(f"{context}: {count} keys, the other members of the block have {samples} samples")
    try:
        text.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{context}: the keys are not UTF-8: {error}") from None
    keys = text.split(b"\0")
    if not all(keys):
        raise ValueError(f"{context}: key {keys.index(b'')} of {count} is empty")
    return keys


def is_compressed(data: bytes) -> bool:
    """Whether the keys are those of version 2, by the first bytes of the member."""
    start, _ = find_npy_header(data)
    return data.startswith(_BYTES, start)


def _inflate(data: memoryview, context: str) -> bytes:
    """The text that was compressed.

    Raises:
        ValueError: It is damaged, is followed by more, or is far larger than its compressed form.
    """
    inflating, limit = decompressobj(), _limit(len(data))
    pieces, size = [], 0
    try:
        for piece in _inflate_pieces(inflating, data):
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise ValueError(f"{context}: {len(data)} bytes hold more than {limit} bytes of keys: refused")
    except ZlibError as error:
        raise ValueError(f"{context}: the compressed keys are damaged: {error}") from None
    if not inflating.eof or inflating.unused_data:
        raise ValueError(f"{context}: the compressed keys are damaged: they do not end with their member")
    return b"".join(pieces)


def _inflate_pieces(inflating: Any, data: memoryview) -> Iterator[bytes]:
    """The text piece by piece, with zlib's `decompressobj`. Ends early if the stream is followed by more.

    Yields:
        At most 64 KiB.
    """
    # The input is cut too, because zlib copies what it has not read yet after each piece.
    for first in range(0, len(data), _PIECE):
        piece = inflating.decompress(data[first : first + _PIECE], _PIECE)
        yield piece
        while len(piece) == _PIECE:
            piece = inflating.decompress(inflating.unconsumed_tail, _PIECE)
            yield piece
        if inflating.unused_data:
            return


def _limit(size: int) -> int:
    """The most bytes of text that `size` compressed bytes may hold."""
    return _MOST_TIMES * size + _FREE_BYTES
