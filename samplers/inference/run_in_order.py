"""`run_in_order`: a step over every sample of a dataset once, longest first; outputs in the order of the dataset."""

import os
from collections.abc import Callable, Mapping
from typing import Any, Unpack

import torch
import torch.distributed as dist
from tqdm import tqdm

from samplers.inference.containers import Container, ContainerKind, FileContainer, make_container
from samplers.inference.halving import HalvingStep
from samplers.inference.outputs import check_order, read_outputs
from samplers.inference.plan import (
    CollatedSamples,
    InferenceBudget,
    RemainingBatches,
    check_budget,
    find_lengths,
    make_loader,
)
from samplers.inference.run_record import RunRecord
from samplers.planning.budget import Integers
from samplers.planning.options import check_flag
from samplers.planning.sorting import Lengths
from samplers.progress.replica import find_replica, require_group
from samplers.shards.storage.atomic import local_path
from samplers.shards.storage.network.counts import TransferBar


def run_in_order(
    step: Callable[[Any], Any],
    dataset: Any,
    *,
    collate_fn: Callable[[Any], Any],
    lengths: Lengths | str | None = None,
    out: str | os.PathLike[str] | None = None,
    container: ContainerKind = "list",
    name: str = "",
    resume: bool = True,
    num_workers: int = 0,
    pin_memory: bool = False,
    flush_seconds: float = 60.0,
    progress: bool | None = None,
    **budget: Unpack[InferenceBudget],
) -> Any:
    """Run a step over all samples of a dataset, and return the outputs in the order of the dataset.

    Batches hold samples of similar length and come longest first, so that a batch that is too large fails at once. One
    that does not fit in memory is halved, and later ones are as small. The step runs under `torch.no_grad`; put the
    model into evaluation mode yourself.

    With `out`, outputs are written to parts (in the folder `OUT.parts`) as they come, and become one file at the end;
    for that moment they take their space twice. A run that was killed and is started again computes only what was not
    written; budget, workers and the number of processes may change. Under torchrun the processes of a group share the
    batches and one `out`; at the end they wait for each other, up to the group's timeout.

    Args:
        step: `step(batch)` returns an entry for each row of the batch, in the order of the rows: a tensor or array
            `[B, *F]`; a padded or varlen batch, whose padding is removed; or a list of tensors, texts or anything. Do
            not `unsort` it.
        dataset: Map-style, N samples.
        collate_fn: Makes a batch from a list of samples, in their order, or with the `permutation` of the rows, as
            `PadCollator` does. What it reorders before that, no permutation knows.
        lengths: Lengths of all samples, in time steps: integers `[N]`, or `[N, K]` for samples of K fields; or an
            index; or the column of the dataset whose lengths count. None takes the dataset's index, or measures a list
            of sequences.
        out: A file to write: `.npy` for outputs of one shape, or `.arrow` for these, for outputs with their own number
            of steps and for texts. None keeps outputs in memory.
        container: Without `out`: `"list"` (default), `"numpy"` or `"torch"`.
        name: Name of the run, such as that of the model's weights. A file of another name is not resumed.
        resume: False starts again, and forgets what is in `out`.
        num_workers: Worker processes that read and collate.
        pin_memory: As of a `DataLoader`.
        flush_seconds: A kill loses at most the outputs of this many seconds.
        progress: Whether to show a bar in real tokens, with the counts of requests, retries and bytes of a remote
            dataset; None shows it on a terminal.
        **budget: `max_tokens`, `batch_size`, `cost`, `count_tokens`, `widths` and `max_length`, as of
            `LengthBucketBatchSampler`. A sample that exceeds the budget alone is a batch of its own.

    Returns:
        Without `out` a list of N outputs on the host, or an array or tensor `[N, *F]`. With `.npy` a read-only memory
        map `[N, *F]`, with `.arrow` a memory-mapped pyarrow table whose column is `output`.

    Raises:
        FileExistsError: Another run is writing `out`, or it is a file that no run has written.
        LengthError: A length is negative, or above every allowed width.
        MemoryError: A sample alone does not fit in memory.
        ModuleNotFoundError: `out` is an Arrow file, and pyarrow is not installed.
        OSError: `out` cannot be written.
        RuntimeError: A launcher started several processes, and their process group is not initialised.
        TypeError: An option is unknown or has the wrong type; or the step returns what has no rows or `out` cannot
            hold.
        ValueError: There is no budget, or an option is out of its range; lengths are not those of the dataset, or a
            batch has them in another order; `out` is of another run or damaged; or outputs are not one for each row, or
            differ in dtype or shape.

    Examples:
        >>> import torch
        >>> from collate import PadCollator, masked_mean
        >>> texts = [torch.tensor([4.0, 2.0]), torch.tensor([1.0]), torch.tensor([3.0, 3.0, 9.0])]
        >>> run_in_order(masked_mean, texts, collate_fn=PadCollator(), max_tokens=4, container="torch")
        tensor([3., 1., 5.])
    """
    check_flag("resume", resume)
    check_budget(budget)
    if not isinstance(name, str):
        raise TypeError(f"name must be a text, got {name!r}: str(...) makes one of a path or a number")
    if not flush_seconds >= 0:
        raise ValueError(f"flush_seconds must be at least 0, got {flush_seconds}: 0 writes after each batch")
    num_replicas, rank = _find_processes()
    lengths, array = find_lengths(dataset, lengths)
    path = None if out is None else local_path(out, "out")
    if path is None and num_replicas > 1:
        raise ValueError(f"out must be a file where {num_replicas} processes share a run: .npy or .arrow")
    if path is not None and not len(array):
        raise ValueError("dataset must have a sample if out is a file, got none: there is nothing to write")
    kept = make_container(
        path, container, RunRecord.of(name, lengths, array), flush_seconds=flush_seconds, meet=_meet, is_first=rank == 0
    )
    try:
        if isinstance(kept, FileContainer):
            kept.begin(resume=resume)
        batches = RemainingBatches(lengths, kept.done, budget, rank=rank, num_replicas=num_replicas)
        samples = CollatedSamples(dataset, collate_fn)
        halving = HalvingStep(step, samples.collate, array)
        loader = make_loader(samples, batches, num_workers=num_workers, pin_memory=pin_memory)
        # tqdm shows no bar with True, and with None only on a terminal.
        disable = None if rank == 0 and progress is None else not progress
        with _Progress(array, batches, kept, transfers=_transfers_of(dataset), disable=disable) as bar:
            _run(loader, array, halving, kept, bar)
        return kept.finish()
    finally:
        kept.close()


def _run(loader: Any, lengths: Integers, halving: HalvingStep, kept: Container, bar: "_Progress") -> None:
    """Run the step on all batches; what was computed is kept, also if one fails."""
    try:
        with torch.no_grad():
            for samples, batch in loader:
                check_order(batch, samples, lengths)
                for piece, collated, result in halving.run(samples, batch):
                    kept.add(read_outputs(result, collated, piece))
                    bar.add(piece)
    finally:
        kept.flush()


class _Progress:
    """A bar in real tokens.

    Args:
        lengths: int64 `[N]` or `[N, K]`.
        batches: Those of this process.
        kept: Knows what was done before.
        transfers: Gives what the dataset has transferred over a network. None if only the process knows.
        disable: None shows the bar on a terminal only.
    """

    def __init__(
        self,
        lengths: Integers,
        batches: RemainingBatches,
        kept: Container,
        *,
        transfers: Callable[[], Mapping[str, Any]] | None,
        disable: bool | None,
    ) -> None:
        self._tokens = lengths if lengths.ndim == 1 else lengths.sum(1)
        before = int(self._tokens[kept.done].sum())
        total = before + sum(map(self._count, batches))
        self._bar = tqdm(total=total, initial=before, unit="tok", unit_scale=True, disable=disable)
        self._transfers = TransferBar(self._bar, transfers)

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._transfers.show(is_end=True)
        self._bar.close()

    def add(self, samples: list[int]) -> None:
        """Count the tokens of samples that are done."""
        self._transfers.show()
        self._bar.update(self._count(samples))

    def _count(self, samples: list[int]) -> int:
        return int(self._tokens[samples].sum())


def _transfers_of(dataset: Any) -> Callable[[], Mapping[str, Any]] | None:
    """What reads the counts of a dataset, over all workers. None if it has none, as most datasets."""
    counts = getattr(dataset, "transfers", None)
    if isinstance(counts, Mapping) and {"requests", "retries", "bytes", "waited_seconds"} <= counts.keys():
        return lambda: dict(dataset.transfers)
    return None


def _find_processes() -> tuple[int, int]:
    """How many processes share the run, and which this one is.

    Raises:
        RuntimeError: A launcher started several, and their process group is not initialised.
    """
    if dist.is_available() and dist.is_initialized():
        # Given, because accelerate's loaders, which would split batches again, are not used here.
        return find_replica(dist.get_world_size(), dist.get_rank())
    require_group()
    return 1, 0


def _meet(text: str) -> None:
    """Wait for all processes of the group, and check that each gives the same text.

    Raises:
        ValueError: Another process gives another one.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    other = next((rank for rank, each in enumerate(texts) if each != text), None)
    if other is not None:
        raise ValueError(
            f"all processes must share one dataset and one out, got {text} in rank {dist.get_rank()}, and "
            f"{texts[other]} in rank {other}"
        )
