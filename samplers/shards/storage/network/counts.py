"""Counts of what was transferred, and how long it was waited for.

Each dataset has its own counts, and `PROCESS` those of the process and of its workers. The progress bars and
`lengthtrack --transfers` show these.
"""

import os
import threading
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, Final

import numpy as np
import numpy.typing as npt

# Requests (with all tries), tries after the first, requests sent a second time because the first took long, bytes
# received, nanoseconds that a reader stood still, shards found in the cache, shards that were not, and bytes sent.
NAMES: Final = (
    *("requests", "retries", "second_requests", "bytes", "waited", "cache_hits", "cache_misses"),
    "bytes_sent",
)
_BAR_SECONDS: Final = 0.1


class Counts:
    """Counts of one object. What they count is also counted in `PROCESS`.

    >>> counts = Counts()
    >>> counts.add("bytes", 100)
    >>> counts.as_dict()["bytes"]
    100
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._cells: npt.NDArray[np.int64] = np.zeros(len(NAMES), np.int64)

    def add(self, name: str, count: int = 1) -> None:
        """Add to a count.

        Args:
            name: One of `NAMES`.
            count: How many.
        """
        with self._lock:
            self._row()[NAMES.index(name)] += count
        PROCESS.add(name, count)

    def as_dict(self) -> dict[str, Any]:
        """All counts by name. `waited` is `waited_seconds`, a float."""
        totals = dict(zip(NAMES, self._totals().tolist(), strict=True))
        waited = totals.pop("waited")
        return {**totals, "waited_seconds": waited / 1e9}

    def _row(self) -> npt.NDArray[np.int64]:
        """Where this process counts."""
        return self._cells

    def _totals(self) -> npt.NDArray[np.int64]:
        return self._cells


class _Uncounted(Counts):
    """Counts for the process alone, and has no lock that a thread could hold while a process is forked."""

    def add(self, name: str, count: int = 1) -> None:
        """Add to the counts of the process."""
        PROCESS.add(name, count)


class ProcessCounts(Counts):
    """The counts of all objects of this process. A forked process begins with zeros."""

    def __init__(self) -> None:
        super().__init__()
        self._process = os.getpid()
        # Numbers of Python: an entry of an array takes three times as long.
        self._sums = dict.fromkeys(NAMES, 0)

    def add(self, name: str, count: int = 1) -> None:
        """Add to a count, see `Counts`."""
        if self._process != os.getpid():
            self._begin()
        with self._lock:
            self._sums[name] += count

    def add_all(self, counts: Mapping[str, int]) -> None:
        """Add to several counts: those that a worker process has sent."""
        for name, count in counts.items():
            self.add(name, count)

    def take(self) -> dict[str, int]:
        """The counts that are not zero, which are zero from now on: a worker sends them to its parent."""
        if self._process != os.getpid():
            self._begin()
        with self._lock:
            taken = {name: count for name, count in self._sums.items() if count}
            self._sums = dict.fromkeys(NAMES, 0)
        return taken

    def _totals(self) -> npt.NDArray[np.int64]:
        if self._process != os.getpid():
            self._begin()
        with self._lock:
            return np.array([self._sums[name] for name in NAMES], np.int64)

    def _begin(self) -> None:
        """Forget the counts of the process from which this one was forked."""
        # The lock too: a thread of the parent may have held it.
        self._lock = threading.Lock()
        self._sums = dict.fromkeys(NAMES, 0)
        self._process = os.getpid()


class _Here(threading.local):
    """What this thread is for."""

    in_background = False


# Reads of a thread that reads ahead keep nobody waiting.
HERE: Final = _Here()
PROCESS: Final = ProcessCounts()
# For files that nobody counts.
UNCOUNTED: Final = _Uncounted()


def describe_transfers(counts: Mapping[str, Any]) -> str:
    """Counts as text.

    >>> describe_transfers({"requests": 12, "retries": 1, "bytes": 4_200_000, "waited_seconds": 1.234})
    '12 requests, 1 retry, 4.2 MB, waited 1.2 s'
    """
    requests, retries = counts["requests"], counts["retries"]
    parts = [f"{requests:,} request{'s' * (requests != 1)}", f"{retries:,} {'retry' if retries == 1 else 'retries'}"]
    second, sent = counts.get("second_requests", 0), counts.get("bytes_sent", 0)
    parts += [f"{second:,} sent twice"] * (second > 0)
    parts += [f"{_as_bytes(counts['bytes'])}"] if not sent or counts["bytes"] else []
    parts += [f"{_as_bytes(sent)} sent"] * (sent > 0)
    return ", ".join([*parts, f"waited {counts['waited_seconds']:.1f} s"])


class TransferBar:
    """Shows behind a progress bar what was transferred since it began; nothing before the first request.

    Args:
        bar: The bar, of tqdm.
        read: Gives the counts by name. By default those of the process and its workers.
    """

    def __init__(self, bar: Any, read: Callable[[], Mapping[str, Any]] | None = None) -> None:
        self._bar, self._read = bar, PROCESS.as_dict if read is None else read
        self._before = self._read()
        self._next = 0.0

    def show(self, *, is_end: bool = False) -> None:
        """Show the counts of this moment, with the bar's next change. At the end the bar must still be open."""
        # Called for each of many short items: a bar changes ten times a second.
        if self._bar.disable or (monotonic() < self._next and not is_end):
            return
        self._next = monotonic() + _BAR_SECONDS
        now = {name: count - self._before[name] for name, count in self._read().items()}
        if now["requests"]:
            self._bar.set_postfix_str(describe_transfers(now), refresh=False)


def _as_bytes(size: int) -> str:
    """A number of bytes as text: 1.2 MB is 1,200,000 bytes."""
    number, unit = float(size), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if number < 1000:
            break
        number, unit = number / 1000, larger
    return f"{size} B" if unit == "B" else f"{number:.1f} {unit}"
