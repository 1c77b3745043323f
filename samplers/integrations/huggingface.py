"""transformers' Trainer with planned batches: bucketed or packed, resumed mid-epoch, predictions in dataset order."""

from collections.abc import Mapping
from typing import Any

from torch.utils.data import DataLoader, Sampler
from transformers import EvalPrediction, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from samplers.integrations.longest_first import LongestFirst
from samplers.integrations.plans import LengthsOf, make_sampler, mean_samples, resolve_lengths


class EpochCallback(TrainerCallback):
    """Tells the sampler its epoch: a Trainer that resumes on several processes does not."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        """Called before the first batch is taken. With several processes accelerate's sampler wraps ours."""
        del args, control
        sampler: Any = getattr(train_dataloader, "batch_sampler", None)
        sampler = getattr(sampler, "batch_sampler", sampler)
        if hasattr(sampler, "seek"):
            sampler.set_epoch(int(state.epoch))


class PlannedTrainer(Trainer):
    """A Trainer whose training batches are planned, and whose evaluation goes by length, longest first.

    On any number of processes, each sample comes once an epoch, and `resume_from_checkpoint` resumes within one. The
    results of `predict` and the arrays that `compute_metrics` gets are in the order of the dataset. For another
    subclass of Trainer inherit from both: `class Mine(PlannedTrainer, SFTTrainer)`.

    Args:
        *args: As of a Trainer, and so are all other options.
        plan: Options of `LengthBucketBatchSampler`, or with `capacity` of `PackingBatchSampler`. A plan without `seed`
            has the Trainer's. `lengths` in it are those of the training alone: a `Mixture`, for the dataset that its
            `concat` makes.
        lengths: The column whose lengths count (default `"input_ids"`), or a function from a dataset to its lengths;
            None takes a dataset's index.
        eval_collator: Makes a dict of padded tensors for `evaluate` and `predict`, with the rows in the given order
            (`PadCollator(sort_by=False)`); None takes `data_collator`. Needed where that packs.

    Raises:
        TypeError: An option of the plan is unknown, when the first loader is made.
        ValueError: An option is out of its range, or the dataset has no such column, at that time.
    """

    data_collator: Any
    compute_metrics: Any

    def __init__(
        self,
        *args: Any,
        plan: Mapping[str, Any],
        lengths: LengthsOf = "input_ids",
        eval_collator: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self.plan, self.lengths, self.eval_collator = dict(plan), lengths, eval_collator
        self._samples_per_batch = float(self.args.per_device_train_batch_size)
        self.add_callback(EpochCallback())

    def get_train_dataloader(self) -> DataLoader[Any]:
        """The planned batches of all processes, which accelerate deals out."""
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler = make_sampler(self.train_dataset, {"seed": seed, **self.plan}, self.lengths, rank="all")
        self._samples_per_batch = mean_samples(sampler)
        dataset, collate = self.train_dataset, self.data_collator
        if hasattr(dataset, "column_names"):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collate = self._get_collator_with_removed_columns(collate, description="training")
        names = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor")
        options = {name: getattr(self.args, f"dataloader_{name}") for name in names}
        return self.accelerator.prepare(DataLoader(dataset, batch_sampler=sampler, collate_fn=collate, **options))

    def get_total_train_batch_size(self, args: Any) -> int:
        """Samples of an update in the mean: with `max_steps`, the log's samples per second are counted from it."""
        return max(1, round(self._samples_per_batch * args.world_size * args.gradient_accumulation_steps))

    def _get_eval_sampler(self, eval_dataset: Any) -> Sampler[int]:
        return LongestFirst(resolve_lengths(eval_dataset, self.lengths))

    def _get_dataloader(self, *args: Any, **options: Any) -> DataLoader[Any]:
        """A loader for evaluation; that of training is made above."""
        collate, self.data_collator = self.data_collator, self.eval_collator or self.data_collator
        try:
            return super()._get_dataloader(*args, **options)
        finally:
            self.data_collator = collate

    def evaluation_loop(self, dataloader: DataLoader[Any], *args: Any, **options: Any) -> EvalLoopOutput:
        """Evaluate; predictions, labels and what `compute_metrics` gets are put into the order of the dataset."""
        order: Any = dataloader
        while not isinstance(order, LongestFirst):
            order = getattr(order, "batch_sampler", None) or getattr(order, "sampler", None)
            if order is None:
                return super().evaluation_loop(dataloader, *args, **options)
        metrics = self.compute_metrics
        if metrics is not None and not self.args.batch_eval_metrics:
            self.compute_metrics = lambda found: metrics(
                EvalPrediction(*(order.restore(part) for part in (found.predictions, found.label_ids, found.inputs)))
            )
        try:
            output = super().evaluation_loop(dataloader, *args, **options)
        finally:
            self.compute_metrics = metrics
        return output._replace(predictions=order.restore(output.predictions), label_ids=order.restore(output.label_ids))
