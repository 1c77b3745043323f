"""The three works: corpora that are made from a seed, and read back as flat arrays."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

ROWS: Final = 64
VOCABULARY: Final = 32_000
# Steps of a prompt have no label, as in fine-tuning.
NO_LABEL: Final = -100
# The value of padding, by field.
PADDING: Final = {"tokens": 0, "labels": NO_LABEL, "frames": 0}
SAMPLES: Final = {"tokens": 100_000, "frames": 10_000, "sft": 8_000}


@dataclass(frozen=True)
class Work:
    """A corpus as flat arrays.

    Attributes:
        name: Its name.
        lengths: Time steps of each sample, int64 `[N]`.
        fields: Values of all samples end to end, `[sum of lengths, *F]` by field.
    """

    name: str
    lengths: Array
    fields: dict[str, Array]

    @property
    def starts(self) -> Array:
        """The first step of each sample, int64 `[N]`."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def nbytes(self) -> int:
        """Bytes of all values: the payload."""
        return sum(values.nbytes for values in self.fields.values())

    def samples(self) -> "list[dict[str, Array]]":
        """Every sample as views, by field."""
        ends = np.cumsum(self.lengths).tolist()
        starts = [0, *ends[:-1]]
        return [
            {name: values[start:end] for name, values in self.fields.items()}
            for start, end in zip(starts, ends, strict=True)
        ]

    def key(self, index: int) -> str:
        """The key of a sample, such as `tokens-00000001`."""
        return f"{self.name}-{index:08}"

    def totals(self) -> dict[str, float]:
        """By field, the sum of all values above the value of padding. Exact: see `total`."""
        return {name: total(values, PADDING[name]) for name, values in self.fields.items()}

    def save(self, folder: Path) -> None:
        """Write the arrays as `.npy` files."""
        folder.mkdir(parents=True)
        np.save(folder / "lengths.npy", self.lengths)
        for name, values in self.fields.items():
            np.save(folder / f"{name}.npy", values)

    @classmethod
    def open(cls, folder: Path) -> "Work":
        """Map the arrays that `save` has written. They are writable, and writes stay in the process."""
        fields = {
            path.stem: np.asarray(np.load(path, mmap_mode="c"))
            for path in sorted(folder.glob("*.npy"), reverse=True)
            if path.stem != "lengths"
        }
        return cls(folder.name, np.load(folder / "lengths.npy"), fields)


def total(values: Array, padding: int) -> float:
    """The sum of values above the value of padding, to which padding adds nothing.

    It is exact in any order: numbers are integers, or multiples of 2^-24 below 1, and float64 has 53 bits.
    """
    return float(values.sum(dtype=np.float64)) - padding * values.size


def make_work(name: str, scale: float = 1.0) -> Work:
    """A work of this name, or a fraction of it.

    Args:
        name: `tokens`: int64, log-normal lengths 1..400 of mean 29. `frames`: float32 of 16 features, about 200 steps.
            `sft`: tokens and labels of mean 609, int64, the first third of the labels without a value.
        scale: Fraction of the samples.
    """
    rng = np.random.default_rng([18, *name.encode()])
    count = max(1, round(SAMPLES[name] * scale))
    if name == "frames":
        lengths = np.clip(rng.normal(200, 50, count), 1, None).astype(np.int64)
        return Work(name, lengths, {"frames": rng.random((int(lengths.sum()), 16), np.float32)})
    mean, sigma, low, high = (30.1, 0.8, 1, 400) if name == "tokens" else (612, 0.6, 16, 4_096)
    lengths = np.clip(rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count), low, high).astype(np.int64)
    tokens = rng.integers(1, VOCABULARY, int(lengths.sum()))
    if name == "tokens":
        return Work(name, lengths, {"tokens": tokens})
    starts = np.repeat(np.cumsum(lengths) - lengths, lengths)
    prompt = np.arange(len(tokens)) - starts < np.repeat(lengths // 3, lengths)
    return Work(name, lengths, {"tokens": tokens, "labels": np.where(prompt, NO_LABEL, tokens)})
