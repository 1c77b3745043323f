"""What a batch may cost: padded or real tokens, rows, or a user's own measure."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from collate.widths import check_count

Integers: TypeAlias = npt.NDArray[np.int64]
Floats: TypeAlias = npt.NDArray[np.float64]
Count: TypeAlias = Literal["padded", "real"]
Cost: TypeAlias = Callable[[Integers, Integers], Any]

# More rows than any corpus holds, and few enough that rows x width stays within int64.
MANY_ROWS: Final = 1 << 40


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The limits that a batch of two rows or more must hold; all that are given hold together.

    Args:
        max_tokens: tokens in a batch, counted as `count` says.
        batch_size: rows in a batch.
        cost: a measure of one's own, in shares of what a batch may cost: `cost(rows, width) <= 1` fits. It is called
            with int64 arrays `[n]` (`width` is `[n, K]` where samples have K fields), returns `[n]` numbers, and must
            not fall when a batch gets more rows or more steps.
        count: `"padded"`: `max_tokens` is rows x padded width, summed over fields. `"real"`: it is the sum of lengths,
            for training without padding.

    Raises:
        TypeError: A limit is not an int, or `cost` cannot be called.
        ValueError: A limit is below one, none is given, or `count` is unknown or has no `max_tokens`.
    """

    max_tokens: int | None = None
    batch_size: int | None = None
    cost: Cost | None = None
    count: Count = "padded"

    def __post_init__(self) -> None:
        if self.max_tokens is None and self.batch_size is None and self.cost is None:
            raise ValueError("a budget must be given, got none: set max_tokens, batch_size or cost")
        for name in ("max_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None:
                hint = "give a positive number, or None for no such limit"
                object.__setattr__(self, name, check_count(name, value, least=1, hint=hint))
        if self.cost is not None and not callable(self.cost):
            raise TypeError(f"cost must be a function of (rows, width), got {self.cost!r}")
        if self.count not in {"padded", "real"}:
            raise ValueError(f"count must be 'padded' or 'real', got {self.count!r}")
        if self.count == "real" and self.max_tokens is None:
            raise ValueError("count='real' says how max_tokens is counted, got no max_tokens: set it as well")

    def use(self, rows: Integers, widths: Integers, tokens: Integers) -> Floats:
        """The share of the budget that batches use: the greatest of their shares of each limit.

        Args:
            rows: int64 `[n]`.
            widths: padded widths, int64 `[n]` or `[n, K]`.
            tokens: real tokens, int64 `[n]`.

        Returns:
            float64 `[n]`; a batch fits if its share is at most 1.

        Raises:
            ValueError: `cost` returns another shape than `[n]`, or NaN.
        """
        shares = np.zeros(len(rows))
        if self.max_tokens is not None:
            counted = tokens if self.count == "real" else rows * _across(widths)
            shares = counted / self.max_tokens
        if self.batch_size is not None:
            shares = np.maximum(shares, rows / self.batch_size)
        if self.cost is not None:
            shares = np.maximum(shares, self._costs(rows, widths))
        return shares

    def fits(self, rows: int, width: Sequence[int], tokens: int) -> bool:
        """Whether a single batch holds every limit: `use` for Python ints, for batches that grow row by row.

        Args:
            rows: of the batch.
            width: padded width of each field.
            tokens: real tokens over all fields.
        """
        if self.batch_size is not None and rows > self.batch_size:
            return False
        counted = tokens if self.count == "real" else rows * sum(width)
        if self.max_tokens is not None and counted > self.max_tokens:
            return False
        return self.cost is None or self._affords(rows, np.array([width[0] if len(width) == 1 else width], np.int64))

    def max_rows(self, width: int | tuple[int, ...]) -> int:
        """The most rows that fit at a padded width, whatever their real lengths: 0 where not even one does."""
        if width not in self._known:
            self._known[width] = self._find_rows(width)
        return self._known[width]

    @cached_property
    def _known(self) -> dict[int | tuple[int, ...], int]:
        return {}

    def _find_rows(self, width: int | tuple[int, ...]) -> int:
        most = MANY_ROWS if self.batch_size is None else self.batch_size
        if self.max_tokens is not None:
            most = min(most, self.max_tokens // max(1, sum(width) if isinstance(width, tuple) else width))
        if self.cost is None or most == 0:
            return most
        return self._rows_within_cost(np.array([width], np.int64), most)

    def _rows_within_cost(self, width: Integers, most: int) -> int:
        # Doubling first: a cost function may overflow, or take its time, at row counts that no batch reaches.
        high = 1
        while high <= most and self._affords(high, width):
            high *= 2
        low, high = high // 2, min(high, most + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._affords(middle, width) else (low, middle)
        return low

    def _affords(self, rows: int, width: Integers) -> bool:
        return bool(self._costs(np.array([rows], np.int64), width)[0] <= 1)

    def _costs(self, rows: Integers, widths: Integers) -> Floats:
        costs = np.asarray(0.0 if self.cost is None else self.cost(rows, widths), np.float64)
        if costs.shape != rows.shape:
            raise ValueError(f"cost must return one number per batch, {list(rows.shape)}, got {list(costs.shape)}")
        if np.isnan(costs).any():
            place = int(np.isnan(costs).argmax())
            raise ValueError(f"cost must return numbers, got nan for {rows[place]} rows of width {widths[place]}")
        return costs


def _across(widths: Integers) -> Integers:
    return widths if widths.ndim == 1 else widths.sum(1)
