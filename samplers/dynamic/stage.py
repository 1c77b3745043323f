"""Bucketing as a stage of a webdataset pipeline, for streams that have no index."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Generic

from collate.widths import Widths, check_widths
from samplers.dynamic.bucketer import Bucketer
from samplers.dynamic.buffer import SampleT, StreamBuffer
from samplers.dynamic.sample_length import Length, length_of
from samplers.planning.budget import Budget, Cost, Count
from samplers.planning.options import Overlong
from samplers.shards.skipping import Failed, Handler, make_skipping

_logger = logging.getLogger(__name__)


def bucket_by_length(
    length: Length,
    *,
    max_tokens: int | None = None,
    batch_size: int | None = None,
    cost: Cost | None = None,
    buffer_size: int = 1000,
    max_wait: int | None = None,
    max_bytes: int | None = None,
    overlong: Overlong = "error",
    count_tokens: Count = "padded",
    widths: Widths = None,
    min_length: int = 0,
    max_length: int | None = None,
    handler: Handler | None = None,
    max_failed: float | None = None,
) -> "BucketStage[Any]":
    """Make a stage that turns a stream of samples into batches of similar lengths.

    Args:
        length: Length of a sample in steps: a function, or the field that holds the sequence (or its length).
        max_tokens: Largest number of tokens of a batch, counted as `count_tokens` says.
        batch_size: Largest number of rows of a batch.
        cost: A custom cost: a batch fits if `cost(rows, width) <= 1`. Called with int64 arrays `[n]`, returns numbers
            `[n]`, which must not fall as rows or width grow.
        buffer_size: Largest number of samples in the buffer. A larger buffer pads less.
        max_wait: Largest number of arrivals for which a sample waits. None is three times the buffer.
        max_bytes: Largest number of bytes in the buffer. With more, batches are emitted although the buffer is not
            full. Arrays and tensors count their `nbytes`, other objects `sys.getsizeof`, with the contents of mappings,
            lists, tuples, sets and dataclasses. None counts nothing.
        overlong: What to do with a sample that alone exceeds the budget: `"error"`, `"drop"` or `"alone"` (a batch of
            one). Their number is logged when the stream ends.
        count_tokens: `"padded"`: `max_tokens` limits rows x padded width. `"real"`: it limits the sum of lengths.
        widths: Padded widths, as the collator's: a multiple, or the allowed widths. None pads to the longest row.
        min_length: Shorter samples are left out, and counted by the node.
        max_length: Longer samples count as this long; the collator must cut them.
        handler: Called with the error of a sample that has no length, or exceeds the budget with `overlong="error"`.
            It returns True to skip the sample, or False to raise, as `webdataset.warn_and_continue` does. None raises.
            Errors of the source are always raised: the stages before have their own handlers. The waiting samples are
            lost then, and their number is logged.
        max_failed: Fraction of samples that may be skipped, 0 to 1. None is a tenth, but at least 99 samples.

    Returns:
        A stage for `wds.DataPipeline` and `.compose`: called with an iterable of samples it gives an iterator of lists,
        each shortest first. It can be pickled, and keeps only `skipped` between runs. Every sample is emitted once, the
        remaining ones at the end. `with_epoch` of the same pipeline counts batches and cuts the end off, wherever it is
        called. `with_epoch` of an earlier pipeline counts samples.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: No budget is given, or an option is out of its range.

    Examples:
        >>> stage = bucket_by_length(len, max_tokens=6, buffer_size=4)
        >>> list(stage(["a", "bbb", "cc", "ddd", "e"]))
        [['a', 'cc'], ['bbb', 'ddd'], ['e']]
    """
    budget = Budget(max_tokens=max_tokens, batch_size=batch_size, cost=cost, count_tokens=count_tokens)
    options: dict[str, Any] = {
        "buffer_size": buffer_size,
        "max_wait": max_wait,
        "max_bytes": max_bytes,
        "overlong": overlong,
    }
    options |= {"widths": check_widths(widths), "min_length": min_length, "max_length": max_length}
    return BucketStage(length, budget, handler=handler, max_failed=max_failed, **options)


class StreamStage(ABC, Generic[SampleT]):
    """A stage that turns a stream of samples into a stream of batches, through a buffer.

    Args:
        length: Length of a sample: a function, or a field.
        handler: Called with the error of a sample without a length.
        max_failed: Fraction of samples that may be skipped.
        options: Of the buffer.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of its range.
    """

    def __init__(
        self, length: Length, *, handler: Handler | None = None, max_failed: float | None = None, **options: Any
    ) -> None:
        if isinstance(length, bool) or not (callable(length) or isinstance(length, (str, int))):
            raise TypeError(f"length must be a function or the name or number of a field, got {length!r}")
        self.length, self.options = length, options
        self._skipping = make_skipping(handler, max_failed)
        # A wrong option is an error here, and not first in a worker.
        self.new_bucketer()

    @abstractmethod
    def new_bucketer(self) -> StreamBuffer[SampleT]:
        """An empty buffer with the stage's options."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.describe()})"

    def describe(self) -> str:
        """Length, limits and buffer as text for a `repr`."""
        length = getattr(self.length, "__qualname__", None) or repr(self.length)
        options = {name: value for name, value in self._described().items() if value is not None}
        return ", ".join([f"length={length}", *(f"{name}={value!r}" for name, value in options.items())])

    @abstractmethod
    def _described(self) -> dict[str, Any]:
        """The options for a `repr`; None is not shown."""

    def __call__(self, source: Iterable[SampleT]) -> Iterator[list[SampleT]]:
        """Bucket a stream.

        Yields:
            Batches, each as soon as it is due.

        Raises:
            KeyError: A sample lacks the field.
            TypeError: A length is not an int.
            LengthError: A length is negative, or a sample alone exceeds the budget and `overlong` is `"error"`.
            RuntimeError: Too many samples were skipped. The message lists them.
        """
        bucketer = self.new_bucketer()
        try:
            if self._skipping is None:
                yield from bucketer.batches_of((length_of(sample, self.length), sample) for sample in source)
            else:
                yield from self._sift(bucketer, source)
        finally:
            report_overlong(bucketer)
            # `with_epoch` or a `break` closes the stream before its end.
            if len(bucketer):
                _logger.info("the stream was closed with %d samples in the buffer, which no batch held", len(bucketer))

    @property
    def skipped(self) -> dict[str, dict[str, int]]:
        """Skipped samples so far, in all workers: `{shard: {reason: count}}`, as in `ShardDataset`.

        The shard is a sample's `__url__`, or "".
        """
        return {} if self._skipping is None else self._skipping.counts

    def push(self, bucketer: StreamBuffer[SampleT], sample: SampleT) -> None:
        """Add a sample to a buffer, or skip it. Either way it is an arrival. The errors are those of `__call__`."""
        try:
            bucketer.push(length_of(sample, self.length), sample)
        except Exception as error:
            # The source is already behind this sample, so the sample must count even after an error.
            bucketer.skip()
            if self._skipping is None:
                raise
            names = sample if isinstance(sample, Mapping) else {}
            self._skipping.skip(Failed(error, str(names.get("__key__", "")), str(names.get("__url__", ""))))
        else:
            if self._skipping is not None:
                self._skipping.take()

    def end(self, bucketer: StreamBuffer[SampleT]) -> None:
        """Note in a buffer that its source has ended.

        Raises:
            RuntimeError: Too many samples were skipped. The message lists them.
        """
        bucketer.end()
        if self._skipping is not None:
            self._skipping.finish()

    def _sift(self, bucketer: StreamBuffer[SampleT], source: Iterable[SampleT]) -> Iterator[list[SampleT]]:
        """Bucket a stream, and skip samples that cannot be bucketed.

        Yields:
            Batches.
        """
        for sample in source:
            self.push(bucketer, sample)
            while bucketer.is_due:
                yield bucketer.pop()
        self.end(bucketer)
        while len(bucketer):
            yield bucketer.pop()


class BucketStage(StreamStage[SampleT]):
    """The stage that `bucket_by_length` makes.

    Args:
        length: Length of a sample, as for `bucket_by_length`.
        budget: Limit of a batch.
        handler: Called with the error of a sample without a length.
        max_failed: Fraction of samples that may be skipped.
        options: Options of `Bucketer`.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        length: Length,
        budget: Budget,
        *,
        handler: Handler | None = None,
        max_failed: float | None = None,
        **options: Any,
    ) -> None:
        self.budget = budget
        super().__init__(length, handler=handler, max_failed=max_failed, **options)

    def new_bucketer(self) -> Bucketer[SampleT]:
        """An empty buffer with these options."""
        return Bucketer(self.budget, **self.options)

    def _described(self) -> dict[str, Any]:
        limits = {name: getattr(self.budget, name) for name in ("max_tokens", "batch_size", "cost")}
        options = limits | self.options
        # Zero is the default of `min_length`.
        return options | {"min_length": options.get("min_length") or None}


def report_overlong(bucketer: StreamBuffer[Any]) -> None:
    """Log how many over-long samples were dropped or emitted alone."""
    if bucketer.dropped or bucketer.alone:
        _logger.warning(
            "of %d samples %d over the budget were dropped, and %d are a batch of one",
            bucketer.arrivals,
            bucketer.dropped,
            bucketer.alone,
        )
    if bucketer.too_short:
        _logger.info("of %d samples %d were shorter than min_length", bucketer.arrivals, bucketer.too_short)
