"""An epoch of another library from an object store, in its own environment; `benchmarks/remote.py` calls it.

    python benchmarks/remote_peer.py mosaicml|litdata tokens.npz FOLDER WORKERS

It writes the sequences to `FOLDER/data`, sends them to the store of the environment's AWS_ENDPOINT_URL, and prints the
seconds of a first epoch, whose cache is empty, and of a second one as JSON.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import numpy as np
from torch.utils.data import DataLoader

ROWS, SHARD_BYTES = 25, 1_500_000


def main() -> None:
    """Write, send and read."""
    library, source, target, workers = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])
    stored = np.load(source)
    samples = np.split(stored["tokens"], np.cumsum(stored["lengths"])[:-1])
    (target / "data").mkdir(parents=True)
    write, open_loader = LIBRARIES[library]
    write(samples, target / "data")
    store = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    for path in sorted(path for path in (target / "data").rglob("*") if path.is_file()):
        store.upload_file(str(path), "corpus", f"{library}/{path.relative_to(target / 'data').as_posix()}")
    seconds = []
    loader = open_loader(f"s3://corpus/{library}", target / "cache", workers)
    for _ in range(2):
        begin = time.perf_counter()
        count = sum(len(batch) for batch in loader)
        seconds.append(time.perf_counter() - begin)
        if count != len(samples):
            raise RuntimeError(f"{count} samples were read, {len(samples)} are there")
    sys.stdout.write(json.dumps(seconds) + "\n")


def write_mosaicml(samples: list[Any], folder: Path) -> None:
    """MDS shards."""
    import streaming  # noqa: PLC0415

    with streaming.MDSWriter(out=str(folder), columns={"tokens": "ndarray:int64"}, size_limit=SHARD_BYTES) as writer:
        for sample in samples:
            writer.write({"tokens": sample})


def open_mosaicml(url: str, cache: Path, workers: int) -> Iterable[Any]:
    """Its dataset, with its shuffle."""
    import streaming  # noqa: PLC0415

    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
    dataset = streaming.StreamingDataset(remote=url, local=str(cache), shuffle=True, batch_size=ROWS)
    return DataLoader(dataset, batch_size=ROWS, collate_fn=list, num_workers=workers)


def write_litdata(samples: list[Any], folder: Path) -> None:
    """Its chunks."""
    import litdata  # noqa: PLC0415

    options = {"output_dir": str(folder), "chunk_bytes": SHARD_BYTES, "num_workers": 1, "verbose": False}
    litdata.optimize(partial(one_of, samples), inputs=list(range(len(samples))), **options)


def one_of(samples: list[Any], index: int) -> Any:
    """One sample."""
    return samples[index]


def open_litdata(url: str, cache: Path, workers: int) -> Iterable[Any]:
    """Its dataset and its loader."""
    import litdata  # noqa: PLC0415

    # Its client refuses HTTP without this, and there is no option for it.
    litdata.streaming.downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = "true"  # noqa: SLF001
    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    dataset = litdata.StreamingDataset(url, shuffle=True, cache_dir=str(cache), storage_options=options)
    loader: Iterable[Any] = litdata.StreamingDataLoader(dataset, batch_size=ROWS, collate_fn=list, num_workers=workers)
    return loader


LIBRARIES: dict[str, tuple[Callable[..., None], Callable[..., Iterable[Any]]]] = {
    "mosaicml": (write_mosaicml, open_mosaicml),
    "litdata": (write_litdata, open_litdata),
}

if __name__ == "__main__":
    main()
