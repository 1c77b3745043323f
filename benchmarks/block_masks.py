"""`VarlenBatch.block_mask` against torch's `create_block_mask`, which looks at all pairs of steps, on one core.

`create_block_mask` takes C x C bytes and more, 69 GB at 262,144 steps, so it is measured up to 16,384. Whether the C
library keeps freed memory decides half of the time at 262,144 steps, where the tables take 67 MB: `keep_pages`.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch
from harness import Bar, Row, compare, keep_pages, save
from torch.nn.attention.flex_attention import create_block_mask

from collate import VarlenBatch

KINDS = {"causal": {}, "bidirectional": {}, "sliding": {"window": 1024}, "prefix": {"prefix": 64}}
OURS, DENSE = "block_mask", "create_block_mask"
# Steps of the row, documents, and the most milliseconds.
SIZES = ((16_384, 64, None), (32_768, 128, 1.0), (262_144, 10_000, 10.0))


def documents(steps: int, count: int) -> VarlenBatch:
    """One row of documents with log-normal lengths."""
    weights = np.random.default_rng(0).lognormal(0, 1, count)
    lengths = np.maximum((weights / weights.sum() * steps * 0.98).astype(np.int64), 1)
    return VarlenBatch(torch.zeros(1, steps, dtype=torch.int8), lengths)


def measure() -> tuple[list[Row], list[Bar]]:
    """All kinds at all sizes, and what is reached next to what was aimed at."""
    rows, bars = [], []
    for steps, count, most in SIZES:
        batch = documents(steps, count)
        for kind, options in KINDS.items():

            def ours(batch: VarlenBatch = batch, kind: str = kind, options: dict = options) -> object:
                return fresh(batch).block_mask(kind, **options)

            case = f"{kind}, {steps:,} steps, {count:,} documents"
            if most is None:
                allowed = ours().mask_mod
                dense = {DENSE: lambda a=allowed, n=steps: create_block_mask(a, 1, None, n, n, device="cpu")}
                rows.append(compare(case, OURS, {OURS: ours, **dense}, rounds=3))
            else:
                taken = processor_time(ours)
                print(f"{case}: {taken:.2f} ms of the processor   (target: {most:g} ms)", flush=True)
                bars.append((case, f"at most {most:g} ms", f"{taken:.2f} ms", taken <= most))
    return rows, bars


def processor_time(call: Callable[[], object], calls: int = 201) -> float:
    """The median time of a call, in milliseconds of the processor: waiting for other programs does not count."""
    times = []
    for _ in range(calls):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times) * 1000


def fresh(batch: VarlenBatch) -> VarlenBatch:
    """The same documents without what earlier calls have made of them."""
    return VarlenBatch(batch.values, batch.lengths)


def main() -> None:
    """Print and save all cases."""
    torch.set_num_threads(1)
    keep_pages()
    rows, bars = measure()
    save("block_masks", {"cases": [asdict(row) for row in rows], "bars": bars})


if __name__ == "__main__":
    main()
