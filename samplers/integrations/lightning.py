"""Lightning with planned batches: a DataModule whose checkpoints resume exactly, written during `fit` or after it."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningDataModule
from torch.utils.data import DataLoader

from samplers.integrations.plans import LengthsOf, make_sampler


class PositionLoader(DataLoader[Any]):
    """A loader whose state is the position of its batch sampler after the batches that it has handed over.

    Workers run ahead of it, and Lightning drops its iterators before some checkpoints: neither changes the state.
    """

    _used, _of = 0, 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        sampler: Any = self.batch_sampler
        # Nothing happens until the first batch is asked for: Lightning makes an iterator before it sets the epoch.
        self._used, self._of = 0, sampler.remaining
        for batch in super().__iter__():
            self._used += 1
            yield batch

    @property
    def is_mid_epoch(self) -> bool:
        """Whether batches of an iteration that has begun remain."""
        return 0 < self._used < self._of

    def state_dict(self) -> dict[str, Any]:
        """The position, on any number of processes and workers."""
        sampler: Any = self.batch_sampler
        return dict(sampler.position(self._used) if self._used else sampler.next_position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a position; from the end of an epoch, with the next one.

        Raises:
            ValueError: It is of other lengths, options, seed or version.
        """
        sampler: Any = self.batch_sampler
        sampler.seek(state)
        if not sampler.remaining:
            sampler.set_epoch(state["epoch"] + 1)


class MidEpoch(Callback):
    """Makes a checkpoint that is written after `fit` like one that is written within its last step."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take back that Lightning has counted an epoch which was broken off (`max_steps`, a stop, an error)."""
        del pl_module
        loader = getattr(trainer.train_dataloader, "flattened", trainer.train_dataloader)
        progress = checkpoint["loops"]["fit_loop"]["epoch_progress"]
        if isinstance(loader, PositionLoader) and loader.is_mid_epoch:
            for counts in (progress["current"], progress["total"]):
                counts["processed"] = counts["completed"] = min(counts["processed"], counts["started"] - 1)


class PlannedDataModule(LightningDataModule):
    """Planned batches for `Trainer(use_distributed_sampler=False)`.

    A checkpoint resumes exactly, on any number of processes and workers: also one that is written after `fit` has
    stopped within an epoch, which Lightning counts as a whole one.

    Args:
        train: Dataset for training, map-style.
        collate_fn: Makes a batch from a list of samples.
        plan: Options of `LengthBucketBatchSampler`, or with `capacity` of `PackingBatchSampler`.
        lengths: The column whose lengths count, or a function from a dataset to its lengths; None takes its index.
        val: Dataset for validation; None is no validation.
        val_collate_fn: None takes `collate_fn`.
        val_plan: None takes `plan`. Validation has the same batches each time.
        **loader_options: Of both loaders, as of a `DataLoader`, such as `num_workers`.

    Raises:
        TypeError: An option of a plan is unknown, when Lightning asks for the loader.
        ValueError: An option is out of its range, or the dataset has no such column, at that time.
    """

    def __init__(
        self,
        train: Any,
        *,
        collate_fn: Callable[[Any], Any],
        plan: Mapping[str, Any],
        lengths: LengthsOf = None,
        val: Any = None,
        val_collate_fn: Callable[[Any], Any] | None = None,
        val_plan: Mapping[str, Any] | None = None,
        **loader_options: Any,
    ) -> None:
        super().__init__()
        self.train, self.collate_fn, self.plan, self.lengths = train, collate_fn, dict(plan), lengths
        self.val, self.val_collate_fn = val, val_collate_fn or collate_fn
        self.val_plan = dict(plan if val_plan is None else val_plan)
        self.loader_options = loader_options

    def train_dataloader(self) -> PositionLoader:
        """The training batches; Lightning asks for them when the process group exists."""
        sampler = make_sampler(self.train, self.plan, self.lengths)
        return PositionLoader(self.train, batch_sampler=sampler, collate_fn=self.collate_fn, **self.loader_options)

    def val_dataloader(self) -> Any:
        """The batches for validation, longest first; none without a dataset."""
        if self.val is None:
            return []
        sampler = make_sampler(self.val, {**self.val_plan, "shuffle": False}, self.lengths)
        return DataLoader(self.val, batch_sampler=sampler, collate_fn=self.val_collate_fn, **self.loader_options)

    def setup(self, stage: str) -> None:
        """Add a callback to the Trainer that mends what checkpoints say of a broken-off epoch."""
        del stage
        if self.trainer is not None and not any(isinstance(each, MidEpoch) for each in self.trainer.callbacks):
            self.trainer.callbacks.append(MidEpoch())
