"""Parts to one file in the order of the dataset: a .npy file that can be memory-mapped, or an Arrow file."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np

from samplers.inference.output_arrays import OutputArrays, OutputSchema
from samplers.inference.parts import read_part, read_part_samples
from samplers.planning.budget import Integers
from samplers.shards.format.npy import AnyArray
from samplers.shards.storage.atomic import AtomicFile
from samplers.sources.extras import load_extra

# Name of the column of an Arrow file.
COLUMN: Final = "output"
# Rows of a record batch: few enough to be in memory at once, many enough that their number does not matter.
_ROWS: Final = 1 << 16


def write_npy(path: Path, parts: list[Path], total: int) -> None:
    """Write outputs of one shape as a `.npy` file `[N, *F]`, atomically.

    Args:
        path: The file.
        parts: Hold each of the samples once.
        total: N.
    """
    with AtomicFile(path) as file:
        schema = read_part_samples(parts[0], total)[0].schema
        shape = (total, *schema.shape)
        header = {"descr": schema.dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_2_0(file.stream, header)
        file.stream.flush()
        offset = file.stream.tell()
        _scatter(parts, _map_values(file.temporary, schema, shape, offset), total)


def write_arrow(path: Path, parts: list[Path], total: int) -> None:
    """Write outputs as an Arrow IPC file with one column, atomically.

    Outputs of one shape are fixed-size lists, outputs with their own number of steps lists of these, and texts strings.

    Args:
        path: The file.
        parts: Hold each of the samples once.
        total: N.

    Raises:
        ModuleNotFoundError: pyarrow is not installed.
    """
    pyarrow = load_extra("pyarrow", "convert")
    # First in the order of the dataset, in a file that is mapped: the outputs may not fit in memory.
    scratch = parts[0].with_name("values.scratch")
    try:
        with AtomicFile(path) as file:
            schema, offsets = _measure(parts, total)
            values = _map_values(scratch, schema, (int(offsets[-1]), *schema.shape), 0)
            _scatter(parts, values, total, offsets)
            columns = pyarrow.schema([(COLUMN, arrow_type(schema))])
            with pyarrow.ipc.new_file(file.stream, columns) as writer:
                for first in range(0, total, _ROWS):
                    rows = offsets[first : first + _ROWS + 1]
                    column = _arrow_column(pyarrow, schema, rows - rows[0], values[rows[0] : rows[-1]])
                    writer.write_batch(pyarrow.record_batch([column], schema=columns))
    finally:
        # Windows keeps a mapped file until it is collected; the folder of the parts is removed later.
        with suppress(OSError):
            scratch.unlink(missing_ok=True)


def _read_parts(parts: list[Path], total: int) -> Iterator[OutputArrays]:
    for path in parts:
        yield read_part(path, total)


def _measure(parts: list[Path], total: int) -> tuple[OutputSchema, Integers]:
    """The schema, and where each sample's values begin: int64 `[N + 1]`."""
    lengths = np.ones(total, np.int64)
    for arrays in _read_parts(parts, total):
        schema = arrays.schema
        if arrays.lengths is not None:
            lengths[arrays.samples] = arrays.lengths
    offsets = np.zeros(total + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return schema, offsets


def _map_values(path: Path, schema: OutputSchema, shape: tuple[int, ...], offset: int) -> AnyArray:
    """Memory-mapped values of a file from an offset on; the file gets the size that they take."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(schema.dtype).itemsize
    with path.open("ab") as stream:
        stream.truncate(offset + size)
    if size == 0:
        return np.empty(shape, schema.dtype)
    return np.memmap(path, schema.dtype, "r+", offset, shape)


def _scatter(parts: list[Path], values: AnyArray, total: int, offsets: Integers | None = None) -> None:
    """Copy the outputs of all parts to the indices of their samples."""
    for arrays in _read_parts(parts, total):
        if arrays.lengths is None or offsets is None:
            values[arrays.samples] = arrays.values
            continue
        ends = np.cumsum(arrays.lengths)
        for sample, length, end in zip(arrays.samples.tolist(), arrays.lengths.tolist(), ends.tolist(), strict=True):
            values[offsets[sample] : offsets[sample] + length] = arrays.values[end - length : end]
    if isinstance(values, np.memmap):
        values.flush()


def arrow_type(schema: OutputSchema) -> Any:
    """The type of the column.

    Raises:
        ValueError: Arrow has no such type.
    """
    pyarrow = load_extra("pyarrow", "convert")
    if schema.kind == "text":
        return pyarrow.large_string()
    if 0 in schema.shape or np.dtype(schema.dtype).kind == "c":
        raise ValueError(
            f"an Arrow file has no complex numbers and no axis of size 0, got {schema}: give a .npy as out"
        )
    kind = pyarrow.from_numpy_dtype(np.dtype(schema.dtype))
    for size in reversed(schema.shape):
        kind = pyarrow.list_(kind, size)
    return pyarrow.large_list(kind) if schema.kind == "variable" else kind


def _arrow_column(pyarrow: Any, schema: OutputSchema, offsets: Integers, values: AnyArray) -> Any:
    """Outputs as an array of the column's type; offsets int64 `[n + 1]` count from the first value."""
    if schema.kind == "text":
        buffers = [None, pyarrow.py_buffer(offsets), pyarrow.py_buffer(np.ascontiguousarray(values))]
        return pyarrow.Array.from_buffers(pyarrow.large_string(), len(offsets) - 1, buffers)
    column = pyarrow.array(np.ascontiguousarray(values).reshape(-1))
    for size in reversed(schema.shape):
        column = pyarrow.FixedSizeListArray.from_arrays(column, size)
    if schema.kind == "variable":
        column = pyarrow.LargeListArray.from_arrays(pyarrow.array(offsets), column)
    return column
