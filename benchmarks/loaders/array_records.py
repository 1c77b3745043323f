"""array_record files, read by grain."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import grain.python as grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from loaders.contract import Loader, blocks_of_pair, pad
from loaders.works import ROWS, Work

FILES: Final = 10


def write(work: Work, folder: Path) -> None:
    """Ten files of the same number of records; each record is the bytes of the fields of a sample, end to end."""
    samples = work.samples()
    each = -(-len(samples) // FILES)
    for number in range(0, len(samples), each):
        # One record in a group: a larger group would be unpacked to read one.
        writer = ArrayRecordWriter(str(folder / f"{number:08}.array_record"), "group_size:1")
        for sample in samples[number : number + each]:
            writer.write(b"".join(values.tobytes() for values in sample.values()))
        writer.close()


class Decode:
    """From bytes to fields.

    Args:
        work: The work, for its fields.
    """

    def __init__(self, work: Work) -> None:
        self.fields = {name: (values.dtype, values.shape[1:]) for name, values in work.fields.items()}

    def __call__(self, record: bytes) -> dict[str, Any]:
        """The fields of a sample, which have equal lengths."""
        size = len(record) // len(self.fields)
        # A copy, as torch wants arrays that can be written.
        whole = bytearray(record)
        return {
            name: np.frombuffer(whole, dtype, size // dtype.itemsize, column * size).reshape(-1, *shape)
            for column, (name, (dtype, shape)) in enumerate(self.fields.items())
        }


def epochs(work: Work, folder: Path, workers: int) -> Iterable[Any]:
    """Grain's shuffle and batches; its threads read where there is no worker."""
    source = grain.ArrayRecordDataSource(sorted(map(str, folder.glob("*.array_record"))))
    batches = grain.MapDataset.source(source).shuffle(seed=0).map(Decode(work)).batch(ROWS, batch_fn=pad)
    made = batches.to_iter_dataset()
    loader: Iterable[Any] = made.mp_prefetch(grain.MultiprocessingOptions(workers)) if workers else made
    return loader


LOADERS: Final = {"array_record, grain": Loader(write, epochs, blocks_of_pair, "checksum", "array_record")}
LIBRARIES: Final = ("grain", "array_record")
