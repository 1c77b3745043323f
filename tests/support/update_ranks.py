"""What a rank of test_updates_gradient does: train one optimizer step with DDP, and compare it with one flat batch."""

from contextlib import nullcontext
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from collate import PadCollator, VarlenCollator, sequence_loss
from samplers import LengthBucketBatchSampler, PackingBatchSampler

LENGTHS = [1 + 5 * number % 23 for number in range(60)]
WEIGHTS = 0.5 + np.arange(60) % 4
MEANS = ("token", "document", "weighted")
ACCUMULATE = (1, 2, 5)
KINDS = ("bucketed", "packed")


class Tagger(nn.Module):
    """A class for each step, from a recurrent state: losses of steps differ widely."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 8, dtype=torch.float64)
        self.head = nn.Linear(8, 4, dtype=torch.float64)

    def forward(self, values: Tensor) -> Tensor:
        """`[..., 3]` -> `[..., 4]`."""
        scores: Tensor = self.head(torch.tanh(self.layer(values)))
        return scores


def sample(number: int) -> dict[str, Any]:
    """The features and classes of a sample, and which it is."""
    generator = torch.Generator().manual_seed(number)
    length = LENGTHS[number]
    values = torch.randn(length, 3, generator=generator, dtype=torch.float64) * (1 + number % 5)
    return {"values": values, "classes": torch.randint(0, 4, (length,), generator=generator), "number": number}


def sum_of_losses(module: Any, batch: Any, mean: str) -> Tensor:
    """What a batch adds to the mean over an update, before it is divided: a scalar."""
    values, classes = batch["values"], batch["classes"]
    output = (
        values.with_padded(module(values.padded)) if not values.is_varlen else values.with_values(module(values.values))
    )
    loss_fn = nn.CrossEntropyLoss(reduction="none")
    numbers = torch.as_tensor(batch["number"])
    if mean == "token":
        return sequence_loss(loss_fn, output, classes, reduction="sum")
    if mean == "document":
        return sequence_loss(loss_fn, output, classes, reduction="sequence") * len(numbers)
    weights = torch.as_tensor(WEIGHTS)[numbers]
    steps = weights if values.is_varlen else weights[:, None].expand(values.padded.shape[:2])
    return sequence_loss(loss_fn, output, classes, weights=steps, reduction="sum")


def gradients_of(module: nn.Module) -> list[Tensor]:
    """Copies of all gradients."""
    return [weight.grad.clone() for weight in module.parameters() if weight.grad is not None]


def flat_gradient(samples: list[int], mean: str) -> list[Tensor]:
    """The gradient of one batch of one process, by a plain loop over samples."""
    module, total, count = Tagger(), torch.zeros((), dtype=torch.float64), 0.0
    for number in samples:
        one = sample(number)
        losses = nn.functional.cross_entropy(module(one["values"]), one["classes"], reduction="none")
        if mean == "token":
            total, count = total + losses.sum(), count + len(losses)
        elif mean == "document":
            total, count = total + losses.mean(), count + 1
        else:
            total, count = total + WEIGHTS[number] * losses.sum(), count + WEIGHTS[number] * len(losses)
    (total / count).backward()
    return gradients_of(module)


def differences(rank: int, replicas: int) -> dict[str, float]:
    """The largest difference of a gradient from the flat one, over all updates of an epoch, for each way to train."""
    found = {}
    for kind, accumulate, mean in product(KINDS, ACCUMULATE, MEANS):
        sampler: Any
        if kind == "bucketed":
            sampler = LengthBucketBatchSampler(LENGTHS, max_tokens=60, num_replicas=replicas, rank=rank)
            collate: Any = PadCollator()
        else:
            sampler = PackingBatchSampler(LENGTHS, capacity=40, num_replicas=replicas, rank=rank)
            collate = VarlenCollator(capacity=40)
        updates = sampler.updates(accumulate=accumulate)
        steps = [
            sampler.plan(0).batches[first : first + replicas]
            for first in range(0, len(sampler.plan(0).batches), replicas)
        ]
        module = DistributedDataParallel(Tagger())
        worst, used = 0.0, 0
        for number, indices in enumerate(sampler):
            update = updates.at(number)
            scale = {
                "token": update.token_scale,
                "document": update.document_scale,
                "weighted": replicas / float(updates.present.total(WEIGHTS * LENGTHS)[update.number]),
            }[mean]
            with nullcontext() if update.is_last else module.no_sync():
                (sum_of_losses(module, collate([sample(index) for index in indices]), mean) * scale).backward()
            if update.is_last:
                flat = [index for step in steps[used : number + 1] for batch in step for index in batch]
                pairs = zip(gradients_of(module), flat_gradient(flat, mean), strict=True)
                worst = max(worst, *(float((ours - other).abs().max()) for ours, other in pairs))
                module.zero_grad()
                used = number + 1
        assert used == len(steps)
        found[f"{kind}, {accumulate} batches, {mean} mean"] = worst
    return found


def run_rank(rank: int, replicas: int, folder: str) -> None:
    """One process of a gloo group; it writes what it found."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=replicas)
    torch.save(differences(rank, replicas), f"{folder}/{rank}.pt")
    dist.destroy_process_group()
