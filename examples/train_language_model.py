"""From files on disk to a trained, packed GRU: a byte-level language model of Python's standard library.

The lengths are written to shards with the sequences, read from the index, and used to plan batches under a budget of
padded tokens. Each batch takes them through packing and loss, and back to the order of the samples. Stop the program at
any step (Ctrl-C, or kill -9) and start it again with --resume: it continues with exactly the remaining batches.
"""

import argparse
import contextlib
import os
import signal
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from stdlib_corpus import open_corpus
from torch import Tensor, nn
from torchdata.stateful_dataloader import StatefulDataLoader
from tqdm import tqdm

from collate import DevicePrefetcher, LengthTrackedBatch, PadCollator, apply_rnn, check_step, sequence_loss
from samplers import LengthBucketBatchSampler

PADDING = {"input": 0, "target": -100}
# Every hundredth function is held out of training.
HELD_OUT = 100
LOSS = nn.CrossEntropyLoss(reduction="none")


class ByteModel(nn.Module):
    """Embedding, GRU, linear layer: logits of the next byte at every step."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.gru = nn.GRU(64, hidden)
        self.head = nn.Linear(hidden, 256)

    def forward(self, batch: LengthTrackedBatch) -> tuple[LengthTrackedBatch, Tensor]:
        """Map bytes `[B, T]` to logits `[B, T, 256]` and final states `[1, B, hidden]`, in batch order."""
        output, state = apply_rnn(self.gru, batch.map(lambda tokens: self.embedding(tokens.long())))
        return output.map(self.head), state


def loss_of(model: ByteModel, batch: dict[str, Any], reduction: Any = "token") -> Tensor:
    """Cross-entropy in nats per real byte."""
    return sequence_loss(LOSS, model(batch["input"])[0], batch["target"].map(torch.Tensor.long), reduction=reduction)


class Run:
    """The state of a run: the model, its optimizer and the position. They are saved together, atomically."""

    def __init__(self, sampler: LengthBucketBatchSampler, device: torch.device, path: Path) -> None:
        torch.manual_seed(0)
        self.model = ByteModel().to(device)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=4e-3)
        self.sampler, self.path = sampler, path
        self.step, self.in_epoch, self.checksum = 0, 0, 0
        self.byte_counts = torch.zeros(256, dtype=torch.int64)

    def load(self) -> None:
        """Resume from the last checkpoint."""
        saved = torch.load(self.path)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.checksum, self.byte_counts = saved["step"], saved["checksum"], saved["byte_counts"]
        self.sampler.seek(saved["position"])

    def save(self) -> None:
        """Write a new file and rename it, so that there is always a complete checkpoint."""
        saved = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": self.sampler.position(self.in_epoch),
            "step": self.step,
            "checksum": self.checksum,
            "byte_counts": self.byte_counts,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        with partial.open("wb") as file:
            torch.save(saved, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)

    def take(self, batch: dict[str, Any]) -> float:
        """One training step. The checksum covers the ids of all samples so far."""
        loss = loss_of(self.model, batch)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self.in_epoch += 1
        self.checksum = zlib.crc32("\n".join(batch["__key__"]).encode(), self.checksum)
        self.byte_counts += torch.bincount(batch["target"].flat().long().cpu(), minlength=256)
        return loss.item()


def endless(loader: Any, run: Run) -> Iterator[dict[str, Any]]:
    """The batches of one epoch after the other, without end."""
    while True:
        run.in_epoch = 0
        yield from loader


def train(run: Run, loader: Any, args: argparse.Namespace) -> bool:
    """Train up to `args.steps`, saving every `args.save_every`. Returns False after Ctrl-C."""
    asked_to_stop: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: asked_to_stop.append(number))
    bar = tqdm(total=args.steps, initial=run.step, desc="train", unit="step")
    batches = endless(loader, run)
    started, tokens = time.perf_counter(), 0
    while run.step < args.steps and not asked_to_stop:
        batch = next(batches)
        loss = run.take(batch)
        tokens += batch["input"].num_tokens
        bar.set_postfix_str(f"loss {loss:.3f}, {tokens / (time.perf_counter() - started):,.0f} real tokens/s")
        bar.update()
        if run.step % args.save_every == 0:
            run.save()
    bar.close()
    signal.signal(signal.SIGINT, before)
    run.save()
    print(
        f"trained {run.step} steps, {tokens:,} real tokens, {tokens / (time.perf_counter() - started):,.0f} per second"
    )
    print(f"checksum of the sample ids so far: {run.checksum:08x}")
    return run.step >= int(args.steps)


def evaluate(run: Run, held_out: list[dict[str, Any]]) -> None:
    """Print the loss on held-out functions, and the loss of a model that knows only byte frequencies."""
    run.model.eval()
    with torch.no_grad():
        losses = [loss_of(run.model, batch, "sum").item() for batch in held_out]
    targets = torch.cat([batch["target"].flat() for batch in held_out]).long().cpu()
    frequencies = (run.byte_counts + 1).double()
    by_frequency = -(frequencies / frequencies.sum()).log()[targets].mean().item()
    print(f"held-out loss: {sum(losses) / len(targets):.3f} nats per byte; byte frequencies alone: {by_frequency:.3f}")


def prove(model: ByteModel, samples: list[dict[str, Any]], device: torch.device) -> None:
    """Compare the outputs of a batch with those of its sequences one at a time, in their order."""
    whole = on_device(samples, device)
    with torch.no_grad():
        output, state = model(whole["input"])
        rows = zip(output.split(1), whole["target"].map(torch.Tensor.long).split(1), strict=True)
        losses = whole["input"].unsort(torch.stack([sequence_loss(LOSS, *row) for row in rows]))
        outputs, states = output.unsort().sequences(), whole["input"].unsort(state, dim=1)
        drift = {"outputs": 0.0, "final states": 0.0, "losses": 0.0}
        for index, sample in enumerate(samples):
            alone = on_device([sample], device)
            one, last = model(alone["input"])
            pairs = (
                (outputs[index], one.padded[0]),
                (states[:, index], last[:, 0]),
                (losses[index], loss_of(model, alone)),
            )
            for name, (batched, single) in zip(drift, pairs, strict=True):
                drift[name] = max(drift[name], (batched - single).abs().max().item())
    in_order = all(
        np.array_equal(row.cpu().numpy(), sample["input"])
        for row, sample in zip(whole["input"].unsort().sequences(), samples, strict=True)
    )
    print(f"{len(samples)} held-out sequences, as a batch and one at a time, largest difference:")
    for name, value in drift.items():
        print(f"  {name:<13} {value:.1e}  {'equal to rounding' if value < 1e-4 else 'DIFFERENT'}")
    print(f"  source order  {'restored' if in_order else 'LOST'}")
    if not in_order or max(drift.values()) >= 1e-4:
        raise SystemExit("the batch and its sequences give different outputs")
    # The check for a test suite: it changes padding, row order, the other rows, and real steps.
    shortest = sorted(samples, key=lambda sample: len(sample["input"]))[:4]
    report = check_step(lambda batch: loss_of(model, batch), on_device(shortest, device), module=model)
    print(report)
    report.raise_if_broken()


def on_device(samples: list[dict[str, Any]], device: torch.device) -> dict[str, Any]:
    """The samples as a batch on the device."""
    return {name: field.to(device) for name, field in PadCollator(PADDING)(samples).items() if name in PADDING}


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("runs/stdlib"), help="folder of the shards; written if absent (%(default)s)"
    )
    parser.add_argument("--functions", type=int, help="number of functions to write (all)")
    parser.add_argument(
        "--max-tokens", type=int, default=16_384, help="largest number of padded tokens in a batch (%(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=120, help="total training steps, including those before a resume (%(default)s)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that read and collate (%(default)s)")
    parser.add_argument("--device", help="cpu, cuda, ... (the accelerator if there is one)")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        default=Path("runs/language_model.pt"),
        help="checkpoint file of the run (%(default)s)",
    )
    parser.add_argument("--save-every", type=int, default=20, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="resume from the checkpoint, with any number of workers")
    args = parser.parse_args(argv)
    args.device = torch.device(args.device or torch.accelerator.current_accelerator() or "cpu")
    if args.resume and not args.checkpoint.exists():
        parser.error(f"--resume: there is no checkpoint at {args.checkpoint} yet; start without --resume")
    return args


def ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches all processes of the terminal. Workers ignore it; the main process stops them after its step."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main(argv: list[str] | None = None) -> None:
    """Write or check the shards, plan, train, evaluate, and compare a batch with its samples."""
    args = arguments(argv)
    # The workers need cores too, and a thread that waits for a core does not speed up small kernels.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) - args.workers))
    dataset = open_corpus(args.data, args.functions)
    indices = np.arange(len(dataset))
    # Input and target have the same length, so one column of lengths plans both.
    lengths = dataset.index.lengths[:, 0]
    train_on = indices[indices % HELD_OUT != 0]
    sampler = LengthBucketBatchSampler(lengths, max_tokens=args.max_tokens, overlong="drop", indices=train_on)
    plan = sampler.plan(0)
    report = plan.report()
    print(f"{report}\nin random batches of the same budget the padding is {plan.random_padding:.2%}")
    print(
        f"{report.overlong_dropped} functions of more than {args.max_tokens:,} bytes exceed the budget alone: dropped, "
        "not cut"
    )

    loader = StatefulDataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=PadCollator(PADDING),
        num_workers=args.workers,
        pin_memory=args.device.type != "cpu",
        worker_init_fn=ignore_interrupts,
    )
    run = Run(sampler, args.device, args.checkpoint)
    if args.resume:
        run.load()
    with DevicePrefetcher(loader, args.device) as batches:
        finished = train(run, batches, args)
    if not finished:
        print("stopped; start again with --resume to continue")
        raise SystemExit(130)

    held_out = indices[::HELD_OUT][:256].tolist()
    parts = [held_out[first : first + 16] for first in range(0, len(held_out), 16)]
    evaluate(run, [on_device(dataset.__getitems__(part), args.device) for part in parts])
    prove(run.model, dataset.__getitems__(held_out[:16]), args.device)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
