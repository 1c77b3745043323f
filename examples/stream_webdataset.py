"""The shards of the main job as a plain webdataset stream, without an index, bucketed as samples arrive.

A webdataset pipeline reads the tars. `decode_groups` splits their blocks into samples (and never unpickles).
`bucket_by_length` makes batches of similar length from a bounded buffer. `PadCollator` pads them in the worker.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import webdataset as wds
from stdlib_corpus import open_corpus

from collate import PadCollator
from samplers import bucket_by_length
from samplers.shards import decode_groups

PADDING = {"input": 0, "target": -100}


def in_turn(collate: Callable[[list[Any]], Any], batches: Iterable[list[Any]]) -> Iterator[Any]:
    """A stage that collates each batch."""
    return map(collate, batches)


def as_they_come(max_tokens: int, samples: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The usual way without bucketing: fill each batch with the next samples."""
    batch: list[dict[str, Any]] = []
    width = 0
    for sample in samples:
        length = len(sample["input"])
        if batch and (len(batch) + 1) * max(width, length) > max_tokens:
            yield batch
            batch, width = [], 0
        if length <= max_tokens:
            batch, width = [*batch, sample], max(width, length)
    if batch:
        yield batch


def batches_of(shards: list[str], workers: int, stage: Callable[[Iterable[Any]], Iterator[Any]]) -> wds.WebLoader:
    """A loader of collated batches; workers share the shards."""
    pipeline = wds.DataPipeline(
        wds.SimpleShardList(shards),
        wds.split_by_worker,
        wds.tarfile_to_samples(),
        decode_groups,
        stage,
        partial(in_turn, PadCollator(PADDING)),
    )
    return wds.WebLoader(pipeline, batch_size=None, num_workers=min(workers, len(shards)))


def report(name: str, batches: Iterable[dict[str, Any]]) -> None:
    """Print the number of sequences and batches, and the padding."""
    fields = [batch["input"] for batch in batches]
    real, padded = sum(field.num_tokens for field in fields), sum(field.mask.numel() for field in fields)
    sequences = sum(map(len, fields))
    print(f"{name:<28}{sequences:>8,} sequences {len(fields):>6,} batches   padding {1 - real / padded:6.2%}")


def main(argv: list[str] | None = None) -> None:
    """Stream the corpus twice under the same budget: bucketed, and in the order of arrival."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path("runs/stdlib"), help="folder of the shards; written if absent (%(default)s)"
    )
    parser.add_argument(
        "--max-tokens", type=int, default=16_384, help="largest number of padded tokens in a batch (%(default)s)"
    )
    parser.add_argument(
        "--buffer-size", type=int, default=2_000, help="size of the buffer of each worker, in samples (%(default)s)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that read, bucket and collate (%(default)s)")
    args = parser.parse_args(argv)
    open_corpus(args.data)
    shards = sorted(str(path) for path in args.data.glob("*.tar"))
    bucketed = bucket_by_length("input", max_tokens=args.max_tokens, buffer_size=args.buffer_size, overlong="drop")
    report("bucketed by length", batches_of(shards, args.workers, bucketed))
    report("in the order of arrival", batches_of(shards, args.workers, partial(as_they_come, args.max_tokens)))


if __name__ == "__main__":
    main()
