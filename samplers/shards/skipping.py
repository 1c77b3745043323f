"""Corrupt samples: which errors may be skipped, how they are counted, and when there are too many.

A handler decides, as in webdataset: it gets the error, and returns True to skip the sample. It is called only for
damaged data: `ValueError` (also `LengthError`), `OSError`, `EOFError`, `zlib.error`, `struct.error`, and a missing
field. All other errors are raised: they are bugs, or a lack of memory, file descriptors or disk.

The limit, with `max_failed=0.1` and a corpus of 1,000 samples: the samples that were taken are rounded up to whole
epochs. After 30 samples, 25 of them damaged, 25 <= 0.1 x 1,000 is fine; the 101st damaged sample of the first epoch is
an error.
"""

import struct
import zlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from errno import EDQUOT, EMFILE, ENFILE, ENOMEM, ENOSPC
from typing import Any, Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
from torch.utils.data import get_worker_info

from collate.errors import LengthError
from samplers.shards.skip_counts import Tally

Handler: TypeAlias = Callable[[Exception], Any]
"""Called with an error: returns True to skip the sample, False to raise."""
RowIndices: TypeAlias = npt.NDArray[Any]

# This many failures in a row are not an accident.
IN_A_ROW: Final = 100
# A fraction counts from 10,000 samples on, or from a smaller corpus: the first few samples may all be damaged.
LEAST: Final = 10_000
MAX_FAILED: Final = 0.1
REASONS: Final = ("length", "missing", "unreadable", "field", "damaged")

_SHORTAGES: Final = frozenset([EMFILE, ENFILE, ENOMEM, ENOSPC, EDQUOT])
# Counting one sample in shared memory takes half as long as bucketing it. So 64 samples are counted together.
_TOLD_EVERY: Final = 64
_LONGEST_MESSAGE: Final = 300
_SHOWN_SHARDS: Final = 20


class MissingFieldError(KeyError):
    """A sample lacks a field. Any other `KeyError` is a bug."""


class Failed(NamedTuple):
    """A sample that could not be read.

    Attributes:
        error: The error.
        key: Key of the sample, "" if unknown.
        shard: Path or URL of its shard, "" if unknown.
    """

    error: Exception
    key: str
    shard: str

    def __str__(self) -> str:
        text = f"{type(self.error).__name__}: {self.error}"
        text = text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."
        return f"sample {self.key!r} of {self.shard or 'an unknown shard'}: {text}"


class Skipping:
    """Skips samples that cannot be read, counts them, and raises when there are too many.

    Args:
        handler: Called with an error. Returns True to skip the sample; False, None or an exception raises.
        max_failed: Fraction of samples that may be skipped, 0 to 1. It refers to the samples taken in all processes,
            rounded up to a multiple of `least`, so that a corpus may have its damage at the start of each epoch. None
            is a tenth, and allows 99 samples in any case: in a small corpus a few are easily more than a tenth.
        least: Samples of the corpus, 10,000 if it has more or the number is unknown.

    Raises:
        TypeError: The handler cannot be called, or `max_failed` is not a number.
        ValueError: `max_failed` is not between 0 and 1.
    """

    def __init__(self, handler: Handler, max_failed: float | None = None, least: int = LEAST) -> None:
        if not callable(handler):
            raise TypeError(
                f"handler must be a function from an error to True or False, got {handler!r}: give "
                "webdataset.warn_and_continue, or None to raise"
            )
        self._max_failed = _check_max_failed(max_failed)
        self._spared = IN_A_ROW - 1 if max_failed is None else 0
        self._handler, self._least = handler, max(1, min(least, LEAST))
        self._tally = Tally(REASONS)
        self._in_a_row = self._untold = 0
        # Descriptions of the last failures of this process.
        self._last: deque[str] = deque(maxlen=IN_A_ROW)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Number of skipped samples so far, by shard and then by reason, in all processes."""
        return self._tally.by_shard()

    def sift(self, batch: Sequence[Any]) -> list[Any]:
        """The samples of a batch without those that could not be read. All count as taken.

        Args:
            batch: Samples, with `Failed` for those that could not be read.

        Raises:
            Exception: An error that the handler did not skip.
            RuntimeError: No sample remains, or too many have failed.
        """
        self._tally.take(len(batch))
        samples = []
        for entry in batch:
            if isinstance(entry, Failed):
                self._skip(entry)
            else:
                samples.append(entry)
                self._in_a_row = 0
        if batch and not samples:
            failures = [str(entry) for entry in batch]
            raise RuntimeError(
                f"none of a batch's {len(batch)} samples could be read, and without it this replica would have a "
                f"batch fewer than others: repair the shards, or leave these samples out\n{self._list(failures)}"
            ) from batch[0].error
        return samples

    def take(self) -> None:
        """Count a sample that was read."""
        self._in_a_row = 0
        self._untold += 1
        if self._untold >= _TOLD_EVERY:
            self._tell()

    def _tell(self) -> None:
        """Add the samples since the last time to the shared count."""
        self._tally.take(self._untold)
        self._untold = 0

    def skip(self, failed: Failed) -> None:
        """Skip a sample if its error and the handler allow it, and count it.

        Raises:
            Exception: The error, if it must not be skipped or the handler did not skip it.
            RuntimeError: Too many have failed.
        """
        self._untold += 1
        self._tell()
        self._skip(failed)

    def _skip(self, failed: Failed) -> None:
        """Skip a sample that is already counted as taken. The errors are those of `skip`.

        Raises:
            Exception: The error, if it is not skipped.
            RuntimeError: Too many have failed.
        """
        if not is_damage(failed.error):
            raise failed.error
        answer = self._handler(failed.error)
        if isinstance(answer, BaseException):
            raise answer
        if not answer:
            raise failed.error
        self._tally.skip(failed.shard, find_reason(failed.error))
        self._last.append(str(failed))
        self._in_a_row += 1
        if self._in_a_row >= IN_A_ROW:
            raise RuntimeError(f"{self._in_a_row} samples in a row could not be read\n{self._list(self._last)}")
        self._check_share(self._least)

    def finish(self) -> None:
        """Note the end of the source: the samples that were taken are all of them.

        Raises:
            RuntimeError: Too many have failed.
        """
        self._tell()
        info = get_worker_info()
        # With several workers, others may still have most of their samples to read.
        if info is None or info.num_workers == 1:
            self._check_share(1)

    def _check_share(self, least: int) -> None:
        """Check the number of skipped samples against the limit.

        Raises:
            RuntimeError: There are too many.
        """
        taken, skipped = self._tally.totals()
        samples = -(-taken // least) * least
        if skipped > max(self._max_failed * samples, self._spared):
            raise RuntimeError(
                f"{skipped} of {taken} samples could not be read, more than max_failed={self._max_failed:g} of "
                f"{samples}: repair the data, or raise max_failed\n{self._list(self._last)}"
            )

    def _list(self, last: Sequence[str]) -> str:
        """The counts by shard, and the last failures, as lines."""
        counts = self.counts
        lines = [
            f"{shard or 'an unknown shard'}: " + ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            for shard, reasons in counts.items()
        ]
        more = [f"and {len(lines) - _SHOWN_SHARDS} shards more"] if len(lines) > _SHOWN_SHARDS else []
        return "\n".join(["skipped so far:", *lines[:_SHOWN_SHARDS], *more, "the last of this process:", *last])


def make_skipping(handler: Handler | None, max_failed: float | None, least: int = LEAST) -> Skipping | None:
    """The `Skipping` of a handler, None without one. The errors are those of `Skipping`."""
    # A wrong fraction is an error even without a handler.
    _check_max_failed(max_failed)
    return None if handler is None else Skipping(handler, max_failed, least)


def _check_max_failed(max_failed: float | None) -> float:
    if max_failed is None:
        return MAX_FAILED
    if isinstance(max_failed, bool) or not isinstance(max_failed, (int, float, np.integer, np.floating)):
        raise TypeError(f"max_failed must be a number, got {max_failed!r}: give a fraction of samples, 0 to 1")
    if not 0 <= max_failed <= 1:
        raise ValueError(f"max_failed must be a fraction of samples, 0 to 1, got {max_failed}")
    return float(max_failed)


def is_damage(error: Exception) -> bool:
    """Whether an error means damaged data, and not a bug or a lack of resources."""
    if isinstance(error, OSError):
        return error.errno not in _SHORTAGES
    return isinstance(error, (ValueError, EOFError, zlib.error, struct.error, MissingFieldError))


def find_reason(error: Exception) -> str:
    """The reason under which an error is counted."""
    classes: Mapping[str, Any] = {
        "length": LengthError,
        "missing": FileNotFoundError,
        "unreadable": (OSError, EOFError),
        "field": MissingFieldError,
    }
    return next((reason for reason, each in classes.items() if isinstance(error, each)), "damaged")


def read_apart(
    read: Callable[[RowIndices], list[Any]], rows: RowIndices, fail: Callable[[Exception, int], Failed]
) -> list[Any]:
    """Read samples together. If that fails, read them in halves, and so on, down to the samples that fail.

    >>> def read(rows):
    ...     if 6 in rows:
    ...         raise ValueError("damaged")
    ...     return [f"sample {row}" for row in rows]
    >>> read_apart(read, np.array([4, 5, 6, 7]), lambda error, row: f"failed {row}")
    ['sample 4', 'sample 5', 'failed 6', 'sample 7']

    Args:
        read: Reads the samples of rows.
        rows: Integers `[n]`.
        fail: Makes the entry of a sample that failed, from its error and row.

    Returns:
        The n entries.

    Raises:
        Exception: An error that does not mean damaged data.
    """
    try:
        return read(rows)
    except Exception as error:
        if not is_damage(error):
            raise
        if len(rows) == 1:
            return [fail(error, int(rows[0]))]
    middle = len(rows) // 2
    return read_apart(read, rows[:middle], fail) + read_apart(read, rows[middle:], fail)
