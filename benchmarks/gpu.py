"""All claims about GPUs, tested and measured in one run of a few minutes: tests, packing, steps, feeding.

It starts with the tests that are marked `cuda`. Without a GPU it says so and exits with status 2. `--device cpu` only
tries the program on small sizes: it prints figures without meaning, and saves nothing.
"""

import argparse
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import compare, save
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from collate import DevicePrefetcher, LengthTrackedBatch, PadCollator, apply_rnn, sequence_loss
from samplers import LengthBucketBatchSampler, optimal_widths

ROOT = Path(__file__).parents[1]
FEATURES, CLASSES = 80, 40
PER_STEP = nn.CrossEntropyLoss(reduction="none")

Batch = Any
Sample = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements, on a GPU and for a trial of the program.

    Attributes:
        steps: T of the padded tensors that are packed.
        rows: B of these tensors.
        hidden: H of these tensors.
        samples: Samples in the corpus.
        budget: Padded tokens of a batch.
        width: Hidden size of the LSTM.
        workers: Numbers of workers of the loaders.
        rounds: Rounds of `compare`, for calls and for whole epochs.
    """

    steps: tuple[int, ...] = (50, 400, 2000)
    rows: int = 64
    hidden: int = 256
    samples: int = 4096
    budget: int = 16_000
    width: int = 512
    workers: tuple[int, ...] = (2, 4, 8)
    rounds: tuple[int, int] = (11, 5)


SMALL = Sizes(steps=(5, 10), rows=4, hidden=8, samples=64, budget=1600, width=8, workers=(2,), rounds=(2, 2))


def main() -> int:
    """Test, measure, print and save. Returns the exit status: 1 if a test has failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    device = torch.device(parser.parse_args().device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("no GPU: this benchmark needs a CUDA device, and measures nothing without it", file=sys.stderr)
        return 2
    sizes = Sizes() if device.type == "cuda" else SMALL
    torch.manual_seed(0)
    tests = run_marked_tests()
    results: dict[str, object] = {"gpu": facts_of(device), "tests": tests}
    results["packing"] = measure_packing(device, sizes)
    samples = corpus_of(sizes)
    results["step"] = measure_steps(device, sizes, samples)
    results["feeding"] = measure_feeding(device, sizes, samples)
    results["bytes"] = measure_bytes(device, sizes, samples)
    results["batches"] = measure_batches(device, sizes, samples)
    if device.type == "cuda":
        save("gpu", results)
    else:
        print("nothing is saved: these figures are not a GPU's")
    return 1 if {"failed", "error", "errors"} & tests.keys() else 0


def facts_of(device: torch.device) -> dict[str, object]:
    """The device, its driver, and the relevant libraries."""
    if device.type != "cuda":
        return {"device": str(device)}
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {
        "device": torch.cuda.get_device_name(device),
        "driver": driver.stdout.split()[0],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def run_marked_tests() -> dict[str, int]:
    """Run the tests that need a GPU. Returns the numbers of passed, failed and skipped tests."""
    # Other files may need trainers that are not installed.
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr
    print(f"tests marked cuda: {last}", flush=True)
    if done.returncode:
        print(done.stdout[-4000:])
    return {word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", last)}


# --- helpers


def finished(call: Callable[[], object], device: torch.device) -> Callable[[], None]:
    """Run a call, and record the work that it gives to the device."""

    def run() -> None:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


def launches(call: Callable[[], object]) -> int:
    """Kernels, copies and fills that a call launches."""
    call()
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profile:
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    events = [event for event in profile.key_averages() if event.key.startswith("cu")]
    return sum(event.count for event in events if any(word in event.key for word in ("Launch", "Memcpy", "Memset")))


def waits(call: Callable[[], object], device: torch.device) -> int | None:
    """Number of host syncs in a call that torch detects; None without a GPU."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


class Sent(TorchDispatchMode):
    """Counts the bytes that are sent from the host to another device while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the call, and count its bytes."""
        result = func(*args, **(kwargs or {}))
        pair = {"_to_copy": (args[0], result), "copy_": args[1::-1]}.get(func.overloadpacket.__name__) if args else None
        if pair is not None and pair[0].is_cpu and not pair[1].is_cpu:
            self.bytes += pair[0].numel() * pair[0].element_size()
        return result


# --- pack and unpack


def measure_packing(device: torch.device, sizes: Sizes) -> list[dict[str, object]]:
    """Pack, unpack, and both with the backward pass, against torch's calls: times and launches."""
    rows = []
    rng = np.random.default_rng(0)
    for steps in sizes.steps:
        counts = np.sort(rng.integers(steps // 2, steps + 1, sizes.rows))[::-1]
        for order, by in (("sorted", counts), ("unsorted", rng.permutation(counts))):
            sequences = [torch.randn(int(count), sizes.hidden) for count in by]
            batch = LengthTrackedBatch.from_sequences(sequences, order="given").to(device)
            for work, calls in packing_calls(batch, in_order=order == "sorted").items():
                case = f"{work}, B={sizes.rows}, T={steps}, H={sizes.hidden}, {order}"
                timed = {name: finished(call, device) for name, call in calls.items()}
                row = compare(case, "ours", timed, rounds=sizes.rounds[0], bar="2x of torch" if steps == 400 else "")
                counted = {name: launches(call) for name, call in calls.items()}
                print(f"    launches: {', '.join(f'{name} {count}' for name, count in counted.items())}", flush=True)
                rows.append(asdict(row) | {"launches": counted})
    return rows


def packing_calls(batch: LengthTrackedBatch, *, in_order: bool) -> dict[str, dict[str, Callable[[], object]]]:
    """The calls to measure on a batch, ours and torch's."""
    ours = batch.pack()
    leaf = batch.padded.clone().requires_grad_()
    tracked, weights = batch.with_padded(leaf), torch.randn_like(leaf)

    def packed(values: Tensor, *, enforce_sorted: bool) -> Any:
        return pack_padded_sequence(values, batch.lengths, batch_first=True, enforce_sorted=enforce_sorted)

    def back(result: Tensor) -> None:
        torch.autograd.grad((result * weights).sum(), leaf)

    theirs = {"torch, enforce_sorted=False": False} | ({"torch, sorted": True} if in_order else {})
    calls: dict[str, dict[str, Callable[[], object]]] = {
        "pack": {"ours": batch.pack},
        "unpack": {"ours": partial(batch.unpack, ours)},
        "pack, unpack, backward": {"ours": lambda: back(tracked.unpack(tracked.pack()).padded)},
    }
    for name, enforce in theirs.items():
        there = packed(batch.padded, enforce_sorted=enforce)
        calls["pack"][name] = partial(packed, batch.padded, enforce_sorted=enforce)
        calls["unpack"][name] = partial(pad_packed_sequence, there, batch_first=True)
        calls["pack, unpack, backward"][name] = lambda enforce=enforce: back(
            pad_packed_sequence(packed(leaf, enforce_sorted=enforce), batch_first=True)[0]
        )
    return calls


# --- whole steps


class Tagger(nn.Module):
    """Predicts a class for every frame with an LSTM of two layers over packed frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.rnn = nn.LSTM(FEATURES, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, frames: LengthTrackedBatch, tags: LengthTrackedBatch) -> Tensor:
        """The loss over real frames, a scalar."""
        return sequence_loss(PER_STEP, apply_rnn(self.rnn, frames)[0].map(self.head), tags)

    def textbook(self, frames: Tensor, tags: Tensor, lengths: Tensor) -> Tensor:
        """The same in the usual way: torch's packing, and a boolean mask on the loss."""
        packed = pack_padded_sequence(frames, lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
        mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths.to(hidden.device)[:, None]
        return nn.functional.cross_entropy(self.head(hidden)[mask], tags[mask])


class Attention(nn.Module):
    """Predicts a class for every frame with two layers of attention over padded frames, which compute padding too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.widen = nn.Linear(FEATURES, width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, frames: LengthTrackedBatch, tags: LengthTrackedBatch) -> Tensor:
        """The loss over real frames, a scalar."""
        hidden = self.layers(self.widen(frames.padded), src_key_padding_mask=frames.key_padding_mask)
        return sequence_loss(PER_STEP, frames.with_padded(self.head(hidden)), tags)


def corpus_of(sizes: Sizes) -> list[Sample]:
    """Frames `[L, 80]` and tags `[L]` with log-normal lengths, median 120, from 10 to 400."""
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.lognormal(np.log(120), 0.6, sizes.samples), 10, 400).astype(int)
    return [(torch.randn(int(n), FEATURES), torch.randint(0, CLASSES, (int(n),))) for n in lengths]


def lengths_of(samples: Sequence[Sample]) -> list[int]:
    """Number of frames of each sample."""
    return [len(frames) for frames, _ in samples]


def by_hand(samples: Sequence[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """The usual collate function by hand."""
    frames, tags = (pad_sequence(list(field), batch_first=True) for field in zip(*samples, strict=True))
    return frames, tags, torch.tensor(lengths_of(samples))


def loader_of(samples: Sequence[Sample], batches: Any, workers: int, collate: Any, device: torch.device) -> Any:
    """A loader with persistent workers."""
    return DataLoader(
        samples,  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )


def epoch(step: Callable[[Batch], Tensor], optimizer: torch.optim.Optimizer, batches: Iterable[Batch]) -> None:
    """Train on all batches."""
    for batch in batches:
        optimizer.zero_grad()
        step(batch).backward()
        optimizer.step()


def trainer(model: nn.Module) -> Callable[[Iterable[Batch]], None]:
    """A call that trains one epoch with the step of `model` and a separate optimizer."""
    return partial(epoch, lambda batch: model(*batch), torch.optim.SGD(model.parameters(), lr=1e-3))


def moved(batches: Iterable[Batch], device: torch.device) -> Iterable[Batch]:
    """The plain loop: each batch is sent when it is needed."""
    return ([part.to(device) for part in batch] for batch in batches)


def measure_steps(device: torch.device, sizes: Sizes, samples: list[Sample]) -> dict[str, object]:
    """A training step on bucketed batches and its host syncs, against the usual loop."""
    plan = LengthBucketBatchSampler(lengths_of(samples), max_tokens=sizes.budget).plan(0).batches[:16]
    chosen = [[samples[i] for i in batch] for batch in plan]
    model = Tagger(sizes.width).to(device)
    ours, theirs = list(map(PadCollator(), chosen)), list(map(by_hand, chosen))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def textbook(batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        frames, tags, lengths = batch
        return model.textbook(frames.to(device), tags.to(device), lengths)

    calls: dict[str, Callable[[], object]] = {
        "ours, prefetched": lambda: trainer(model)(DevicePrefetcher(ours, device)),
        "textbook loop": lambda: epoch(textbook, optimizer, theirs),
    }
    row = compare(
        f"{len(plan)} steps of an LSTM 2x{sizes.width}, batches in host memory",
        "ours, prefetched",
        {name: finished(call, device) for name, call in calls.items()},
        rounds=sizes.rounds[1],
    )
    counted = {name: waits(call, device) for name, call in calls.items()}
    print(f"    host syncs in {len(plan)} steps: {counted}", flush=True)
    return asdict(row) | {"steps": len(plan), "waits": counted}


def measure_feeding(device: torch.device, sizes: Sizes, samples: list[Sample]) -> dict[str, object]:
    """An epoch from loaders with workers, with the prefetcher and without, against batches on the device."""
    plan = LengthBucketBatchSampler(lengths_of(samples), max_tokens=sizes.budget).plan(0).batches
    train, collate = trainer(Tagger(sizes.width).to(device)), PadCollator()
    resident = [collate([samples[i] for i in batch]) for batch in plan]
    resident = [tuple(part.to(device) for part in batch) for batch in resident]
    calls: dict[str, Callable[[], object]] = {"resident batches": partial(train, resident)}
    for workers in sizes.workers:
        loader = loader_of(samples, plan, workers, collate, device)
        calls[f"prefetcher, {workers} workers"] = partial(train, DevicePrefetcher(loader, device))
        calls[f"plain loop, {workers} workers"] = lambda loader=loader: train(moved(loader, device))
    timed = {name: finished(call, device) for name, call in calls.items()}
    case, bar = f"an epoch of {len(plan)} steps", "prefetcher within 5 % of resident"
    return asdict(compare(case, "resident batches", timed, rounds=sizes.rounds[1], bar=bar)) | {"steps": len(plan)}


def measure_bytes(device: torch.device, sizes: Sizes, samples: list[Sample]) -> dict[str, float]:
    """Bytes sent to the device per real token, next to those of the values alone."""
    plan = LengthBucketBatchSampler(lengths_of(samples), max_tokens=sizes.budget).plan(0).batches[:16]
    chosen = [[samples[i] for i in batch] for batch in plan]
    tokens = sum(sum(lengths_of(batch)) for batch in chosen)
    model = Tagger(sizes.width).to(device)
    values = sum(part.padded.nbytes for batch in map(PadCollator(), chosen) for part in batch)
    with Sent() as ours:
        for frames, tags in map(PadCollator(), chosen):
            model(frames.to(device), tags.to(device))
    usual = 0
    for frames, tags, lengths in map(by_hand, chosen):
        # The padded fields, a mask, the lengths, and the order with its inverse, in their usual dtypes.
        usual += frames.nbytes + tags.nbytes + tags.numel() + 3 * lengths.nbytes
    found = {"values alone": values / tokens, "ours": ours.bytes / tokens, "with mask and indices": usual / tokens}
    print(f"bytes sent per real token: {', '.join(f'{name} {share:.2f}' for name, share in found.items())}")
    return found


# --- batches


def random_batches(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Shuffled samples, cut where the next one would exceed the budget of padded tokens."""
    batches: list[list[int]] = [[]]
    width = 0
    for i in np.random.default_rng(0).permutation(len(lengths)).tolist():
        width = max(width, lengths[i])
        if width * (len(batches[-1]) + 1) > budget:
            batches.append([])
            width = lengths[i]
        batches[-1].append(i)
    return batches


def measure_batches(device: torch.device, sizes: Sizes, samples: list[Sample]) -> dict[str, object]:
    """Real tokens per second, end to end, for random batches, bucketed batches and closed widths under one budget."""
    lengths = lengths_of(samples)
    closed = LengthBucketBatchSampler(lengths, max_tokens=sizes.budget, widths=optimal_widths(lengths, 8))
    ways = {
        "bucketed": (LengthBucketBatchSampler(lengths, max_tokens=sizes.budget), PadCollator()),
        "bucketed, 8 widths": (closed, PadCollator(shapes=closed.shapes)),
        "random": (random_batches(lengths, sizes.budget), PadCollator()),
    }
    found: dict[str, object] = {}
    for name, model in (("LSTM, packed", Tagger(sizes.width)), ("attention, padded", Attention(sizes.width // 2))):
        train = trainer(model.to(device))
        calls = {}
        for way, (batches, collate) in ways.items():
            loader = loader_of(samples, batches, sizes.workers[-1], collate, device)
            calls[way] = finished(partial(train, DevicePrefetcher(loader, device)), device)
        row = compare(f"an epoch, {name}", "bucketed", calls, rounds=sizes.rounds[1])
        speed = {way: sum(lengths) / taken * 1e6 for way, taken in row.microseconds.items()}
        print(f"    real tokens/s: {', '.join(f'{way} {value:,.0f}' for way, value in speed.items())}", flush=True)
        found[name] = asdict(row) | {"tokens_per_second": speed}
    return found


if __name__ == "__main__":
    sys.exit(main())
