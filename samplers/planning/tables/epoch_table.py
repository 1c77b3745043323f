"""EpochTable: what a schedule, a plan and a position need of the batches of any epoch, however they are made."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cached_property
from typing import ClassVar, Final, Self, TypeAlias, TypeVar

from samplers.planning.budget import Integers
from samplers.planning.options import EpochOptions
from samplers.planning.sorting import IndexArray
from samplers.planning.tables.epoch_order import EpochOrder

Shape: TypeAlias = tuple[int, tuple[int, ...]]
"""Rows, and the padded width of each field."""
KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")
# Positions of two epochs may be asked for in turn, at the end of one.
_KEPT_EPOCHS: Final = 2


class EpochTable(ABC):
    """The batches of an epoch by batch id: every epoch has equally many.

    Attributes:
        options: The planner's.
        item: What the batches of the last step are split by, for messages.
    """

    options: EpochOptions
    item: ClassVar[str] = "row"

    @abstractmethod
    def __len__(self) -> int:
        """Batches in an epoch, before any is split among replicas."""

    @property
    def whole_batches(self) -> int:
        """Batches that a whole step may have; the others, which are short, belong to the last step."""
        return len(self)

    def has_whole_steps(self, num_replicas: int) -> bool:
        """Whether the batches of an epoch make whole steps, so that none is split for the last one."""
        return self.options.drop_last or len(self) % num_replicas == 0

    @property
    @abstractmethod
    def planned(self) -> int:
        """Samples in an epoch."""

    @property
    @abstractmethod
    def dataset_size(self) -> int:
        """Samples in the dataset, with those that are not planned."""

    @property
    @abstractmethod
    def lengths_digest(self) -> str:
        """Sixteen hexadecimal digits that change when a length changes."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """Sixteen hexadecimal digits that change when the batches or the choice of samples change."""

    @property
    def other_windows(self) -> int | None:
        """What other windows the epochs have that `digest` does not tell of; None where all epochs have the same."""
        return None

    @property
    def stage_text(self) -> str:
        """What a position of a mixture tells, next to its numbers; empty where there is nothing to tell."""
        return ""

    def with_stage_text(self, text: str) -> Self:
        """The table to which a position with this text belongs.

        Raises:
            ValueError: The text is not one of a mixture's positions.
        """
        del text
        return self

    @property
    @abstractmethod
    def shapes(self) -> list[Shape]:
        """The shapes that hold every batch of any epoch, without repetition."""

    @property
    @abstractmethod
    def trial_epochs(self) -> Iterable[int]:
        """Epochs that show whether replicas can share the last step of every epoch."""

    @abstractmethod
    def for_epoch(self, epoch: int, num_replicas: int) -> Self:
        """The table of an epoch that this many replicas begin."""

    @abstractmethod
    def order(self, epoch: int, num_replicas: int) -> EpochOrder:
        """The order of this table's batches in an epoch that this many replicas begin."""

    @abstractmethod
    def batch_rows(self, batch_ids: Integers) -> Integers:
        """Samples of these batches: int64 `[n]`."""

    def has_rows(self, batch_ids: Integers, count: int) -> bool:
        """Whether these batches, int64 `[n]`, have `count` samples together."""
        return int(self.batch_rows(batch_ids).sum()) >= count

    @abstractmethod
    def sample_lengths(self, samples: IndexArray) -> Integers:
        """Lengths of samples `[n]` as they are planned, cut where they are cut: int64 `[n, K]`."""

    @abstractmethod
    def batch_samples(self, batch_ids: Integers, key: int) -> tuple[IndexArray, Integers]:
        """The samples of these batches, one batch after the other.

        Args:
            batch_ids: int64 `[n]`, each in `range(len(table))`.
            key: Random key of the epoch.

        Returns:
            Sample indices `[sum(rows)]`, and the samples of each batch, int64 `[n]`.
        """

    @abstractmethod
    def share_batches(self, batch_ids: Integers, key: int, num_replicas: int) -> list[IndexArray]:
        """The samples of the last step's batches, split into a piece for each replica.

        Args:
            batch_ids: At most as many batches as replicas, with at least as many samples.
            key: Random key of the epoch.
            num_replicas: How many pieces there must be.
        """


class KeptEpochs(EpochTable):
    """A table that makes another one for each epoch, and keeps the last two."""

    def for_epoch(self, epoch: int, num_replicas: int) -> Self:
        """The table of an epoch that this many replicas begin; the last two are kept."""
        key = epoch, num_replicas
        if key not in self._epochs:
            keep(self._epochs, key, self._make_epoch(epoch, num_replicas), most=_KEPT_EPOCHS)
        return self._epochs[key]

    @abstractmethod
    def _make_epoch(self, epoch: int, num_replicas: int) -> Self:
        """The table of an epoch that this many replicas begin."""

    @cached_property
    def _epochs(self) -> dict[tuple[int, int], Self]:
        """Tables of some epochs, by epoch and replicas."""
        return {}


def keep(values: dict[KeyT, ValueT], key: KeyT, value: ValueT, *, most: int) -> None:
    """Keep a new value; where `most` are kept already, the first of them is forgotten.

    >>> squares = {1: 1, 2: 4}
    >>> keep(squares, 3, 9, most=2)
    >>> squares
    {2: 4, 3: 9}
    """
    while len(values) >= most:
        del values[next(iter(values))]
    values[key] = value
