"""Samples as a writer is given them, drawn with every awkward case, and what they must read as."""

import gc
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import webdataset.compat
from hypothesis import strategies as st
from webdataset.tariterators import group_by_keys, tar_file_expander

from samplers.shards.format.npy import DTYPES
from samplers.shards.writing.writer import ShardWriter

LAYOUTS = ["blocks", "plain"]
# Versions of the format of blocks. A test that looks at the bytes holds for each.
VERSIONS = [1, 2]

# A file name in the plain layout: no dots, slashes or controls.
NAMES = st.text(st.characters(min_codepoint=48, exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)
FIELDS = ["tokens", "audio", "label", "maße", "x_1", "length"]


@st.composite
def corpora(draw: st.DrawFn, max_samples: int = 8) -> tuple[list[dict[str, object]], list[str]]:
    """Samples of one to four fields, the first one variable, and the names of those that are arrays of fixed size."""
    lengths = st.one_of(st.integers(0, 6), st.sampled_from([0, 1, 300]))
    names = draw(st.lists(st.sampled_from(FIELDS), min_size=1, max_size=4, unique=True))
    dtypes = [np.dtype(draw(st.sampled_from(sorted(DTYPES)))) for _ in names]
    shapes = [tuple(draw(st.lists(st.integers(0, 3), max_size=3))) for _ in names]
    fixed = [index > 0 and draw(st.booleans()) for index in range(len(names))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    samples = []
    for key in draw(st.lists(NAMES, min_size=1, max_size=max_samples, unique=True)):
        sample: dict[str, object] = {"__key__": key}
        for name, dtype, shape, stacked in zip(names, dtypes, shapes, fixed, strict=True):
            whole = shape if stacked else (draw(lengths), *shape)
            sample[name] = rng.integers(0, 200, whole).astype(dtype)
        samples.append(sample)
    return samples, [name for name, shape, stacked in zip(names, shapes, fixed, strict=True) if stacked and shape]


def assert_same(read: dict[str, object], written: dict[str, object]) -> None:
    """Equal fields of equal dtype and shape, and arrays that their reader may write to."""
    assert list(read) == list(written)
    assert read["__key__"] == written["__key__"]
    for name in read.keys() - {"__key__"}:
        value, expected = np.asarray(read[name]), np.asarray(written[name])
        assert (value.dtype, value.shape) == (expected.dtype, expected.shape), name
        assert value.tobytes() == expected.tobytes(), name
        if expected.ndim:
            assert value.flags.writeable
            assert value.dtype.isnative


def tokens(lengths: list[int], first: int = 0) -> list[dict[str, object]]:
    """Plain samples: int64 tokens of these lengths, and a number."""
    return [
        {"__key__": f"k{first + index}", "tokens": np.arange(length) + 1000 * (first + index), "label": index}
        for index, length in enumerate(lengths)
    ]


def write(folder: Path, samples: list[dict[str, object]], **options: Any) -> Path:
    """Write samples to shards in a folder."""
    with ShardWriter(folder, **options) as writer:
        for sample in samples:
            writer.write(sample)
    return folder


def groups(folder: Path) -> Iterator[dict[str, object]]:
    """The groups of a folder's shards as webdataset's own stages hand them over."""
    for path in sorted(folder.glob("*.tar")):
        with path.open("rb") as stream:
            yield from group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}]))


def read_with_webdataset(folder: Path, *stages: object) -> list[dict[str, object]]:
    """All that a `WebDataset` with these stages gives for a folder's shards."""
    paths = sorted(map(str, folder.glob("*.tar")))
    with warnings.catch_warnings():
        # It leaves its files to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        read = list(webdataset.compat.WebDataset(paths, shardshuffle=False).compose(*stages))
        gc.collect()
    return read


def files(folder: Path) -> dict[str, bytes]:
    """The content of each file of a folder, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def keys_of_block(stored: np.ndarray, version: int) -> list[str]:
    """The keys in the array of `block.keys.npy`."""
    return zlib.decompress(stored.tobytes()).decode().split("\0") if version == 2 else stored.tolist()


def is_mapped(array: Any) -> bool:
    """Whether an array lies in a memory map."""
    while isinstance(array, np.ndarray) and not isinstance(array, np.memmap):
        array = array.base
    return isinstance(array, np.memmap)
