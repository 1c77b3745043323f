"""Corrupt samples: which errors may be skipped, how they are counted, and when there are too many.

A handler decides, as in webdataset: it is given the error, and returns True to skip the sample. It is asked only about
damage to data: `ValueError` (`LengthError` among them), `OSError`, `EOFError`, `zlib.error`, `struct.error`, and a
field that a sample lacks. All other errors are mistakes of a program, or want of memory, files or disk: they are
raised.
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
RowIndices: TypeAlias = npt.NDArray[Any]

# So many failures in a row are no accident.
IN_A_ROW: Final = 100
# A share is one of so many samples, or of a corpus with fewer: of the first ones that are taken all might fail.
LEAST: Final = 10_000
MAX_FAILED: Final = 0.1
REASONS: Final = ("length", "missing", "unreadable", "field", "damaged")

_SHORTAGES: Final = frozenset([EMFILE, ENFILE, ENOMEM, ENOSPC, EDQUOT])
# To count a single sample in shared memory takes half as long as to bucket it.
_TOLD_EVERY: Final = 64
_LONGEST_MESSAGE: Final = 300
_SHOWN_SHARDS: Final = 20


class MissingFieldError(KeyError):
    """A sample lacks a field; a `KeyError` of any other origin is a program's."""


class Failed(NamedTuple):
    """Stands where a sample should.

    Attributes:
        error: why it could not be read.
        key: of the sample; "" where nobody knows.
        shard: path or URL; "" where nobody knows.
    """

    error: Exception
    key: str
    shard: str

    def __str__(self) -> str:
        text = f"{type(self.error).__name__}: {self.error}"
        text = text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."
        return f"sample {self.key!r} of {self.shard or 'an unknown shard'}: {text}"


class Skipping:
    """What becomes of samples that cannot be read.

    Args:
        handler: from an error to True to skip the sample; False, None or an exception raises.
        max_failed: the share of samples that may be skipped, 0 to 1: of those that were taken in all processes, rounded
            up to whole times `least`, so that a corpus may hold its damage at the start of each epoch. None is a tenth,
            from the hundredth sample that is skipped on: of a small corpus a few are easily more.
        least: samples of the corpus; 10,000 where there are more, or nobody knows.

    Raises:
        TypeError: The handler cannot be called, or `max_failed` is no number.
        ValueError: `max_failed` is not between 0 and 1.
    """

    def __init__(self, handler: Handler, max_failed: float | None = None, least: int = LEAST) -> None:
        if not callable(handler):
            raise TypeError(
                f"handler must be a function from an error to True or False, got {handler!r}: give "
                "webdataset.warn_and_continue, or None to raise"
            )
        self._max_failed = _check_share(max_failed)
        self._spared = IN_A_ROW - 1 if max_failed is None else 0
        self._handler, self._least = handler, max(1, min(least, LEAST))
        self._tally = Tally(REASONS)
        self._in_a_row = self._untold = 0
        # The last failures of this process, in words.
        self._last: deque[str] = deque(maxlen=IN_A_ROW)

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """How many samples were skipped so far, by shard and then by reason, in all processes."""
        return self._tally.by_shard()

    def sift(self, found: Sequence[Any]) -> list[Any]:
        """The samples among what was read for one batch; all count as taken.

        Args:
            found: samples, and `Failed` in place of those that could not be read.

        Raises:
            Exception: The handler did not skip an error; it is raised.
            RuntimeError: No sample is left, or too many have failed.
        """
        self._tally.take(len(found))
        samples = []
        for each in found:
            if isinstance(each, Failed):
                self._skip(each)
            else:
                samples.append(each)
                self._in_a_row = 0
        if found and not samples:
            lost = [str(each) for each in found]
            raise RuntimeError(
                f"none of a batch's {len(found)} samples could be read, and without it this replica would have a "
                f"batch fewer than others: mend the shards, or leave these samples out\n{self._list(lost)}"
            ) from found[0].error
        return samples

    def take(self) -> None:
        """Count a sample that was read."""
        self._in_a_row = 0
        self._untold += 1
        if self._untold >= _TOLD_EVERY:
            self._tell()

    def _tell(self) -> None:
        self._tally.take(self._untold)
        self._untold = 0

    def skip(self, failed: Failed) -> None:
        """Skip a sample if its error allows it and the handler says so, and count it.

        Raises:
            Exception: It must not be skipped, or the handler did not skip it; it is raised.
            RuntimeError: Too many have failed.
        """
        self._untold += 1
        self._tell()
        self._skip(failed)

    def _skip(self, failed: Failed) -> None:
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
        """Know that a source has ended: what was taken is all that there is.

        Raises:
            RuntimeError: Too many have failed.
        """
        self._tell()
        info = get_worker_info()
        # Other workers may have most of their samples before them.
        if info is None or info.num_workers == 1:
            self._check_share(1)

    def _check_share(self, least: int) -> None:
        taken, skipped = self._tally.totals()
        samples = -(-taken // least) * least
        if skipped > max(self._max_failed * samples, self._spared):
            raise RuntimeError(
                f"{skipped} of {taken} samples could not be read, more than max_failed={self._max_failed:g} of "
                f"{samples}: mend the data, or raise max_failed\n{self._list(self._last)}"
            )

    def _list(self, last: Sequence[str]) -> str:
        counts = self.counts
        lines = [
            f"{shard or 'an unknown shard'}: " + ", ".join(f"{count} {reason}" for reason, count in reasons.items())
            for shard, reasons in counts.items()
        ]
        more = [f"and {len(lines) - _SHOWN_SHARDS} shards more"] if len(lines) > _SHOWN_SHARDS else []
        return "\n".join(["skipped so far:", *lines[:_SHOWN_SHARDS], *more, "the last of this process:", *last])


def make_skipping(handler: Handler | None, max_failed: float | None, least: int = LEAST) -> Skipping | None:
    """The rule for a handler; None where errors are raised. The errors are those of `Skipping`."""
    # A wrong share is an error also while the handler is left out.
    _check_share(max_failed)
    return None if handler is None else Skipping(handler, max_failed, least)


def _check_share(max_failed: float | None) -> float:
    if max_failed is None:
        return MAX_FAILED
    if isinstance(max_failed, bool) or not isinstance(max_failed, (int, float, np.integer, np.floating)):
        raise TypeError(f"max_failed must be a number, got {max_failed!r}: give a share of samples, 0 to 1")
    if not 0 <= max_failed <= 1:
        raise ValueError(f"max_failed must be a share of samples, 0 to 1, got {max_failed}")
    return float(max_failed)


def is_damage(error: Exception) -> bool:
    """Whether an error tells of damage to data, and not of a mistake in a program or of a machine in want."""
    if isinstance(error, OSError):
        return error.errno not in _SHORTAGES
    return isinstance(error, (ValueError, EOFError, zlib.error, struct.error, MissingFieldError))


def find_reason(error: Exception) -> str:
    """The reason under which an error is counted."""
    kinds: Mapping[str, Any] = {
        "length": LengthError,
        "missing": FileNotFoundError,
        "unreadable": (OSError, EOFError),
        "field": MissingFieldError,
    }
    return next((reason for reason, kind in kinds.items() if isinstance(error, kind)), "damaged")


def read_apart(
    read: Callable[[RowIndices], list[Any]], rows: RowIndices, fail: Callable[[Exception, int], Failed]
) -> list[Any]:
    """Read samples together where that goes, and where it does not, in halves, down to those that fail.

    Args:
        read: from rows to their samples.
        rows: integers `[n]`.
        fail: from an error and a row to what stands in the sample's place.

    Returns:
        n samples, or what stands in their place.

    Raises:
        Exception: It is no damage to data.
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
