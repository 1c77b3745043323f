"""Which run a file belongs to: the lengths of its dataset and the run's name."""

import json
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, Self

import numpy as np

from samplers.planning.budget import Integers
from samplers.planning.sorting import IndexedLengths, Lengths
from samplers.shards.storage.atomic import AtomicFile

_VERSION: Final = 1
_LABELS: Final = {"name": "name", "samples": "number of samples", "lengths": "fingerprint of the lengths"}


@dataclass(frozen=True)
class RunRecord:
    """What must be the same when a run is started again; its budget, workers and processes may change.

    Attributes:
        name: The user's name of the run.
        samples: N.
        lengths: Digest of all lengths.
    """

    name: str
    samples: int
    lengths: str

    @classmethod
    def of(cls, name: str, lengths: Lengths, array: Integers) -> Self:
        """The record of a run over these lengths, int64 `[N]` or `[N, K]` as an array."""
        if isinstance(lengths, IndexedLengths):
            return cls(name, len(array), lengths.fingerprint)
        # The same lengths in a list, an array of int32 or a tensor are one run.
        return cls(name, len(array), blake2b(np.ascontiguousarray(array, np.int64).data, digest_size=8).hexdigest())

    def check(self, fields: dict[str, Any], path: Path) -> None:
        """Check that a file is of this run.

        Raises:
            ValueError: It is of another one.
        """
        own = asdict(self)
        differing = [key for key in own if fields[key] != own[key]]
        if differing:
            found = ", ".join(f"{_LABELS[key]} {fields[key]!r} instead of {own[key]!r}" for key in differing)
            raise ValueError(
                f"{path} belongs to another run: {found}: give out another path, or start again with resume=False"
            )


def write_record(path: Path, record: RunRecord, **more: int) -> None:
    """Write a record, and more about the file next to it, atomically."""
    with AtomicFile(path) as file:
        file.stream.write(json.dumps({"version": _VERSION, **asdict(record), **more}, indent=1).encode())


def read_record(path: Path, *more: str) -> dict[str, Any]:
    """The fields of a record.

    Args:
        path: The file.
        more: Further fields that it must have, which are integers.

    Raises:
        ValueError: The file is damaged, or of another version.
    """
    try:
        fields = json.loads(path.read_bytes())
    except ValueError:
        fields = None
    if not isinstance(fields, dict) or not {"version", *_LABELS, *more} <= fields.keys():
        raise ValueError(f"{path}: it is damaged: delete it, or start again with resume=False")
    if fields["version"] != _VERSION:
        raise ValueError(
            f"{path}: must be of version {_VERSION}, got {fields['version']}: finish with the release that wrote it, "
            "or start again with resume=False"
        )
    return fields
