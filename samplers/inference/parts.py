"""A part: the outputs of one flush in a file, with checksums; no pickle is read.

A line of JSON, then the sample indices (int64), the lengths (int64, if outputs have their own), and the values.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from samplers.inference.output_arrays import OutputArrays, OutputSchema
from samplers.planning.budget import Integers
from samplers.shards.storage.atomic import AtomicFile
from samplers.shards.storage.checksum import crc32

PART_SUFFIX: Final = ".part"
_VERSION: Final = 1
# A header is shorter, and a file without a line end is not read whole to find that out.
_LONGEST_HEADER: Final = 4096
_REMEDY: Final = "delete this file, and its samples are computed again"


@dataclass(frozen=True)
class PartHeader:
    """The first line of a part.

    Attributes:
        schema: Of the outputs.
        samples: Number of outputs.
        steps: Entries of the values' first axis.
        crcs: crc32 of the sample indices, and of lengths and values together.
        offset: Where the sample indices begin.
    """

    schema: OutputSchema
    samples: int
    steps: int
    crcs: tuple[int, int]
    offset: int


def write_part(path: Path, arrays: OutputArrays) -> None:
    """Write outputs as a file that appears complete or not at all.

    Raises:
        OSError: It cannot be written; the error names the file.
    """
    samples, body = arrays.samples.tobytes(), np.ascontiguousarray(arrays.values).tobytes()
    if arrays.lengths is not None:
        body = arrays.lengths.tobytes() + body
    header = {
        "version": _VERSION,
        **arrays.schema._asdict(),
        "samples": len(arrays.samples),
        "steps": len(arrays.values),
        "crcs": [crc32(samples), crc32(body)],
    }
    with AtomicFile(path) as file:
        for piece in (json.dumps(header).encode() + b"\n", samples, body):
            file.stream.write(piece)


def read_part_samples(path: Path, total: int) -> tuple[PartHeader, Integers]:
    """The header of a part and its sample indices, int64 `[n]`.

    Args:
        path: The file.
        total: Samples of the dataset.

    Raises:
        ValueError: The file is damaged.
    """
    header = _read_header(path)
    with path.open("rb") as stream:
        stream.seek(header.offset)
        data = stream.read(8 * header.samples)
    samples = np.frombuffer(data, np.int64)
    if crc32(data) != header.crcs[0] or samples.min() < 0 or samples.max() >= total:
        raise ValueError(f"{path}: its sample indices are damaged: {_REMEDY}")
    return header, samples


def read_part(path: Path, total: int) -> OutputArrays:
    """All of a part, checked.

    Raises:
        ValueError: The file is damaged.
    """
    header, samples = read_part_samples(path, total)
    with path.open("rb") as stream:
        stream.seek(header.offset + samples.nbytes)
        body = stream.read()
    if crc32(body) != header.crcs[1]:
        raise ValueError(f"{path}: its outputs are damaged (crc32): {_REMEDY}")
    lengths = None
    if header.schema.kind != "fixed":
        lengths, body = np.frombuffer(body[: samples.nbytes], np.int64), body[samples.nbytes :]
    values = np.frombuffer(body, header.schema.dtype).reshape(header.steps, *header.schema.shape)
    return OutputArrays(header.schema, samples, values, lengths)


def _read_header(path: Path) -> PartHeader:
    """The header, against the size of the file.

    Raises:
        ValueError: It is no header of this version, or the file has another size.
    """
    with path.open("rb") as stream:
        line = stream.readline(_LONGEST_HEADER)
    try:
        fields: dict[str, Any] = json.loads(line)
        schema = OutputSchema(fields["kind"], np.dtype(fields["dtype"]).str, tuple(map(int, fields["shape"])))
        first, second = map(int, fields["crcs"])
        header = PartHeader(schema, int(fields["samples"]), int(fields["steps"]), (first, second), len(line))
        version = fields["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: its header is damaged: {_REMEDY}") from error
    if version != _VERSION:
        raise ValueError(f"{path}: must be of version {_VERSION}, got {version}: finish with the release that wrote it")
    columns = 8 * header.samples * (1 if schema.kind == "fixed" else 2)
    values = header.steps * int(np.prod(schema.shape, dtype=np.int64)) * np.dtype(schema.dtype).itemsize
    expected = header.offset + columns + values
    if header.samples < 1 or path.stat().st_size != expected:
        raise ValueError(f"{path}: must have {expected} bytes, got {path.stat().st_size}: {_REMEDY}")
    return header
