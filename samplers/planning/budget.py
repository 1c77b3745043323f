"""What a batch may cost: padded or real tokens, rows, or a custom cost function."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from collate.widths import check_count

Integers: TypeAlias = npt.NDArray[np.int64]
"""An int64 array."""
Floats: TypeAlias = npt.NDArray[np.float64]
"""A float64 array."""
Count: TypeAlias = Literal["padded", "real"]
"""What a budget counts: padded time steps (rows x width), or real ones (the sum of lengths)."""
Cost: TypeAlias = Callable[[Integers, Integers], Any]
"""From rows int64 `[n]` and widths int64 `[n]` (K fields: `[n, K]`) to costs `[n]`; 1 is a full batch."""

# More rows than any corpus holds, and few enough that rows x width stays within int64.
MANY_ROWS: Final = 1 << 40


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The limits of a batch of two rows or more; a batch must keep all limits that are given.

    Args:
        max_tokens: Tokens in a batch, counted as `count_tokens` says.
        batch_size: Rows in a batch.
        cost: A custom cost function: a batch fits if `cost(rows, width) <= 1`. It is called with int64 arrays `[n]`
            (`width` is `[n, K]` if samples have K fields), returns `[n]` numbers, and must not fall when a batch gets
            more rows or more time steps.
        count_tokens: With `"padded"`, `max_tokens` limits rows x padded width, summed over fields. With `"real"`, it
            limits the sum of lengths, for training without padding.

    Raises:
        TypeError: A limit is not an int, or `cost` is not callable.
        ValueError: A limit is below one, no limit is given, or `count_tokens` is unknown or has no `max_tokens`.

    Examples:
        A budget of 20 padded tokens holds 2 rows of width 9, and 5 rows of width 4:

        >>> budget = Budget(max_tokens=20)
        >>> budget.max_rows(9), budget.max_rows(4)
        (2, 5)
    """

    max_tokens: int | None = None
    batch_size: int | None = None
    cost: Cost | None = None
    count_tokens: Count = "padded"

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
        if self.max_tokens is None and self.batch_size is None and not getattr(self.cost, "grows_with_rows", True):
            raise ValueError(
                f"cost must grow with the rows of a batch where nothing else limits them, got {self.cost!r}: the whole "
                "corpus would be one batch; give batch_size or max_tokens too, or fit the cost to steps of more rows"
            )
        if self.count_tokens not in {"padded", "real"}:
            raise ValueError(f"count_tokens must be 'padded' or 'real', got {self.count_tokens!r}")
        if self.count_tokens == "real" and self.max_tokens is None:
            raise ValueError("count_tokens='real' says how max_tokens is counted, got no max_tokens: set it as well")

    @property
    def fixed_rows(self) -> int | None:
        """Rows of every batch but one, where `batch_size` is the only limit; else None."""
        return self.batch_size if self.max_tokens is None and self.cost is None else None

    def use(self, rows: Integers, widths: Integers, tokens: Integers) -> Floats:
        """The share of the budget that batches use: the largest of their shares of each limit.

        Args:
            rows: int64 `[n]`.
            widths: Padded widths, int64 `[n]` or `[n, K]`.
            tokens: Real tokens, int64 `[n]`.

        Returns:
            float64 `[n]`; a batch fits if its share is at most 1.

        Raises:
            ValueError: `cost` returns another shape than `[n]`, or NaN.
        """
        # 3 rows of width 10 are 0.75 of 40 tokens and 0.6 of 5 rows: they use 0.75 of the budget.
        shares = np.zeros(len(rows))
        if self.max_tokens is not None:
            counted = tokens if self.count_tokens == "real" else rows * _across(widths)
            shares = counted / self.max_tokens
        if self.batch_size is not None:
            shares = np.maximum(shares, rows / self.batch_size)
        if self.cost is not None:
            shares = np.maximum(shares, self._costs(rows, widths))
        return shares

    def fits(self, rows: int, width: Sequence[int], tokens: int) -> bool:
        """Whether one batch keeps every limit: like `use`, but in Python ints, for batches that grow row by row.

        Args:
            rows: Rows of the batch.
            width: Padded width of each field.
            tokens: Real tokens over all fields.
        """
        if self.batch_size is not None and rows > self.batch_size:
            return False
        counted = tokens if self.count_tokens == "real" else rows * sum(width)
        if self.max_tokens is not None and counted > self.max_tokens:
            return False
        return self.cost is None or self._affords(rows, np.array([width[0] if len(width) == 1 else width], np.int64))

    def max_rows(self, width: int | tuple[int, ...]) -> int:
        """The largest number of rows that fit at a padded width, whatever their real lengths; 0 if one row does not."""
        if width not in self._cached_rows:
            self._cached_rows[width] = self._find_rows(width)
        return self._cached_rows[width]

    def rows_at(self, widths: Integers) -> Integers:
        """`max_rows` of each of these widths of one field: int64 `[n]`."""
        if self.cost is not None:
            return np.array([self.max_rows(width) for width in widths.tolist()], np.int64)
        most = np.full(len(widths), MANY_ROWS if self.batch_size is None else self.batch_size)
        return most if self.max_tokens is None else np.minimum(most, self.max_tokens // np.maximum(widths, 1))

    @cached_property
    def _cached_rows(self) -> dict[int | tuple[int, ...], int]:
        """The results of `max_rows` so far, by width."""
        return {}

    def _find_rows(self, width: int | tuple[int, ...]) -> int:
        """`max_rows`, computed."""
        most = MANY_ROWS if self.batch_size is None else self.batch_size
        if self.max_tokens is not None:
            most = min(most, self.max_tokens // max(1, sum(width) if isinstance(width, tuple) else width))
        if self.cost is None or most == 0:
            return most
        return self._rows_within_cost(np.array([width], np.int64), most)

    def _rows_within_cost(self, width: Integers, most: int) -> int:
        """The largest number of rows, up to `most`, whose cost is at most one: found by bisection."""
        # Doubling first: a cost function may overflow, or be slow, at row counts that no batch reaches.
        high = 1
        while high <= most and self._affords(high, width):
            high *= 2
        low, high = high // 2, min(high, most + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._affords(middle, width) else (low, middle)
        return low

    def _affords(self, rows: int, width: Integers) -> bool:
        """Whether the cost function accepts this many rows."""
        return bool(self._costs(np.array([rows], np.int64), width)[0] <= 1)

    def _costs(self, rows: Integers, widths: Integers) -> Floats:
        """The checked results of the cost function: float64 `[n]`.

        Raises:
            ValueError: They have another shape, or one is NaN or negative.
        """
        costs = np.asarray(0.0 if self.cost is None else self.cost(rows, widths), np.float64)
        if costs.shape != rows.shape:
            raise ValueError(f"cost must return one number per batch, {list(rows.shape)}, got {list(costs.shape)}")
        if np.isnan(costs).any():
            entry = int(np.isnan(costs).argmax())
            raise ValueError(f"cost must return numbers, got nan for {rows[entry]} rows of width {widths[entry]}")
        if (costs < 0).any():
            entry = int((costs < 0).argmax())
            raise ValueError(
                f"cost must return fractions of the budget from 0 on, got {costs[entry]} for {rows[entry]} rows of "
                f"width {widths[entry]}"
            )
        return costs


def _across(widths: Integers) -> Integers:
    """The width of each batch over all fields: `[n]`."""
    return widths if widths.ndim == 1 else widths.sum(1)
