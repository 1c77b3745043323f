"""`VarlenCollator` against `PadCollator`, one bare `torch.cat`, and transformers' `DataCollatorWithFlattening`.

All collate the same 64 documents of 100 to 600 int64. `torch.cat` gives the flat values alone,
`DataCollatorWithFlattening` values, labels and position ids, here with its offsets for kernels too, `VarlenCollator`
values and all offsets; masks and ids are spread out of these when they are asked for, which the case "with all ids"
does.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import TypeAlias

import harness
import numpy as np
import torch
from harness import Row, compare, keep_pages, save

from collate import PadCollator, VarlenBatch, VarlenCollator

try:
    from transformers import DataCollatorWithFlattening
except ImportError:
    DataCollatorWithFlattening = None

Calls: TypeAlias = dict[str, Callable[[], object]]

# Turns that end within a time slice of a machine that others use, and many of them.
harness.TURN_MICROSECONDS = 1_000
ROUNDS = 1001


def all_ids(batch: VarlenBatch) -> tuple[object, ...]:
    """What a step of a language model takes: all ids, offsets and labels."""
    return batch.mask, batch.document_ids, batch.position_ids, batch.cu_seqlens, batch.next_step_labels()


def measure() -> list[Row]:
    """All cases."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(100, 601, 64).tolist()
    tensors = [torch.from_numpy(rng.integers(1, 1000, n)) for n in lengths]
    arrays = [tensor.numpy() for tensor in tensors]
    pad, flat = PadCollator(), VarlenCollator()
    rows, aligned = VarlenCollator(capacity=4096), VarlenCollator(capacity=4096, align=8)
    planned = VarlenCollator(capacity=4096, arrange="given")
    name, case = "VarlenCollator", "64 documents of 100 to 600 int64"
    bar = "PadCollator 2x, torch.cat 0.2x"
    measured = [
        compare(
            f"{case}, one row, from {kind}",
            name,
            {
                name: lambda s=samples: flat(s),
                "PadCollator": lambda s=samples: pad(s),
                "torch.cat": lambda: torch.cat(tensors),
            },
            rounds=ROUNDS,
            bar=bar,
        )
        for kind, samples in (("tensors", tensors), ("arrays", arrays))
    ]
    calls: Calls = {
        name: lambda: rows(tensors),
        'arrange="given"': lambda: planned(tensors),
        "align=8": lambda: aligned(tensors),
        "PadCollator": lambda: pad(tensors),
    }
    measured.append(compare(f"{case}, rows of 4096 by best fit", name, calls, rounds=ROUNDS, bar="PadCollator 2x"))
    if DataCollatorWithFlattening is None:
        print("transformers is not installed and is left out: `pip install transformers`")
        return measured
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    samples = [{"input_ids": tensor} for tensor in tensors]
    lists = [{"input_ids": tensor.tolist()} for tensor in tensors]
    for kind, dicts in (("tensors", samples), ("lists", lists)):
        calls = {
            name: lambda s=dicts: all_ids(flat(s)["input_ids"]),
            "DataCollatorWithFlattening": lambda s=dicts: theirs(s),
        }
        measured.append(compare(f"{case}, with all ids, from {kind}", name, calls, rounds=ROUNDS // 4, bar="3x"))
    return measured


def main() -> None:
    """Print and save all cases."""
    torch.set_num_threads(1)
    keep_pages()
    save("varlen", [asdict(row) for row in measure()])


if __name__ == "__main__":
    main()
