"""Packing as a stage of a webdataset pipeline, for streams that have no index."""

from abc import ABC, abstractmethod
from typing import Any

from samplers.dynamic.buffer import SampleT
from samplers.dynamic.packer import Packer
from samplers.dynamic.sample_length import Length
from samplers.dynamic.stage import StreamStage
from samplers.shards.skipping import Handler


def pack_by_length(
    length: Length,
    *,
    capacity: int,
    rows: int = 1,
    multiple: int = 1,
    max_documents: int | None = None,
    buffer_size: int = 1000,
    max_wait: int | None = None,
    max_bytes: int | None = None,
    overlong: str = "error",
    min_length: int = 0,
    max_length: int | None = None,
    handler: Handler | None = None,
    max_failed: float | None = None,
) -> "PackStage[Any]":
    """Make a stage that turns a stream of samples into batches of full rows.

    Give the batches to `VarlenCollator(arrange="given")` with the same `capacity`, `max_documents` and `multiple`
    (`align`): it cuts each into the same rows. Every sample that is not left out is emitted once.

    Args:
        length: Length of a sample in steps: a function, or the field that holds the sequence (or its length).
        capacity: Steps that a row holds.
        rows: Rows of a batch; it has fewer where the buffer does not hold as many, and at the end.
        multiple: Samples take steps up to a multiple of it; `capacity` must be one.
        max_documents: Samples in a row at most. None is no limit.
        buffer_size: Largest number of samples in the buffer. It should hold several rows; a larger buffer wastes less.
        max_wait: Largest number of arrivals for which a sample waits. None is three times the buffer.
        max_bytes: Largest number of bytes in the buffer, as for `bucket_by_length`.
        overlong: What to do with a sample that is longer than a row: `"error"` or `"drop"`. Their number is logged.
        min_length: Shorter samples are left out, and counted by the node.
        max_length: Longer samples count as this long; the collator must cut them.
        handler: Called with the error of a sample that has no length, or is longer than a row with
            `overlong="error"`, as for `bucket_by_length`.
        max_failed: Fraction of samples that may be skipped, 0 to 1. None is a tenth, but at least 99 samples.

    Returns:
        A stage for `wds.DataPipeline` and `.compose`: called with an iterable of samples it gives an iterator of lists,
        in row order. It can be pickled, and keeps only `skipped` between runs.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of its range, or `capacity` is not a multiple of `multiple`.

    Examples:
        >>> stage = pack_by_length(len, capacity=4, buffer_size=4)
        >>> list(stage(["a", "bbb", "cc", "dd", "e"]))
        [['a', 'bbb'], ['cc', 'dd'], ['e']]
    """
    return PackStage(
        length,
        handler=handler,
        max_failed=max_failed,
        capacity=capacity,
        rows=rows,
        multiple=multiple,
        max_documents=max_documents,
        buffer_size=buffer_size,
        max_wait=max_wait,
        max_bytes=max_bytes,
        overlong=overlong,
        min_length=min_length,
        max_length=max_length,
    )


class PacksRows(ABC):
    """The options by which a stage or a node packs, as `VarlenCollator.for_sampler` takes them."""

    @property
    @abstractmethod
    def _packer(self) -> Packer[Any]:
        """A buffer with the options, checked."""

    @property
    def capacity(self) -> int:
        """Steps that a row holds."""
        return self._packer.capacity

    @property
    def multiple(self) -> int:
        """Samples take steps up to a multiple of it."""
        return self._packer.multiple

    @property
    def max_documents(self) -> int | None:
        """Samples in a row at most."""
        return self._packer.max_documents

    @property
    def max_length(self) -> int | None:
        """Longer samples count as this long."""
        return self._packer.max_length

    @property
    def rows(self) -> int:
        """Rows of a batch."""
        return self._packer.rows


class PackStage(PacksRows, StreamStage[SampleT]):
    """The stage that `pack_by_length` makes.

    Args:
        length: Length of a sample, as for `pack_by_length`.
        handler: Called with the error of a sample without a length.
        max_failed: Fraction of samples that may be skipped.
        options: Options of `Packer`.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of its range.
    """

    def new_bucketer(self) -> Packer[SampleT]:
        """An empty buffer with these options."""
        return Packer(**self.options)

    @property
    def _packer(self) -> Packer[SampleT]:
        return self.new_bucketer()

    def _described(self) -> dict[str, Any]:
        usual = {"rows": 1, "multiple": 1, "min_length": 0}
        return {name: None if usual.get(name) == value else value for name, value in self.options.items()}
