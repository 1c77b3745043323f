"""Corpora and the samplers that plan them: ours, transformers', lhotse's, and two by hand.

Every contender gives all batches of all ranks for an epoch: rank r takes batch `t * W + r` in step t.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from lhotse.cut import CutSet, MonoCut
from lhotse.dataset.sampling.dynamic_bucketing import DynamicBucketingSampler
from torch.utils.data import BatchSampler
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler

from samplers import plan_epoch

Lengths: TypeAlias = npt.NDArray[np.int64]
Batches: TypeAlias = list[list[int]]

SAMPLES, BUDGET, MEDIAN = 20_000, 20_000, 450
BUCKETS, BUFFER = 30, 10_000
SEEDS: Final = 20


@dataclass(frozen=True, eq=False)
class Corpus:
    """Lengths int64 `[N]`, and the budget of padded tokens of a batch."""

    name: str
    lengths: Lengths
    budget: int

    @property
    def rows(self) -> int:
        """Batch size for samplers with a fixed one: as many rows as use the budget on average."""
        return int(self.budget / self.lengths.mean())

    @cached_property
    def cuts(self) -> list[MonoCut]:
        """The samples as lhotse cuts; one second is one time step."""
        return [
            MonoCut(id=str(sample), start=0, duration=float(length), channel=0, supervisions=[])
            for sample, length in enumerate(self.lengths.tolist())
        ]


Contender: TypeAlias = Callable[[Corpus, int, int, int], Batches]


def ours(corpus: Corpus, epoch: int, seed: int, replicas: int, window: int | None = None) -> Batches:
    """Our plan. A sample over the budget is a batch of one, as with all contenders."""
    plan = plan_epoch(
        corpus.lengths,
        epoch=epoch,
        num_replicas=replicas,
        max_tokens=corpus.budget,
        overlong="alone",
        seed=seed,
        window=window,
    )
    return list(plan.batches)


def length_grouped(corpus: Corpus, epoch: int, seed: int, _: int) -> Batches:
    """Transformers' length grouping; accelerate deals its batches to the ranks in turn."""
    generator = torch.Generator().manual_seed(SEEDS * epoch + seed)
    sampler = LengthGroupedSampler(corpus.rows, lengths=corpus.lengths.tolist(), generator=generator)
    return list(BatchSampler(sampler, corpus.rows, drop_last=False))


class EveryRankRebalance(BatchRebalanceSampler):
    """Gives the batches of all ranks. In the original each rank computes all of them and gives its own."""

    def _yield_global_batch(self, batch_indices: list[int]) -> Iterator[list[int]]:
        ranks = self._assign(batch_indices, [self.lengths[sample] for sample in batch_indices])
        for slot in zip(*ranks, strict=True):
            yield from slot


def rebalanced(corpus: Corpus, epoch: int, seed: int, replicas: int, groups: int) -> Batches:
    """Transformers' rebalancing, with a number of micro-batches per optimizer step over all ranks."""
    accumulate = max(1, groups // replicas)
    rows = corpus.rows * replicas * accumulate
    sampler = EveryRankRebalance(corpus.lengths.tolist(), rows, replicas, accumulate, seed=seed, drop_last=False)
    # It adds seed and epoch: seed 0 in epoch 1 equals seed 1 in epoch 0.
    sampler.set_epoch(SEEDS * epoch)
    return list(sampler)


class EveryRankBucketing(DynamicBucketingSampler):
    """Gives the batches of all ranks. In the original each rank computes all of them and gives its own."""

    def __next__(self) -> CutSet:
        return self._next_batch()


def bucketed(
    corpus: Corpus, order: Sequence[int], seed: int, replicas: int, kind: type[DynamicBucketingSampler]
) -> DynamicBucketingSampler:
    """Lhotse's dynamic bucketing of samples in this order."""
    return kind(
        [corpus.cuts[sample] for sample in order],
        max_duration=float(corpus.budget),
        num_buckets=BUCKETS,
        buffer_size=BUFFER,
        shuffle=True,
        seed=seed,
        world_size=replicas,
        rank=0,
    )


def dynamic_bucketing(corpus: Corpus, epoch: int, seed: int, replicas: int) -> Batches:
    """lhotse, with its source shuffled again in each epoch: from a fixed order more pairs meet again."""
    order = np.random.default_rng([seed, epoch]).permutation(len(corpus.lengths)).tolist()
    sampler = bucketed(corpus, order, seed, replicas, EveryRankBucketing)
    sampler.set_epoch(epoch)
    return [[int(cut.id) for cut in batch] for batch in sampler]


def fill(corpus: Corpus, samples: list[int]) -> Iterator[list[int]]:
    """Samples in their order, each batch filled up to the budget."""
    batch: list[int] = []
    longest = 0
    for sample, length in zip(samples, corpus.lengths[samples].tolist(), strict=True):
        if batch and (len(batch) + 1) * max(longest, length) > corpus.budget:
            yield batch
            batch, longest = [], 0
        batch.append(sample)
        longest = max(longest, length)
    yield batch


def at_random(corpus: Corpus, epoch: int, seed: int, _: int) -> Batches:
    """Random order, each batch filled up to the budget."""
    order = np.random.default_rng([seed, epoch]).permutation(len(corpus.lengths))
    return list(fill(corpus, order.tolist()))


def in_chunks(corpus: Corpus, epoch: int, seed: int, _: int, chunk: int | None = None) -> Batches:
    """The usual code by hand: shuffle, sort chunks of 50 batches, fill up to the budget, shuffle the batches."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(corpus.lengths))
    chunk = chunk or 50 * corpus.rows
    batches: Batches = []
    for first in range(0, len(order), chunk):
        part = order[first : first + chunk]
        batches += fill(corpus, part[np.argsort(-corpus.lengths[part], kind="stable")].tolist())
    return [batches[index] for index in rng.permutation(len(batches))]


CONTENDERS: Final[dict[str, Contender]] = {
    "ours": ours,
    "transformers LengthGrouped": length_grouped,
    "transformers rebalance, 8": partial(rebalanced, groups=8),
    "transformers rebalance, 64": partial(rebalanced, groups=64),
    "lhotse bucketing": dynamic_bucketing,
    "sort in chunks, by hand": in_chunks,
    "random": at_random,
}


def speech_like(samples: int) -> Lengths:
    """Log-normal lengths, median 4.5 s, 0.5 to 30 s, in frames of 10 ms: int64 `[samples]`."""
    drawn = np.random.default_rng(0).lognormal(np.log(MEDIAN), 0.6, samples)
    return np.clip(drawn, 50, 3_000).astype(np.int64)


def make_corpora(folder: Path | None) -> list[Corpus]:
    """Speech-like lengths, four other distributions, and the files of a folder, at most 20,000 samples of each."""
    rng = np.random.default_rng(0)
    two = np.where(rng.random(SAMPLES) < 0.7, rng.normal(40, 8, SAMPLES), rng.normal(400, 60, SAMPLES))
    drawn = {
        "text-like log-normal": np.clip(rng.lognormal(np.log(148), 1, SAMPLES), 8, 4_096),
        "uniform 1 to 1,000": rng.integers(1, 1_001, SAMPLES),
        "bimodal": np.clip(two, 1, None),
        "heavy-tailed": np.clip(10 * (1 + rng.pareto(1.3, SAMPLES)), 10, 20_000),
    }
    for path in sorted(folder.glob("*.npy")) if folder else []:
        lengths = np.load(path)
        drawn[path.stem] = rng.permutation(lengths)[:SAMPLES]
    corpora = [Corpus("speech-like", speech_like(SAMPLES), BUDGET)]
    for name, lengths in drawn.items():
        whole = lengths.astype(np.int64)
        corpora.append(Corpus(name, whole, int(32 * whole.mean())))
    return corpora
