"""Fixed shapes: every batch has one of a few shapes, so a step is compiled or captured once per shape.

On a GPU the step becomes one CUDA graph per shape. On the CPU it is compiled if there is a C++ compiler.
"""

import argparse
import time
from collections.abc import Callable
from shutil import which

import torch
import torch._dynamo.config as dynamo
from torch import Tensor, nn
from torch.utils.data import DataLoader

from collate import DevicePrefetcher, LengthTrackedBatch, PadCollator, sequence_loss
from samplers import LengthBucketBatchSampler, optimal_widths

TOKENS, WORDS = 1024, 64


class Tagger(nn.Module):
    """Predicts whether a word occurs twice in its row, with masked attention. It reads no lengths on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, 2)

    def forward(self, words: LengthTrackedBatch, tags: LengthTrackedBatch) -> Tensor:
        """The loss over real steps, a scalar."""
        hidden = self.layer(self.embedding(words.padded), src_key_padding_mask=words.key_padding_mask)
        return sequence_loss(nn.CrossEntropyLoss(reduction="none"), words.with_padded(self.head(hidden)), tags)


def samples_of(count: int) -> list[dict[str, Tensor]]:
    """Random words, and a tag for each."""
    rows = [torch.randint(0, WORDS, (length,)) for length in torch.randint(4, 65, (count,)).tolist()]
    return [{"words": row, "tags": (row.bincount(minlength=WORDS)[row] > 1).long()} for row in rows]


def compiled(model: nn.Module, device: torch.device, shapes: int) -> Callable[..., Tensor]:
    """The model's step, compiled once per shape."""
    # torch stops compiling a function after eight variants unless this limit is higher.
    dynamo.recompile_limit = max(dynamo.recompile_limit, shapes + 1)
    if device.type == "cuda":
        return torch.compile(model, mode="reduce-overhead", dynamic=False)
    return torch.compile(model, dynamic=False) if which("g++") or which("clang++") else model


def main() -> None:
    """Print the padding that closed shapes cost, then train, and print the time per step of each shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--widths", type=int, default=4, help="number of padded widths (4)")
    parser.add_argument("--epochs", type=int, default=3, help="number of epochs over the 2,000 rows (3)")
    parser.add_argument("--eager", action="store_true", help="do not compile")
    options = parser.parse_args()
    torch.manual_seed(0)
    samples = samples_of(2000)
    lengths = [len(sample["words"]) for sample in samples]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    widths = optimal_widths(lengths, options.widths)
    sampler = LengthBucketBatchSampler(lengths, max_tokens=TOKENS, widths=widths)
    open_plan = LengthBucketBatchSampler(lengths, max_tokens=TOKENS).plan(0)
    print(f"open widths: {len(open_plan.batches)} batches, padding {open_plan.report().padding:.1%}")
    print(f"{len(widths)} widths: {len(sampler)} batches, shapes {sampler.shapes}")

    collate = PadCollator({"words": 0, "tags": -100}, shapes=sampler.shapes)
    loader = DataLoader(samples, batch_sampler=sampler, collate_fn=collate, pin_memory=device.type == "cuda")
    model = Tagger().to(device)
    step = model if options.eager else compiled(model, device, len(sampler.shapes))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    times: dict[tuple[int, ...], list[float]] = {}
    with DevicePrefetcher(loader, device) as batches:
        for epoch in range(options.epochs):
            real = padded = 0
            for batch in batches:
                start = time.perf_counter()
                loss = step(batch["words"], batch["tags"])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                value = loss.item()  # Waits for the end of the step, for its time.
                times.setdefault(tuple(batch["words"].padded.shape), []).append(time.perf_counter() - start)
                real, padded = real + batch["words"].num_tokens, padded + batch["words"].mask.numel()
            print(
                f"epoch {epoch}: loss {value:.3f}, padding {1 - real / padded:.1%} including rows that fill up a shape"
            )
    for shape, seconds in sorted(times.items()):
        later = sorted(seconds[1:] or seconds)[len(seconds) // 2 - 1] * 1000
        print(f"shape {shape}: first step {seconds[0] * 1000:,.0f} ms, later steps {later:.1f} ms ({len(seconds) - 1})")


if __name__ == "__main__":
    main()
