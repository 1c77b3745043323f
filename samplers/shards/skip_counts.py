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

from samplers.shards.format.keys import decode_key, encode_key

# Rows of the table, one for each process that counts at the same time. Each has entries, one for each pair of shard and
# reason, and bytes for the names of shards.
MAX_PROCESSES: Final = 128
ENTRIES: Final = 1023
NAME_BYTES: Final = 1 << 15
# The name for shards that did not fit a row.
FURTHER: Final = "(further shards)"

# A row: its process, samples taken and skipped, the entries, and one count for each reason, for further shards.
_OWNER, _TAKEN, _SKIPPED, _FIRST = range(4)
# The upper 32 bits of an entry are the pair (shard, reason) plus 1, the lower 32 bits its count. With 5 reasons, shard
# 2 and reason 1 are the pair 2 * 5 + 1 = 11; counted 7 times the entry is (12 << 32) + 7.
_HALF: Final = 32
_NAME_END: Final = b"\n"
_CLAIM_SECONDS: Final = 1e-3


def shared_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in memory that processes share.

    `share_memory_` copies with OpenMP threads, which hang in a process that was forked after its parent had used them.
    New shared memory needs no copy, and the system fills it with zeros.
    """
    size = math.prod(shape) * dtype.itemsize
    storage = torch.UntypedStorage._new_shared(size, device="cpu")  # noqa: SLF001
    return torch.empty(0, dtype=dtype).set_(storage).reshape(shape)


class Totals(NamedTuple):
    """Samples of all processes: the number taken, and the number of these that were skipped."""

    taken: int
    skipped: int


class Tally:
    """Counts of skipped samples by shard and reason, over all processes that share this memory.

    There are no locks between processes: each process writes to its own row. An entry with its count is one int64,
    which processors read and write whole. So a reader never sees half of it, and a writer that is killed leaves it
    valid. When the process of a row has ended, the next process takes over the row with its counts. A copy or a pickle
    starts from zero. But `torch.multiprocessing` shares the memory with the process to which it sends a tally.

    Args:
        reasons: All reasons.
        cells: Shared memory, int64 `[MAX_PROCESSES, n]`. None for new memory.
        names: Names of shards in each row, uint8 `[MAX_PROCESSES, NAME_BYTES]`. None for new memory.
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
        """The pickle for another process, which shares the memory."""
        return Tally, (self._reasons, self._cells, self._names)

    def take(self, samples: int) -> None:
        """Count samples that were taken, including those that are skipped."""
        row = self._own_row()
        with self._lock:
            self._table[row, _TAKEN] += samples

    def skip(self, shard: str, reason: str) -> None:
        """Count a sample that was skipped.

        Args:
            shard: Path or URL, "" if unknown.
            reason: One of the reasons.
        """
        row = self._own_row()
        with self._lock:
            self._table[row, self._column_of(row, shard, self._reasons.index(reason))] += 1
            self._table[row, _SKIPPED] += 1

    def totals(self) -> Totals:
        """The numbers of all processes so far."""
        return Totals(int(self._table[:, _TAKEN].sum()), int(self._table[:, _SKIPPED].sum()))

    def by_shard(self) -> dict[str, dict[str, int]]:
        """Number of skipped samples so far, by shard and then by reason, in the order of names."""
        totals: Counter[tuple[str, str]] = Counter()
        table = self._table.copy()
        for row in np.flatnonzero(table[:, _SKIPPED] | table[:, _OWNER]).tolist():
            shards = self._shards_of(row)
            for entry in table[row, _FIRST : _FIRST + ENTRIES].tolist():
                shard, reason = divmod((entry >> _HALF) - 1, len(self._reasons))
                # A process writes the entry before the name, so the newest entry may have no name yet.
                if entry and shard < len(shards):
                    totals[shards[shard], self._reasons[reason]] += entry % (1 << _HALF)
            for reason, count in zip(self._reasons, table[row, _FIRST + ENTRIES :].tolist(), strict=True):
                totals[FURTHER, reason] += count
        counts: dict[str, dict[str, int]] = {}
        for (shard, reason), count in sorted(totals.items()):
            if count:
                counts.setdefault(shard, {})[reason] = count
        return counts

    def _forget(self) -> None:
        """Start without the state of another process: its row, and the columns of its entries."""
        self._process, self._row = 0, 0
        self._columns: dict[tuple[str, int], int] = {}
        self._numbers: dict[str, int] = {}
        self._lock = threading.Lock()

    def _own_row(self) -> int:
        """The row of this process."""
        process = os.getpid()
        if self._process != process or self._table[self._row, _OWNER] != process:
            self._forget()
            self._row = claim_row(self._table[:, _OWNER], process)
            self._numbers = {shard: number for number, shard in enumerate(self._shards_of(self._row))}
            self._process = process
        return self._row

    def _column_of(self, row: int, shard: str, reason: int) -> int:
        """The column of a pair in the row of this process, remembered."""
        if (shard, reason) not in self._columns:
            self._columns[shard, reason] = self._find_column(row, shard, reason)
        return self._columns[shard, reason]

    def _find_column(self, row: int, shard: str, reason: int) -> int:
        """The column of a pair: its entry, a free one, or the count for further shards."""
        further = _FIRST + ENTRIES + reason
        number = self._number_of(row, shard)
        if number is None:
            return further
        pair = number * len(self._reasons) + reason + 1
        entries = self._table[row, _FIRST : _FIRST + ENTRIES]
        free = np.flatnonzero((entries >> _HALF == pair) | (entries == 0))
        if not len(free):
            return further
        if not entries[free[0]]:
            entries[free[0]] = pair << _HALF
        return _FIRST + int(free[0])

    def _number_of(self, row: int, shard: str) -> int | None:
        """The number of a shard in this row. None if its name does not fit."""
        if shard not in self._numbers:
            text = encode_key(shard).replace(_NAME_END, b" ") + _NAME_END
            used = sum(len(encode_key(name)) + 1 for name in self._numbers)
            if used + len(text) > NAME_BYTES:
                return None
            self._text[row, used : used + len(text)] = np.frombuffer(text, np.uint8)
            self._numbers[shard] = len(self._numbers)
        return self._numbers[shard]

    def _shards_of(self, row: int) -> list[str]:
        """The names in a row."""
        *names, _ = self._text[row].tobytes().split(_NAME_END)
        return list(map(decode_key, names))


def claim_row(owners: Any, process: int) -> int:
    """Find a free row for a process, and make it its own.

    Args:
        owners: The process of each row, int64 `[MAX_PROCESSES]`, in shared memory. 0 where there was none yet.
        process: Number of the process.
    """
    # Workers of one loader start at different rows. With two loaders at once, the later one searches on. If two
    # processes write to a free row at the same moment, the later one keeps it, and the other sees that.
    info = get_worker_info()
    first = 0 if info is None else 1 + info.id
    for row in ((first + step) % MAX_PROCESSES for step in range(MAX_PROCESSES)):
        owner = int(owners[row])
        if owner in {0, process} or not is_alive(owner):
            owners[row] = process
            sleep(_CLAIM_SECONDS)
            if owners[row] == process:
                return row
    # More processes than rows: a lost count is better than the end of the run.
    owners[first % MAX_PROCESSES] = process
    return first % MAX_PROCESSES


def is_alive(process: int) -> bool:
    """Whether a process exists. True on systems that cannot tell."""
    if os.name != "posix":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# Used when processes are started and in queues between them: these send a tensor in shared memory as a handle.
ForkingPickler.register(Tally, Tally.to_process)
