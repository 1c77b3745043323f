"""Checksums are those of zlib, with zlib-ng or without."""

import zlib

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from samplers.shards.storage.checksum import crc32


@given(data=st.binary(max_size=300), repeats=st.integers(0, 400))
def test_checksums_are_those_of_zlib(data: bytes, repeats: int) -> None:
    whole = data * repeats
    assert crc32(whole) == zlib.crc32(whole)
    assert crc32(np.frombuffer(whole, np.uint8)) == crc32(memoryview(whole)) == zlib.crc32(whole)
