"""`PadCollator` against `pad_sequence` alone, a collate function as one writes it by hand, and a memcpy."""

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch
from harness import Row, compare, save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from collate import PadCollator


def by_hand(rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The collate function that everybody writes: sort, pad, lengths, mask."""
    lengths = torch.tensor([len(row) for row in rows])
    order = lengths.argsort(descending=True, stable=True)
    padded = pad_sequence([rows[i] for i in order.tolist()], batch_first=True)
    lengths = lengths[order]
    return padded, lengths, torch.arange(padded.shape[1]) < lengths[:, None], order


def measure(count: int, steps: int, features: tuple[int, ...], dtype: str, bar: str) -> list[Row]:
    """One shape, from arrays and from tensors."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(steps, steps / 4, count), 1, None).astype(int)
    arrays = [rng.integers(1, 100, (length, *features)).astype(dtype) for length in lengths]
    tensors = [torch.from_numpy(array) for array in arrays]
    collate = PadCollator()
    block = collate(tensors).padded
    peers: dict[str, Callable[[], object]] = {
        "pad_sequence alone": lambda: pad_sequence(tensors, batch_first=True),
        "by hand": lambda: by_hand(tensors),
        "one memcpy of the block": block.clone,
    }
    case = f"{count} x {steps}{''.join(f' x {size}' for size in features)} {dtype}"
    return [
        compare(f"{case} from {kind}", "PadCollator", {"PadCollator": lambda s=samples: collate(s), **peers}, bar=bar)
        for kind, samples in (("arrays", arrays), ("tensors", tensors))
    ]


def main() -> None:
    """Print and save all shapes."""
    torch.set_num_threads(1)
    shapes: list[tuple[int, int, tuple[int, ...], str, str]] = [
        (32, 30, (), "int64", ""),
        (256, 30, (), "int64", "4x of pad_sequence from arrays, 3x from tensors"),
        (512, 200, (), "int64", ""),
        (64, 400, (80,), "float32", "memcpy's time x 1.3 at most"),
        (256, 50, (128,), "float32", ""),
    ]
    save("collation", [asdict(row) for shape in shapes for row in measure(*shape)])


if __name__ == "__main__":
    main()
