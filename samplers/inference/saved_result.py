"""The finished file of a run: written from its parts, next to a record with its checksum, and opened again."""

from pathlib import Path
from typing import Any, Final

import numpy as np

from samplers.inference.assemble import arrow_type, write_arrow, write_npy
from samplers.inference.output_arrays import OutputSchema
from samplers.inference.run_record import RunRecord, read_record, write_record
from samplers.shards.storage.checksum import crc32
from samplers.sources.extras import load_extra

SUFFIXES: Final = {".npy": write_npy, ".arrow": write_arrow}
_CHUNK: Final = 1 << 24


class SavedResult:
    """A result on disk, and the record next to it: `predictions.npy` and `predictions.npy.run.json`.

    Args:
        path: The file.
        record: The run.

    Raises:
        ModuleNotFoundError: pyarrow is needed and not installed.
        ValueError: The file has neither suffix.
    """

    def __init__(self, path: Path, record: RunRecord) -> None:
        if path.suffix not in SUFFIXES:
            raise ValueError(
                f"out must end with .npy (outputs of one shape) or .arrow (any numbers, or text), got {path}"
            )
        if path.suffix == ".arrow":
            # Now, and not after hours of computing.
            load_extra("pyarrow", "convert")
        self.path = path
        self.record = record
        self._record_path = path.with_name(path.name + ".run.json")

    def is_complete(self) -> bool:
        """Whether the run has been finished; the file is checked.

        Raises:
            ValueError: It belongs to another run, or it was changed since.
        """
        if not self._record_path.exists():
            return False
        fields = read_record(self._record_path, "bytes", "crc32")
        self.record.check(fields, self.path)
        if not self.path.exists():
            self._record_path.unlink()
            return False
        if (self.path.stat().st_size, _checksum(self.path)) != (fields["bytes"], fields["crc32"]):
            raise ValueError(
                f"{self.path} was changed since it was finished (size or crc32): delete it and {self._record_path}, or "
                "start again with resume=False"
            )
        return True

    def refuse_other_file(self) -> None:
        """Refuse to replace a file that no run has written.

        Raises:
            FileExistsError: There is such a file.
        """
        if self.path.exists() and not self._record_path.exists():
            raise FileExistsError(
                f"{self.path} exists, and run_in_order has not finished it: delete it, or give another out"
            )

    def forget(self) -> None:
        """Remove the record, so that the run is not finished; its file stays until another replaces it."""
        self._record_path.unlink(missing_ok=True)

    def check_storable(self, schema: OutputSchema) -> None:
        """Check that the file can hold such outputs.

        Raises:
            ValueError: They have not one shape, and the file is an array; or Arrow has no such type.
        """
        if self.path.suffix == ".arrow":
            arrow_type(schema)
        if self.path.suffix == ".npy" and schema.kind != "fixed":
            raise ValueError(
                f"{self.path} must have outputs of one shape, got {schema}: give a file .arrow as out, or return one "
                "tensor [B, *F] instead of a list, if all rows have one shape"
            )

    def write(self, parts: list[Path]) -> None:
        """Write the file from parts that have each sample once, then its record."""
        SUFFIXES[self.path.suffix](self.path, parts, self.record.samples)
        write_record(self._record_path, self.record, bytes=self.path.stat().st_size, crc32=_checksum(self.path))

    def open(self) -> Any:
        """The result: a read-only memory map `[N, *F]`, or a memory-mapped pyarrow table with the column `output`."""
        if self.path.suffix == ".npy":
            return np.load(self.path, mmap_mode="r", allow_pickle=False)
        pyarrow = load_extra("pyarrow", "convert")
        return pyarrow.ipc.open_file(pyarrow.memory_map(str(self.path))).read_all()


def _checksum(path: Path) -> int:
    """crc32 of a file."""
    value = 0
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            value = crc32(chunk, value)
    return value
