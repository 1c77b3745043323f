"""A small causal model on Python's own source text, with its documents packed, bucketed, and padded at random.

All three batches go through one model: a step attends to the earlier steps of its own document. Losses of documents
are equal, whatever shares their row; what differs is how many steps of a batch are real, and so how many real tokens
are processed in a second. Attention here computes all pairs of steps of a row and masks most of them out, so that a
packed row pays for pairs of different documents; kernels that take `cu_seqlens` do not.
"""

import argparse
import time
from collections.abc import Iterable
from itertools import islice

import numpy as np
import torch
from stdlib_corpus import functions_in, stdlib_files
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from collate import LengthTrackedBatch, PadCollator, VarlenBatch, VarlenCollator, masked_mean, sequence_loss
from samplers import LengthBucketBatchSampler, PackingBatchSampler

CAPACITY, ROWS, WIDTH, HEADS = 256, 16, 96, 2
# A loss of torch leaves out labels of -100.
FILL = {"tokens": 0, "labels": -100}
LOSS, Batch = nn.CrossEntropyLoss(reduction="none"), LengthTrackedBatch | VarlenBatch


class Block(nn.Module):
    """Attention and a perceptron."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.norm, self.norm_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, hidden: Tensor, allowed: Tensor) -> Tensor:
        """Hidden `[B, T, WIDTH]`; allowed bool `[B, 1, T, T]`, True where a step may look."""
        q, k, v = self.qkv(self.norm(hidden)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed)
        hidden = hidden + self.out(attended.transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.norm_mlp(hidden))


class Model(nn.Module):
    """Says of each byte which one comes next."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, WIDTH), nn.Embedding(CAPACITY, WIDTH)
        self.blocks, self.head = nn.ModuleList([Block(), Block()]), nn.Linear(WIDTH, 256)

    def forward(self, tokens: Batch) -> Batch:
        """Logits of every step, tracked like the tokens."""
        is_packed = isinstance(tokens, VarlenBatch)
        ids = tokens.document_ids if is_packed else tokens.mask.int()
        positions = tokens.position_ids if is_packed else torch.arange(tokens.step_values.shape[1])
        # Gaps and padding look at each other, so that no row of the mask is empty.
        allowed = (ids[:, :, None] == ids[:, None]).tril()[:, None]
        hidden = self.bytes(tokens.step_values) + self.positions(positions)
        for block in self.blocks:
            hidden = block(hidden, allowed)
        return tokens.with_step_values(self.head(hidden), None)


def documents_of(count: int) -> list[dict[str, Tensor]]:
    """Functions of the standard library: their bytes, and the byte that follows each."""
    texts = (text for path in stdlib_files() for _, text in functions_in(path))
    arrays = (np.frombuffer(text[: CAPACITY + 1], np.uint8).astype(np.int64) for text in texts)
    return [{"tokens": torch.from_numpy(a[:-1]), "labels": torch.from_numpy(a[1:])} for a in islice(arrays, count)]


def losses_of(model: Model, batch: dict[str, Batch]) -> Tensor:
    """Each document's mean loss, in the order of the list that was collated."""
    logits, labels = model(batch["tokens"]), batch["labels"]
    steps = LOSS(logits.step_values.flatten(0, 1), labels.step_values.flatten()).view(labels.mask.shape)
    return labels.unsort(masked_mean(labels.with_step_values(steps, None)))


def train(model: Model, batches: Iterable[dict[str, Batch]]) -> tuple[float, float]:
    """One epoch: real tokens per second of processor time, and the share of steps that are not real."""
    optimizer, real, steps = torch.optim.Adam(model.parameters(), lr=3e-3), 0, 0
    # Other work on the machine does not count in processor time.
    start = time.process_time()
    for batch in batches:
        loss = sequence_loss(LOSS, model(batch["tokens"]), batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        real, steps = real + batch["tokens"].num_tokens, steps + batch["tokens"].mask.numel()
    return real / (time.process_time() - start), 1 - real / steps


def main() -> None:
    """Train three times, and compare the losses of documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--functions", type=int, default=120, help="how many documents (120)")
    torch.set_num_threads(1)
    documents = documents_of(parser.parse_args().functions)
    lengths = [len(one["tokens"]) for one in documents]
    # The sampler plans full rows; the collator keeps them.
    packed = PackingBatchSampler(lengths, capacity=CAPACITY, rows=ROWS)
    pack = VarlenCollator.for_sampler(packed, FILL)
    bucketed, pad = LengthBucketBatchSampler(lengths, max_tokens=CAPACITY * ROWS), PadCollator(FILL)
    ways = {
        "packed": DataLoader(documents, batch_sampler=packed, collate_fn=pack),
        "bucketed": DataLoader(documents, batch_sampler=bucketed, collate_fn=pad),
        "random": DataLoader(documents, batch_size=ROWS, shuffle=True, collate_fn=pad),
    }
    # The first step of a process also loads code, which no way is to pay for.
    train(Model(), islice(ways["random"], 1))
    for name, loader in ways.items():
        torch.manual_seed(0)
        print(name.ljust(9), "{:9,.0f} real tokens/s, padding {:5.1%}".format(*train(Model(), loader)))
    model, some = Model(), documents[:24]
    apart = (losses_of(model, pack(some)) - losses_of(model, pad(some))).abs().max()
    print(f"losses of {len(some)} documents, packed and padded, differ by {apart:.1e} at most")


if __name__ == "__main__":
    main()
