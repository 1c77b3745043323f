"""torchdata.nodes: length-bucketed batches from a stream of samples, saved behind a prefetcher, and restored.

python examples/frameworks/torchdata_nodes.py
"""

import gc
from itertools import islice

import torch
from parity import COLLATE, MAX_TOKENS, Parity, Tagger, take_step
from tally import Tally, show
from torch.utils.data import DistributedSampler
from torchdata.nodes import Loader, ParallelMapper, Prefetcher, SamplerWrapper

from samplers import LengthBucketNode

DATA = Parity()


def make_loader() -> Loader:
    """Indices in random order -> samples -> batches of similar length -> padded batches, in threads."""
    # The order of this sampler depends only on the epoch number, so a resumed run gets the same order.
    indices = SamplerWrapper(DistributedSampler(DATA, num_replicas=1, rank=0))
    samples = ParallelMapper(indices, DATA.__getitem__, num_workers=2, method="thread")
    batches = LengthBucketNode(samples, "bits", max_tokens=MAX_TOKENS, buffer_size=300)
    padded = ParallelMapper(batches, COLLATE, num_workers=2, method="thread")
    return Loader(Prefetcher(padded, prefetch_factor=4))


def main() -> None:
    """Train two epochs. The second one stops, and another loader resumes it."""
    model = Tagger()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    first, second = make_loader(), make_loader()
    tallies = [Tally(len(DATA)), Tally(len(DATA))]
    for batch in first:
        take_step(model, optimizer, batch, tallies[0])
    for batch in islice(first, 20):
        take_step(model, optimizer, batch, tallies[1])
    print(f"stopped after {tallies[1].batches} batches")
    second.load_state_dict(first.state_dict())
    for batch in second:
        take_step(model, optimizer, batch, tallies[1])
    for epoch, tally in enumerate(tallies):
        show(f"epoch {epoch}", tally)


if __name__ == "__main__":
    main()
    # The loader that was stopped still has threads. They end when it is collected, and must not outlast Python.
    gc.collect()
