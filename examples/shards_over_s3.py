"""A corpus in an object store: written there, read by index along the plan, streamed, and kept in a cache.

The program starts its own S3 server, moto, so that it needs no account: pip install s3fs 'moto[server]'. For a real
store, leave the server out: s3fs finds credentials as other AWS programs do.
"""

import logging
import multiprocessing
import os
import tempfile
import urllib.request
from collections.abc import Iterable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from collate import PadCollator
from samplers import LengthBucketBatchSampler, ShardDataset, ShardStream, ShardWriter


def serve(connection: Connection) -> None:
    """Serve an empty bucket, and tell its address. moto needs much memory, so it has a process of its own."""
    from moto.server import ThreadedMotoServer  # noqa: PLC0415

    # One line for each request.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/corpus", method="PUT")).close()
    connection.send(f"http://{host}:{port}")
    # Until the main program has ended.
    connection.recv()


def write_corpus(url: str) -> None:
    """Write 600 sequences of 100 to 8,000 tokens to six shards. Each is sent when it is complete."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(7.5, 0.6, 600), 100, 8_000).astype(int)
    with ShardWriter(url, max_samples=100) as writer:
        for number, length in enumerate(lengths.tolist()):
            writer.write({"__key__": f"s{number}", "tokens": rng.integers(0, 30_000, length, dtype=np.int32)})
    print(f"written: {', '.join(writer.shards)}")


def report(name: str, reader: ShardDataset | ShardStream, batches: Iterable[dict[str, Any]]) -> None:
    """Read an epoch. Print its samples, and what has been transferred so far."""
    samples = sum(len(batch["tokens"]) for batch in batches)
    sums = reader.transfers
    print(
        f"{name}: {samples:,} samples; so far {sums['requests']:,} requests, {sums['bytes']:,} bytes, "
        f"{sums['retries']} retries, waited {sums['waited_seconds']:.2f} s"
    )


def main() -> None:
    """Write a corpus, and read it in several ways."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    # s3fs reads these, as other clients of AWS do.
    os.environ |= {"AWS_ENDPOINT_URL": ours.recv(), "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")
    write_corpus("s3://corpus/speech")

    index, collate = "s3://corpus/speech/shard.ltx", PadCollator()
    data = ShardDataset(index)
    sampler = LengthBucketBatchSampler(data.index, max_tokens=65_536)
    # The plan says which ranges come next: they are fetched while a batch is used.
    report("by index", data, DataLoader(data.follow(sampler), batch_sampler=sampler, collate_fn=collate))
    with tempfile.TemporaryDirectory() as cache:
        stream = ShardStream(index, collate_fn=collate, max_tokens=65_536, cache=cache)
        report("stream", stream, DataLoader(stream, batch_size=None))
        report("stream again, from the cache", stream, DataLoader(stream, batch_size=None))
    ours.send("end")
    server.join()


if __name__ == "__main__":
    main()
