"""`pack` and `unpack` on the CPU against torch's `pack_padded_sequence` and `pad_packed_sequence`."""

from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch
from harness import Row, compare, keep_pages, save
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from collate import LengthTrackedBatch

ROWS, FEATURES = 64, 256
BAR = "never slower than torch by more than 5 %"


def batch_of(steps: int, *, is_sorted: bool) -> LengthTrackedBatch:
    """Random values float32 `[64, T, 256]` with lengths from T / 2 to T, longest first or in random order."""
    lengths = np.random.default_rng(0).integers(steps // 2, steps + 1, ROWS)
    lengths[0] = steps
    order = "longest" if is_sorted else "given"
    return LengthTrackedBatch.from_sequences([torch.randn(int(n), FEATURES) for n in lengths], order=order)


def pack_by_torch(batch: LengthTrackedBatch, *, is_sorted: bool) -> PackedSequence:
    """Torch's packing, as users call it."""
    return pack_padded_sequence(batch.padded, batch.lengths, batch_first=True, enforce_sorted=is_sorted)


def unpack_by_torch(packed: PackedSequence, width: int) -> Tensor:
    """Torch's unpacking, as users call it, to the width of the batch."""
    return pad_packed_sequence(packed, batch_first=True, total_length=width)[0]


def derive(there_and_back: Callable[[], Tensor], gradient: Tensor, block: Tensor) -> Tensor:
    """Pack, unpack, and compute the gradient of the padded tensor."""
    (found,) = torch.autograd.grad(there_and_back(), block, gradient)
    return found


def measure(steps: int, *, is_sorted: bool) -> list[Row]:
    """One shape: pack, unpack, and both with gradients."""
    batch = batch_of(steps, is_sorted=is_sorted)
    packed, gradient = batch.pack(), torch.randn_like(batch.padded)
    leaf = batch.with_padded(batch.padded.clone().requires_grad_())
    calls: dict[str, dict[str, Callable[[], object]]] = {
        "pack": {"lengthtrack": batch.pack, "torch": lambda: pack_by_torch(batch, is_sorted=is_sorted)},
        "unpack": {
            "lengthtrack": lambda: batch.unpack(packed),
            "torch": lambda: unpack_by_torch(packed, steps),
            # torch returns a view of a time-major tensor; ours is contiguous.
            "torch, contiguous": lambda: unpack_by_torch(packed, steps).contiguous(),
        },
        "both with gradients": {
            "lengthtrack": lambda: derive(lambda: leaf.unpack(leaf.pack()).padded, gradient, leaf.padded),
            "torch": lambda: derive(
                lambda: unpack_by_torch(pack_by_torch(leaf, is_sorted=is_sorted), steps), gradient, leaf.padded
            ),
        },
    }
    case = f"{ROWS} x {steps} x {FEATURES} float32, {'sorted' if is_sorted else 'unsorted'}"
    # torch's gradients take seconds at T = 2000.
    rounds = {"pack": 41, "unpack": 41, "both with gradients": 3 if steps == 2_000 else 9}
    return [
        compare(f"{case}: {what}", "lengthtrack", contenders, rounds=rounds[what], bar=BAR)
        for what, contenders in calls.items()
    ]


def main() -> None:
    """Print and save all cases."""
    torch.set_num_threads(1)
    keep_pages()
    torch.manual_seed(0)
    cases = [(steps, is_sorted) for steps in (50, 400, 2_000) for is_sorted in (True, False)]
    save("packing", [asdict(row) for steps, is_sorted in cases for row in measure(steps, is_sorted=is_sorted)])


if __name__ == "__main__":
    main()
