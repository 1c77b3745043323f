"""Lengths in the index of a Megatron corpus: `NAME.idx` next to `NAME.bin`.

All numbers are little-endian: the magic `MMIDIDX` and two zeros, the version 1 (8 bytes), a code of the dtype (1 byte),
the number n of sequences and of documents (8 bytes each), then the lengths of the sequences, int32 `[n]`.
"""

import struct
from pathlib import Path
from typing import Final

import numpy as np

from samplers.sources.arrow_lengths import LengthArray

_MAGIC: Final = b"MMIDIDX\x00\x00"
_HEADER: Final = struct.Struct("<9sQBQQ")


def read_megatron_lengths(path: str) -> LengthArray:
    """The lengths of the sequences of a Megatron index, in tokens: int64 `[N]`.

    Raises:
        ValueError: The file is none, of another version, or truncated.
    """
    size = Path(path).stat().st_size
    with Path(path).open("rb") as file:
        head = file.read(_HEADER.size)
    if not head.startswith(_MAGIC) or len(head) < _HEADER.size:
        raise ValueError(f"{path}: no index of a Megatron corpus, its first bytes are {head[:9]!r}")
    _, version, _, count, _ = _HEADER.unpack(head)
    if version != 1:
        raise ValueError(f"{path}: version {version} of Megatron's index, this program reads 1")
    # Behind the lengths stands an offset of 8 bytes for each sequence.
    if _HEADER.size + 12 * count > size:
        raise ValueError(f"{path}: truncated: {count} sequences, but only {size} bytes")
    lengths = np.fromfile(path, "<i4", count, offset=_HEADER.size).astype(np.int64)
    if len(lengths) and lengths.min() < 0:
        raise ValueError(f"{path}: damaged: sequence {int(np.argmin(lengths))} has the length {int(lengths.min())}")
    return lengths
