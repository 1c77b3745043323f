"""Where outputs are kept: in memory, as a list or an array, or on disk, in parts that become one file."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeAlias
from uuid import uuid4

import numpy as np
import numpy.typing as npt
import torch

from samplers.inference.output_arrays import (
    OutputArrays,
    OutputSchema,
    check_same_schema,
    join_arrays,
    to_arrays,
    to_numpy,
)
from samplers.inference.outputs import Outputs
from samplers.inference.run_folder import RunFolder
from samplers.inference.run_record import RunRecord
from samplers.inference.saved_result import SavedResult

ContainerKind: TypeAlias = Literal["list", "numpy", "torch"]
"""What the outputs come back in, where they are not written to a file."""
# Outputs that wait for a flush take at most this many bytes, however long it is until then.
_LARGEST_BUFFER: Final = 1 << 28


class Container(Protocol):
    """Keeps the outputs of a run.

    Attributes:
        done: Which samples have an output already: bool `[N]`.
    """

    done: npt.NDArray[np.bool_]

    def add(self, outputs: Outputs) -> None:
        """Keep the outputs of a batch."""
        ...

    def flush(self) -> None:
        """Send to the disk what is kept in memory."""
        ...

    def finish(self) -> Any:
        """The result, in the order of the dataset."""
        ...

    def close(self) -> None:
        """Release what the run holds, finished or not."""
        ...


class MemoryContainer:
    """A list, or an array that is made when the first outputs are known.

    Args:
        total: N.
        kind: Of the result.
    """

    def __init__(self, total: int, kind: ContainerKind) -> None:
        self.done = np.zeros(total, np.bool_)
        self._kind = kind
        self._result: Any = [None] * total if kind == "list" else None
        # Dtype and shape of an output, where all outputs must have one.
        self._schema: tuple[Any, ...] | None = None

    def add(self, outputs: Outputs) -> None:
        """Keep the outputs of a batch.

        Raises:
            TypeError: An array cannot hold them.
            ValueError: They have not the dtype and shape of those before.
        """
        entries = self._to_kind(outputs.entries)
        if not isinstance(entries, list):
            self._check(entries, outputs)
        if self._kind == "list":
            for sample, entry in zip(outputs.samples.tolist(), entries, strict=True):
                self._result[sample] = entry
            return
        if self._result is None:
            shape = (len(self.done), *entries.shape[1:])
            self._result = (np if self._kind == "numpy" else torch).empty(shape, dtype=entries.dtype)
        samples = outputs.samples if self._kind == "numpy" else torch.from_numpy(outputs.samples)
        self._result[samples] = entries

    def flush(self) -> None:
        """Nothing: memory is all there is."""

    def finish(self) -> Any:
        """A list of N, or an array or tensor `[N, *F]`."""
        return [] if self._result is None else self._result

    def close(self) -> None:
        """Nothing is held."""

    def _to_kind(self, entries: Any) -> Any:
        """Entries as the container keeps them.

        Raises:
            TypeError: An array cannot hold them.
            ValueError: They differ in shape.
        """
        if self._kind == "list":
            return entries
        if isinstance(entries, list):
            shapes = {tuple(getattr(entry, "shape", ())) for entry in entries}
            if len(shapes) > 1:
                raise ValueError(
                    f"container={self._kind!r} needs outputs of one shape, got {sorted(shapes)[:3]}: use a list, or an "
                    ".arrow file as out"
                )
            entries = torch.stack(entries) if isinstance(entries[0], torch.Tensor) else np.stack(entries)
        if self._kind == "numpy":
            return to_numpy(entries)
        return torch.as_tensor(entries)

    def _check(self, entries: Any, outputs: Outputs) -> None:
        """Check that outputs are like those before.

        Raises:
            ValueError: They are not.
        """
        schema = (entries.dtype, *entries.shape[1:])
        self._schema = self._schema or schema
        if schema != self._schema:
            raise ValueError(
                f"outputs must have one dtype and shape, got {_described(schema)} for sample {outputs.samples[0]}, and "
                f"{_described(self._schema)} before: if rows are as wide as their batch, return "
                "batch.with_padded(output), whose padding is removed; outputs with their own number of steps go into a "
                "list, or an .arrow file as out"
            )


@dataclass
class _Waiting:
    """Outputs that wait for a flush, and the name of the part that they will be."""

    pieces: list[OutputArrays] = field(default_factory=list)
    bytes: int = 0
    # Any process may write, whenever it started: a random name is no one's yet.
    part: str = field(default_factory=lambda: uuid4().hex)


class FileContainer:
    """Parts next to a file, which they become at the end.

    Args:
        result: The file.
        folder: Of the parts.
        flush_seconds: Outputs are in memory for at most this long.
        meet: Waits for all processes of the run, and checks that all give the same text.
        is_first: Whether this process begins and ends the run; all others write parts only.
    """

    def __init__(
        self,
        result: SavedResult,
        folder: RunFolder,
        *,
        flush_seconds: float,
        meet: Callable[[str], None],
        is_first: bool,
    ) -> None:
        self._result, self._folder = result, folder
        self._flush_seconds = flush_seconds
        self._meet, self._is_first = meet, is_first
        self._waiting = _Waiting()
        self._last_flush = time.monotonic()
        self._schema: OutputSchema | None = None
        self.done = np.zeros(folder.record.samples, np.bool_)
        self._is_complete = False

    def begin(self, *, resume: bool) -> None:
        """Find out what is done; all processes of the run call it.

        Raises:
            FileExistsError: Another run is writing, or there is a file that no run has written.
            ValueError: Files are damaged or of another run, or processes have different lengths or names.
        """
        if self._is_first:
            self._begin_first(resume=resume)
        self._meet(f"lengths and name: {self._folder.record}")
        self._is_complete = not self._folder.exists
        if self._is_complete:
            self.done[:] = True
        else:
            self.done = self._folder.read_done()
            self._schema = self._folder.schema
        # No one writes before all have read; all must have read the same.
        self._meet(f"number of samples that are done: {self.done.sum()}")

    def _begin_first(self, *, resume: bool) -> None:
        if not self._folder.exists:
            self._result.refuse_other_file()
        is_complete = resume and self._result.is_complete()
        # A kill may have left the folder behind.
        if is_complete and not self._folder.path.exists():
            return
        self._folder.start(resume=resume)
        self._result.forget() if not is_complete else self._folder.remove()

    def add(self, outputs: Outputs) -> None:
        """Keep the outputs of a batch, and flush if it is time.

        Raises:
            OSError: They cannot be written; the error names the file.
            TypeError: A file cannot hold them.
            ValueError: They have not the dtype and shape of those before.
        """
        arrays = to_arrays(outputs)
        self._result.check_storable(arrays.schema)
        self._schema = self._schema or arrays.schema
        check_same_schema(arrays.schema, self._schema, f"for sample {outputs.samples[0]}")
        self._waiting.pieces.append(arrays)
        self._waiting.bytes += arrays.values.nbytes
        is_due = time.monotonic() - self._last_flush >= self._flush_seconds
        if is_due or self._waiting.bytes >= _LARGEST_BUFFER:
            self.flush()

    def flush(self) -> None:
        """Write a part."""
        # Interrupted behind the write, it is written again under the same name: a second part with these samples would
        # be refused for ever.
        if self._waiting.pieces:
            self._folder.write(self._waiting.part, join_arrays(self._waiting.pieces))
        self._waiting = _Waiting()
        self._last_flush = time.monotonic()

    def finish(self) -> Any:
        """Write the file, in one process when all have written their parts, and open it in each.

        Raises:
            ValueError: Samples have no output, or parts are damaged.
        """
        if not self._is_complete:
            self.flush()
            self._meet("finished")
            if self._is_first:
                missing = np.flatnonzero(~self._folder.read_done())
                if len(missing):
                    raise ValueError(
                        f"{self._folder.path}: {len(missing)} samples have no output, such as {missing[0]}: a part was "
                        "removed; start again, and only these are computed"
                    )
                self._result.write(self._folder.list_parts())
                self._folder.remove()
            self._meet("written")
        return self._result.open()

    def close(self) -> None:
        """Release the lock of the folder."""
        self._folder.close()


def make_container(
    out: Path | None,
    kind: ContainerKind,
    record: RunRecord,
    *,
    flush_seconds: float,
    meet: Callable[[str], None],
    is_first: bool,
) -> MemoryContainer | FileContainer:
    """The container of a run.

    Raises:
        ModuleNotFoundError: pyarrow is needed and not installed.
        ValueError: There is no such kind, or the file has no suffix that is known.
    """
    if kind not in {"list", "numpy", "torch"}:
        raise ValueError(f"container must be 'list', 'numpy' or 'torch', got {kind!r}: files are named by out")
    if out is None:
        return MemoryContainer(record.samples, kind)
    result, folder = SavedResult(out, record), RunFolder(out, record)
    return FileContainer(result, folder, flush_seconds=flush_seconds, meet=meet, is_first=is_first)


def _described(schema: tuple[Any, ...]) -> str:
    return f"{schema[0]} {list(schema[1:])}"
