"""Counts by shard and reason, in memory that a loader's workers share."""

import math
import os
import threading
from collections import Counter
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from time import sleep
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

# Rows, one for each process that counts at the same time; of each, kinds that it can tell apart and bytes of names.
MAX_PROCESSES: Final = 128
ENTRIES: Final = 1023
NAME_BYTES: Final = 1 << 15
# Under this name stand shards that found no room in a row.
FURTHER: Final = "(further shards)"

# A row: the process that owns it, samples taken and skipped, entries, and at the end one count for each reason.
_OWNER, _TAKEN, _SKIPPED, _FIRST = range(4)
# The high half of an entry is the kind plus 1, the low half how often it was counted.
_HALF: Final = 32
_NAME_END: Final = b"\n"
_CLAIM_SECONDS: Final = 1e-3


def shared_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in memory that processes share.

    `share_memory_` copies with the threads of OpenMP, which hang in a process that was forked from one that has used
    them; new shared memory needs no copy, and the system fills it with zeros.
    """
    size = math.prod(shape) * dtype.itemsize
    storage = torch.UntypedStorage._new_shared(size, device="cpu")  # noqa: SLF001
    return torch.empty(0, dtype=dtype).set_(storage).reshape(shape)


class Totals(NamedTuple):
    """Samples of all processes: how many were taken, and how many of these were skipped."""

    taken: int
    skipped: int


class Tally:
    """How many samples were skipped, by shard and reason, over all processes that share this memory.

    No process writes what another one writes: each has a row of its own. A count and what it counts are one int64,
    which a processor reads and writes whole, so that a reader never sees half of it, and a writer that is killed leaves
    it right. A row whose process has ended goes to the next one, with its counts. A copy, and a pickle, counts from
    zero; what `torch.multiprocessing` sends to another process is no copy, for a worker must share.

    Args:
        reasons: all that there are.
        cells: memory that is shared already, int64 `[ROWS, n]`; None for new memory.
        names: names of shards in each row, uint8 `[ROWS, NAME_BYTES]`; None for new memory.
    """

    def __init__(
        self, reasons: Sequence[str], cells: torch.Tensor | None = None, names: torch.Tensor | None = None
    ) -> None:
        self._reasons = tuple(reasons)
        if cells is None or names is None:
            width = _FIRST + ENTRIES + len(self._reasons)
            cells = shared_zeros((MAX_PROCESSES, width), torch.int64)
            names = shared_zeros((MAX_PROCESSES, NAME_BYTES), torch.uint8)
        self._cells, self._names = cells, names
        self._table, self._text = cells.numpy(), names.numpy()
        self._forget()

    def __reduce__(self) -> tuple[Any, ...]:
        return Tally, (self._reasons,)

    def to_process(self) -> tuple[Any, ...]:
        """How it is sent to another process, which then shares it."""
        return Tally, (self._reasons, self._cells, self._names)

    def take(self, samples: int) -> None:
        """Count samples that were taken, those that are skipped among them."""
        row = self._own_row()
        with self._lock:
            self._table[row, _TAKEN] += samples

    def skip(self, shard: str, reason: str) -> None:
        """Count a sample that was skipped.

        Args:
            shard: path or URL; "" where nobody knows.
            reason: one of those that there are.
        """
        row = self._own_row()
        with self._lock:
            self._table[row, self._place_of(row, shard, self._reasons.index(reason))] += 1
            self._table[row, _SKIPPED] += 1

    def totals(self) -> Totals:
        """What all processes have taken and skipped so far."""
        return Totals(int(self._table[:, _TAKEN].sum()), int(self._table[:, _SKIPPED].sum()))

    def by_shard(self) -> dict[str, dict[str, int]]:
        """How many samples were skipped so far, by shard and then by reason, in the order of names."""
        found: Counter[tuple[str, str]] = Counter()
        table = self._table.copy()
        for row in np.flatnonzero(table[:, _SKIPPED] | table[:, _OWNER]).tolist():
            shards = self._shards_of(row)
            for entry in table[row, _FIRST : _FIRST + ENTRIES].tolist():
                shard, reason = divmod((entry >> _HALF) - 1, len(self._reasons))
                # What a process is just about to name has no name yet.
                if entry and shard < len(shards):
                    found[shards[shard], self._reasons[reason]] += entry % (1 << _HALF)
            for reason, count in zip(self._reasons, table[row, _FIRST + ENTRIES :].tolist(), strict=True):
                found[FURTHER, reason] += count
        counts: dict[str, dict[str, int]] = {}
        for (shard, reason), count in sorted(found.items()):
            if count:
                counts.setdefault(shard, {})[reason] = count
        return counts

    def _forget(self) -> None:
        # What belongs to a process: its row, and where in it which kind is counted.
        self._process, self._row = 0, 0
        self._places: dict[tuple[str, int], int] = {}
        self._numbers: dict[str, int] = {}
        self._lock = threading.Lock()

    def _own_row(self) -> int:
        process = os.getpid()
        if self._process != process or self._table[self._row, _OWNER] != process:
            self._forget()
            self._row = self._claim(process)
            self._numbers = {shard: number for number, shard in enumerate(self._shards_of(self._row))}
            self._process = process
        return self._row

    def _claim(self, process: int) -> int:
        # Workers of one loader begin at rows of their own. Where two loaders run at once, the later one looks further;
        # if two processes take a row at the same moment, the later one keeps it, and the other sees so.
        info = get_worker_info()
        first = 0 if info is None else 1 + info.id
        owners = self._table[:, _OWNER]
        for row in ((first + step) % MAX_PROCESSES for step in range(MAX_PROCESSES)):
            owner = int(owners[row])
            if owner in {0, process} or not is_alive(owner):
                owners[row] = process
                sleep(_CLAIM_SECONDS)
                if owners[row] == process:
                    return row
        # More processes than rows: to lose a count is better than to end the run.
        owners[first % MAX_PROCESSES] = process
        return first % MAX_PROCESSES

    def _place_of(self, row: int, shard: str, reason: int) -> int:
        if (shard, reason) not in self._places:
            self._places[shard, reason] = self._find_place(row, shard, reason)
        return self._places[shard, reason]

    def _find_place(self, row: int, shard: str, reason: int) -> int:
        further = _FIRST + ENTRIES + reason
        number = self._number_of(row, shard)
        if number is None:
            return further
        kind = number * len(self._reasons) + reason + 1
        entries = self._table[row, _FIRST : _FIRST + ENTRIES]
        free = np.flatnonzero((entries >> _HALF == kind) | (entries == 0))
        if not len(free):
            return further
        if not entries[free[0]]:
            entries[free[0]] = kind << _HALF
        return _FIRST + int(free[0])

    def _number_of(self, row: int, shard: str) -> int | None:
        if shard not in self._numbers:
            name = shard.encode("utf-8", "surrogateescape").replace(_NAME_END, b" ") + _NAME_END
            used = sum(len(known.encode("utf-8", "surrogateescape")) + 1 for known in self._numbers)
            if used + len(name) > NAME_BYTES:
                return None
            self._text[row, used : used + len(name)] = np.frombuffer(name, np.uint8)
            self._numbers[shard] = len(self._numbers)
        return self._numbers[shard]

    def _shards_of(self, row: int) -> list[str]:
        *names, _ = self._text[row].tobytes().split(_NAME_END)
        return [name.decode("utf-8", "surrogateescape") for name in names]


def is_alive(process: int) -> bool:
    """Whether a process is there; True where the system does not tell."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# For processes that are started, and queues between them: there a tensor in shared memory is sent as a handle.
ForkingPickler.register(Tally, Tally.to_process)
