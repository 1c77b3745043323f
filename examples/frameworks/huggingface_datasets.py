"""datasets: lengths from Arrow's offsets of a list column, or from a column of lengths, without reading rows.

python examples/frameworks/huggingface_datasets.py
"""

import numpy as np
import torch
from datasets import Dataset
from parity import COLLATE, MAX_TOKENS, Parity, Tagger, take_step
from tally import Tally, show
from torch.utils.data import DataLoader

from samplers import LengthBucketBatchSampler, lengths_of


def make_table() -> Dataset:
    """The toy data as a shuffled table in memory, with a column of lengths."""
    data = Parity()
    samples = [data[index] for index in range(len(data))]
    rows = [{"id": s["id"], "bits": s["bits"].numpy(), "odd": s["odd"].numpy(), "n": len(s["bits"])} for s in samples]
    return Dataset.from_list(rows).shuffle(seed=3)


def train(table: Dataset, lengths: np.ndarray) -> None:
    """Train two epochs. The loader fetches all rows of a batch at once."""
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
    """Print the lengths from both sources, and train."""
    table = make_table()
    lengths = lengths_of(table, "bits")
    print("lengths from offsets", lengths[:8], "from the column", table.with_format("numpy")["n"][:8])
    train(table, lengths)


if __name__ == "__main__":
    main()
