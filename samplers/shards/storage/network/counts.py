"""Counts of what was transferred, and how long it was waited for."""

import threading
from typing import Any, Final

import numpy as np
import numpy.typing as npt

# Requests (with all tries), tries after the first, requests sent a second time because the first took long, bytes
# received, nanoseconds that a reader stood still, shards found in the cache, and shards that were not.
NAMES: Final = ("requests", "retries", "second_requests", "bytes", "waited", "cache_hits", "cache_misses")


class Counts:
    """Counts of one process.

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
    """Counts nothing, and so has no lock that a thread could hold while a process is forked."""

    def add(self, name: str, count: int = 1) -> None:
        """Count nothing."""


class _Here(threading.local):
    """What this thread is for."""

    in_background = False


# Reads of a thread that reads ahead keep nobody waiting.
HERE: Final = _Here()
# For files that nobody counts.
UNCOUNTED: Final = _Uncounted()
