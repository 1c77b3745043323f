"""The folder of an unfinished run: its record, its parts, and a lock, so that only one run writes there."""

import shutil
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import numpy.typing as npt

from samplers.inference.output_arrays import OutputArrays, OutputSchema, check_same_schema
from samplers.inference.parts import PART_SUFFIX, read_part_samples, write_part
from samplers.inference.run_record import RunRecord, read_record, write_record
from samplers.shards.storage.atomic import is_still_at
from samplers.shards.storage.locks import lock

_RECORD: Final = "run.json"
_LOCK: Final = "lock"


class RunFolder:
    """Parts of a run next to the file that they will become: `predictions.npy.parts`.

    Args:
        out: The file.
        record: The run.
    """

    def __init__(self, out: Path, record: RunRecord) -> None:
        self.path = out.with_name(out.name + ".parts")
        self.record = record
        # Of the outputs in the parts, once they were read.
        self.schema: OutputSchema | None = None
        self._lock: BinaryIO | None = None

    @property
    def exists(self) -> bool:
        """Whether there is an unfinished run."""
        return (self.path / _RECORD).exists()

    def start(self, *, resume: bool) -> None:
        """Lock the folder, and begin or resume the run; one process of a run does it.

        Raises:
            FileExistsError: Another run is writing there.
            ValueError: The parts are of another run.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        stream = (self.path / _LOCK).open("ab")
        # The run that had the lock may have removed the folder.
        if lock(stream) is False or not is_still_at(stream, self.path / _LOCK):
            stream.close()
            raise FileExistsError(f"{self.path} is being written by another run: wait for it, or give another out")
        self._lock = stream
        # Parts without a record are what a kill has left of a finished run, whichever it was.
        if not resume or not self.exists:
            for part in self.list_parts():
                part.unlink()
            (self.path / _RECORD).unlink(missing_ok=True)
        if self.exists:
            self.record.check(read_record(self.path / _RECORD), self.path)
        else:
            write_record(self.path / _RECORD, self.record)

    def read_done(self) -> npt.NDArray[np.bool_]:
        """Which samples have an output: bool `[N]`.

        Raises:
            ValueError: A part is damaged, or parts have outputs of different shapes or of the same sample.
        """
        done = np.zeros(self.record.samples, np.bool_)
        for path in self.list_parts():
            header, samples = read_part_samples(path, self.record.samples)
            self.schema = self.schema or header.schema
            check_same_schema(header.schema, self.schema, f"in {path}")
            if done[samples].any() or len(np.unique(samples)) < len(samples):
                raise ValueError(f"{path}: it has a sample that another part has: delete this file")
            done[samples] = True
        return done

    def write(self, name: str, arrays: OutputArrays) -> None:
        """Write a part; one of that name is replaced.

        Raises:
            OSError: It cannot be written; the error names the file.
        """
        write_part(self.path / f"{name}{PART_SUFFIX}", arrays)

    def list_parts(self) -> list[Path]:
        """All parts; in a fixed order, so that messages are the same each time."""
        return sorted(self.path.glob(f"*{PART_SUFFIX}"))

    def remove(self) -> None:
        """Remove the folder, once its outputs are elsewhere."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
