"""datasets: lengths of a list column from Arrow's offsets, or from a column that holds them; no row becomes Python.

python examples/frameworks/huggingface_datasets.py
"""

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from parity import COLLATE, MAX_TOKENS, Parity, Tagger, take_step
from tally import Tally, show
from torch.utils.data import DataLoader

from samplers import LengthBucketBatchSampler


def make_table() -> Dataset:
    """The toy as a table in memory, shuffled, with a column of lengths."""
    data = Parity()
    samples = [data[place] for place in range(len(data))]
    rows = [{"id": s["id"], "bits": s["bits"].numpy(), "odd": s["odd"].numpy(), "n": len(s["bits"])} for s in samples]
    return Dataset.from_list(rows).shuffle(seed=3)


def lengths_of(table: Dataset, column: str) -> np.ndarray:
    """Lengths `[N]` of a list column, in the order of the rows; `table.data` would give them in another."""
    blocks = table.select_columns(column).with_format("arrow").iter(batch_size=10_000)
    return np.concatenate([pc.list_value_length(block[column]).to_numpy() for block in blocks])


def train(table: Dataset, lengths: np.ndarray) -> None:
    """Two epochs; the loader asks the table for all rows of a batch at once."""
    sampler = LengthBucketBatchSampler(lengths, max_tokens=MAX_TOKENS)
    loader = DataLoader(table, batch_sampler=sampler, collate_fn=COLLATE)
    model = Tagger()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for epoch in range(2):
        tally = Tally(len(table))
        for batch in loader:
            take_step(model, optimizer, batch, tally)
        show(f"epoch {epoch}", tally)


def main() -> None:
    """Print both ways to the lengths, and train."""
    table = make_table()
    lengths = lengths_of(table, "bits")
    print("lengths from offsets", lengths[:8], "from the column", table.with_format("numpy")["n"][:8])
    train(table, lengths)


if __name__ == "__main__":
    main()
