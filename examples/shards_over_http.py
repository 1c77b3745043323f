"""Shards on a web server: one epoch reads by index and fetches ranges, one epoch streams whole shards.

The corpus is written to a temporary folder. A separate process serves it and counts the bytes that it sends. For HTTP,
fsspec needs aiohttp: pip install aiohttp.
"""

import json
import multiprocessing
import tempfile
import urllib.request
from collections.abc import Iterable
from socket import create_server, socket
from typing import Any

import numpy as np
from aiohttp import web
from torch.utils.data import DataLoader

from collate import PadCollator
from samplers import LengthBucketBatchSampler, ShardDataset, ShardStream, ShardWriter


def write_corpus(folder: str) -> int:
    """Write 3,000 sequences of 100 to 8,000 tokens to six shards. Returns the bytes of the shards."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(7.5, 0.6, 3_000), 100, 8_000).astype(int)
    with ShardWriter(folder, max_samples=500) as writer:
        for number, length in enumerate(lengths.tolist()):
            writer.write({"__key__": f"s{number}", "tokens": rng.integers(0, 30_000, length, dtype=np.int32)})
    return sum(shard.stat().st_size for shard in writer.shards)


def serve(folder: str, listening: socket) -> None:
    """Serve a folder. `/sent` returns the number of requests and bytes since the last call of `/sent`."""
    sent = [0, 0]

    async def count(request: web.Request, response: web.StreamResponse) -> None:
        if request.path != "/sent":
            sent[0] += 1
            sent[1] += response.content_length or 0 if request.method == "GET" else 0

    async def tell(request: web.Request) -> web.Response:
        told, sent[:] = sent.copy(), [0, 0]
        return web.json_response(told)

    app = web.Application()
    app.on_response_prepare.append(count)
    app.add_routes([web.get("/sent", tell), web.static("/corpus", folder)])
    web.run_app(app, sock=listening, print=None)


def report(name: str, root: str, batches: Iterable[dict[str, Any]]) -> None:
    """Read an epoch. Print its samples and padding, and the requests and bytes of the server."""
    fields = [batch["tokens"] for batch in batches]
    padding = 1 - sum(field.num_tokens for field in fields) / sum(field.padded.numel() for field in fields)
    with urllib.request.urlopen(f"{root}/sent") as answer:
        requests, size = json.load(answer)
    print(f"{name}: {sum(map(len, fields)):,} samples, padding {padding:.2%}; {requests:,} requests, {size:,} bytes")


def main() -> None:
    """Write and serve a corpus, and read one epoch in each way."""
    with tempfile.TemporaryDirectory() as folder, create_server(("127.0.0.1", 0)) as listening:
        print(f"the shards have {write_corpus(folder):,} bytes")
        server = multiprocessing.Process(target=serve, args=(folder, listening), daemon=True)
        server.start()
        root = "http://{}:{}".format(*listening.getsockname())
        data, collate = ShardDataset(f"{root}/corpus/shard.ltx"), PadCollator()
        sampler = LengthBucketBatchSampler(data.index, max_tokens=65_536)
        report("by index", root, DataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=2))
        # Each worker of a stream fetches the shards of its own batches.
        stream = ShardStream(f"{root}/corpus/shard.ltx", collate_fn=collate, max_tokens=65_536)
        report("stream", root, DataLoader(stream, batch_size=None, num_workers=1))
        server.terminate()
        server.join()


if __name__ == "__main__":
    main()
