"""Digits from sound: wav files in shards, log-mel frames, a bidirectional GRU, and CTC over real steps only.

Without options it makes a corpus: strings of digits as touch-tones in noise, of many lengths, written as wav files to
plain webdataset shards. With --shards it reads your shards. Their members are KEY.wav, mono, at 8 kHz, and KEY.txt, a
string of digits, or KEY.cls, a single digit. It needs soundfile: pip install soundfile.
"""

import argparse
import tempfile
from itertools import chain, groupby, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from touch_tones import RATE, count_steps, read_digits, read_wav, write_dialled
from tqdm import tqdm

from collate import LengthTrackedBatch, PadCollator, apply_rnn
from samplers import LengthBucketBatchSampler, LengthIndex, ShardDataset

WINDOW, HOP, BANDS = 256, 128, 40
# Every tenth sample is held out of training.
HELD_OUT = 10


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of sound and digits, in one row order."""
    return PadCollator()([{"wav": each["wav"], "digits": each.get("txt", each.get("cls"))} for each in samples])


def mel_bank() -> Tensor:
    """Triangular filters, evenly spaced in mel, float32 `[WINDOW / 2 + 1, BANDS]`."""
    mel = torch.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), BANDS + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    hertz = torch.linspace(0, RATE / 2, WINDOW // 2 + 1)[:, None]
    rising, falling = (hertz - edges[:-2]) / edges.diff()[:-1], (edges[2:] - hertz) / edges.diff()[1:]
    return torch.minimum(rising, falling).clamp(min=0)


class Recogniser(nn.Module):
    """Log-mel frames, a bidirectional GRU, and log-probabilities of the digits and the blank for each frame."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.register_buffer("mel", mel_bank())
        self.gru = nn.GRU(BANDS, hidden, bidirectional=True)
        self.head = nn.Linear(2 * hidden, 11)

    def frames(self, sound: LengthTrackedBatch) -> LengthTrackedBatch:
        """Sound `[B, T]` to frames `[B, 1 + (T - WINDOW) // HOP, BANDS]`; a frame that contains padding is padding."""
        window = torch.hann_window(WINDOW)
        spectrum = torch.stft(sound.padded, WINDOW, HOP, window=window, center=False, return_complex=True)
        loudness = (spectrum.abs().square().transpose(1, 2) @ self.mel + 1e-4).log() / 4
        return sound.with_padded(loudness, lengths=1 + (sound.lengths - WINDOW) // HOP)

    def forward(self, sound: LengthTrackedBatch) -> LengthTrackedBatch:
        """Sound `[B, T]` to log-probabilities `[B, frames, 11]`."""
        hidden, _ = apply_rnn(self.gru, self.frames(sound))
        return hidden.map(self.head).map(lambda scores: scores.log_softmax(-1))


def loss_of(model: Recogniser, batch: dict[str, Any]) -> Tensor:
    """CTC loss in nats per digit."""
    scores, digits = model(batch["wav"]), batch["digits"]
    ctc = nn.CTCLoss(reduction="sum")
    return ctc(scores.padded.transpose(0, 1), digits.flat(), scores.lengths, digits.lengths) / digits.num_tokens


def read_out(scores: LengthTrackedBatch) -> list[list[int]]:
    """The digits of the likeliest path, in the order of the samples: repeats are merged, blanks removed."""
    paths = [row.argmax(-1).tolist() for row in scores.unsort().sequences()]
    return [[step - 1 for step, _ in groupby(path) if step] for path in paths]


def evaluate(model: Recogniser, parts: list[dict[str, Any]]) -> str:
    """CTC loss per digit, and the fraction of samples with no wrong digit."""
    with torch.no_grad():
        losses = [loss_of(model, part).item() * part["digits"].num_tokens for part in parts]
        found = [digits for part in parts for digits in read_out(model(part["wav"]))]
    said = [(digits - 1).tolist() for part in parts for digits in part["digits"].unsort().sequences()]
    right = [one == other for one, other in zip(found, said, strict=True)]
    loss = sum(losses) / sum(map(len, said))
    return f"loss {loss:.3f} nats per digit, {sum(right) / len(right):.1%} of {len(right)} held-out samples right"


def prove(model: Recogniser, samples: list[dict[str, Any]], on_disk: list[int]) -> None:
    """Compare the outputs of a batch with those of its samples one at a time, and its lengths with the files."""
    batch = collate(samples)["wav"]
    with torch.no_grad():
        together = model(batch).unsort().sequences()
        alone = [model(collate([sample])["wav"]).padded[0] for sample in samples]
    drift = max((row - one).abs().max().item() for row, one in zip(together, alone, strict=True))
    print(f"{len(samples)} held-out samples, as a batch and one at a time: largest difference {drift:.1e}")
    print(f"samples of sound in their files {on_disk}, in the batch {batch.unsort().lengths.tolist()}")
    if drift > 1e-4 or on_disk != batch.unsort().lengths.tolist():
        raise SystemExit("the batch and its samples give different outputs")


def run(shards: Path, steps: int) -> None:
    """Index, plan, train, evaluate, and compare a batch with its samples."""
    torch.manual_seed(0)
    # A second thread does not speed up small kernels.
    torch.set_num_threads(1)
    index = LengthIndex.build(shards, ["wav"], count_steps)
    files = ShardDataset(shards, index)
    label = "txt" if "txt" in files[0] else "cls"
    data = ShardDataset(shards, index, ["wav", label], decode={"wav": read_wav, label: read_digits})
    seconds = index.lengths / RATE
    print(f"{len(index):,} samples, {seconds.sum():,.0f} s of sound, {seconds.min():.2f} to {seconds.max():.2f} s each")
    indices = np.arange(len(index))
    sampler = LengthBucketBatchSampler(index, max_tokens=250_000, indices=indices[indices % HELD_OUT != 0])
    plan = sampler.plan(0)
    print(f"{plan.steps} batches: padding {plan.report().padding:.2%}, in random batches {plan.random_padding:.2%}")
    held_out = data.__getitems__(indices[::HELD_OUT].tolist())
    parts = [collate(held_out[first : first + 32]) for first in range(0, len(held_out), 32)]

    model = Recogniser()
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    print(f"before: {evaluate(model, parts)}")
    epochs = repeat(DataLoader(data, batch_sampler=sampler, collate_fn=collate))
    for batch in tqdm(islice(chain.from_iterable(epochs), steps), desc="train", unit="step", total=steps):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"after {steps} steps: {evaluate(model, parts)}")
    on_disk = [count_steps("wav", files[sample]["wav"]) for sample in indices[::HELD_OUT][:8].tolist()]
    prove(model, held_out[:8], on_disk)


def main(argv: list[str] | None = None) -> None:
    """Use the given shards, or make some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, help="folder of wav shards (default: made in a temporary folder)")
    parser.add_argument("--steps", type=int, default=300, help="training steps (%(default)s)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        if args.shards is None:
            write_dialled(Path(folder))
        run(args.shards or Path(folder), args.steps)


if __name__ == "__main__":
    main()
