"""Mutated shards and indexes, by the thousand: each gives the right data, or an error that names the file.

`python tests/support/fuzz.py [COUNT] [SEED]` makes COUNT trials (20,000), the i-th from the seed SEED + i, in
processes of their own, and prints how many were refused and how many served. At the first violation it prints the
trial's seed, with which `python tests/support/fuzz.py 1 THAT` makes it again, and exits with 1.

The law: never a hang, a crash or another error than ValueError (LengthError is one) and OSError, never an allocation
beyond a small multiple of the file's size, and, where checksums are stored, never other data.
"""

import faulthandler
import io
import json
import os
import resource
import shutil
import sys
import tarfile
import tempfile
import traceback
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from faults import BLIND, INDEX_WISE, TAR_WISE, npy, pax, put_together, take_apart, tar_of
from numpy.random import Generator

from samplers.shard_stream import ShardStream
from samplers.shards.dataset import ShardDataset
from samplers.shards.format.block_keys import KEYS
from samplers.shards.format.samples import decode_groups, field_of
from samplers.shards.format.tar import split_name
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.writing.writer import ShardWriter

COUNT = 20_000
NAMES = ("blocks", "blocks-1", "plain", "foreign")
CHUNK = 250
# Seconds after which a trial hangs; it takes some 10 ms.
PATIENCE = 60
# What a trial may allocate beside `TIMES` the file's size: caches, tables of a few hundred rows, messages.
SPARE, TIMES = 1 << 19, 8
# Address space that a trial may take beyond what its process has.
MOST = 1 << 31

Sample = dict[str, Any]


class ViolationError(Exception):
    """The law is broken; the message says how."""


@dataclass
class Corpus:
    """An intact corpus in a folder.

    Attributes:
        folder: where it is.
        files: name to bytes: two shards, their indexes and the corpus's index `all.ltx`.
        samples: what it holds, by place.
        values: of all samples, decoded and as they are stored.
        changed: names of files that are no longer intact.
    """

    folder: Path
    files: dict[str, bytes]
    samples: list[Sample]
    values: set[str]
    changed: set[str] = field(default_factory=set)

    def put(self, name: str, content: bytes) -> Path:
        """Write one of the files."""
        path = self.folder / name
        # Writing over a file makes some file systems wait for the disk.
        path.unlink(missing_ok=True)
        path.write_bytes(content)
        self.changed.add(name)
        return path

    def repair(self) -> None:
        """Make the corpus what it was."""
        for name in sorted(self.changed):
            self.put(name, self.files[name])
        self.changed.clear()


# --- corpora


def make_corpora(folder: Path) -> list[Corpus]:
    """Blocks and plain shards of the writer's, and plain ones of another program's with other encodings in them."""
    rng = np.random.default_rng(0)
    written = [_draw(rng, index) for index in range(24)]
    for name, layout, version in (("blocks", "blocks", 2), ("blocks-1", "blocks", 1), ("plain", "plain", 2)):
        options: dict[str, Any] = {"layout": layout, "version": version, "max_samples": 16, "block_size": 6}
        with ShardWriter(folder / name, prefix="all", **options) as writer:
            for sample in written:
                writer.write(sample)
    (folder / "foreign").mkdir()
    for shard in range(2):
        path = folder / "foreign" / f"all-{shard:06}.tar"
        path.write_bytes(put_together(_foreign(rng, shard)))
        LengthIndex.build(path, ["tokens"], checksums=True).save(f"{path}.ltx")
    shards = sorted((folder / "foreign").glob("*.tar"))
    LengthIndex.build(shards, ["tokens"], checksums=True).save(folder / "foreign" / "all.ltx")
    return [_load(folder / name) for name in NAMES]


def _draw(rng: Generator, index: int) -> Sample:
    steps = int(rng.integers(0, 30))
    return {
        "__key__": f"k{index}",
        "tokens": rng.integers(0, 100, steps),
        "audio": rng.random((int(rng.integers(1, 9)), 2, 3)).astype(np.float32),
        "label": index,
        "gain": 0.5,
    }


def _foreign(rng: Generator, shard: int) -> list[tuple[bytes, bytes]]:
    parts = pax({"comment": "for all"})
    for index in range(8):
        key = f"{shard}/k{index}" + "é" * 60 * (index == 3)
        tokens = npy(np.asfortranarray(rng.integers(0, 9, (int(rng.integers(0, 20)), 3)).astype(">i4")))
        members = [("tokens.npy", tokens), ("json", b'{"a": [1, 2]}'), ("wav", rng.bytes(99)), ("cls", b"7")]
        for suffix, data in members[: 4 - index % 3]:
            part = take_apart(tar_of([("x", data)]))
            parts += (
                pax({"path": f"{key}.{suffix}"}) + part
                if index % 2
                else take_apart(tar_of([(f"{key}.{suffix}", data)]))
            )
    return parts


def _load(folder: Path) -> Corpus:
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    dataset = ShardDataset(folder / "all.ltx")
    samples = [dataset[index] for index in range(len(dataset))]
    raw = [group for name in files if name.endswith(".tar") for group in groups(folder / name)[0]]
    # A forged index may call a member empty that a sample lacks.
    return Corpus(folder, files, samples, set().union({repr(b"")}, *map(values, samples + raw)))


# --- trials


def mutate(rng: Generator, content: bytes, wise: list[Any]) -> bytes:
    """One mutation, now and then two; those that know the format three times in four."""
    chosen = wise if rng.random() < 0.75 else BLIND
    mutated: bytes = chosen[rng.integers(len(chosen))](rng, content)
    while len(mutated) and rng.random() < 0.15:
        mutated = BLIND[rng.integers(len(BLIND))](rng, mutated)
    return mutated


def read_shard(corpus: Corpus, rng: Generator) -> bool:
    """A mutated shard with the index of the intact one: what is read is what was stored."""
    name = [name for name in corpus.files if name.endswith(".tar")][rng.integers(2)]
    path = corpus.put(name, mutate(rng, corpus.files[name], TAR_WISE))
    dataset = ShardDataset(corpus.folder / "all.ltx")
    served = [same(partial(dataset.__getitem__, index), corpus.samples[index], path) for index in range(len(dataset))]
    if rng.random() < 0.2:
        served.append(stream(corpus.folder / "all.ltx", corpus.samples, path))
    return all(served)


def read_index(corpus: Corpus, rng: Generator) -> bool:
    """A mutated index of intact shards: what it says is true, or refused when it is opened, read or verified.

    What a forged index calls a sample and its fields is told by `verify` alone; values are told by their checksums.
    """
    name = [name for name in corpus.files if name.endswith(".ltx")][rng.integers(3)]
    intact = LengthIndex.open(corpus.folder / name)
    path = corpus.put(name, mutate(rng, corpus.files[name], INDEX_WISE))
    index = attempt(partial(LengthIndex.open, path), path)
    if index is None:
        return False
    verified = attempt(partial(index.verify, checksums=index._tables.crcs is not None), path.parent, done=True)
    if verified and (told := facts(index, index.fields)) != (true := facts(intact, index.fields)):
        raise ViolationError(f"{path}: verified, but it says {told}, not {true}")
    dataset = ShardDataset(path)
    known = corpus.values
    served = [attempt(partial(dataset.__getitem__, place), path.parent) for place in range(len(dataset))]
    for sample in served:
        if sample is not None and index._tables.crcs is not None and not values(sample) <= known:
            raise ViolationError(f"other data is served: {sample}")
    streamed = stream(path, None, path.parent)
    return bool(verified) and streamed and None not in served


def facts(index: LengthIndex, fields: tuple[str, ...]) -> list[Any]:
    """What an index says of its samples, with the lengths of some fields: an index of fewer is true as well."""
    lengths = dict(zip(index.fields, index.lengths.reshape(len(index), -1).T.tolist(), strict=True))
    return [[lengths[name] for name in fields], list(index.keys), [Path(path).name for path in index.shards]]


def values(sample: Sample) -> set[str]:
    """What a sample holds, by whatever names."""
    return {
        repr((value.dtype, value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value)
        for name, value in sample.items()
        if name not in {"__key__", "__url__"}
    }


def build_index(corpus: Corpus, rng: Generator) -> bool:
    """A mutated shard that is indexed anew: it is what tarfile and NumPy say it is."""
    name = [name for name in corpus.files if name.endswith(".tar")][rng.integers(2)]
    path = corpus.put(name, mutate(rng, corpus.files[name], TAR_WISE))
    fields = None if rng.random() < 0.5 else ["tokens"]
    index = attempt(partial(LengthIndex.build, path, fields, checksums=bool(rng.random() < 0.5)), path)
    if index is None:
        return False
    index.save(f"{path}.ltx")
    corpus.changed.add(f"{name}.ltx")
    dataset = ShardDataset(path)
    reread = [attempt(partial(dataset.__getitem__, place), path) for place in range(len(dataset))]
    found, whole = groups(path)
    expected = {sample["__key__"]: sample for group in found for sample in oracle(group, index._tables.layout)}
    served = [read for read in reread if read is not None]
    for read in served:
        compare(read, expected.get(read["__key__"], {}))
    if not whole or len(served) == len(reread) != len(expected):
        raise ViolationError(f"{path}: {len(served)} of {len(reread)} samples served, tarfile finds {len(expected)}")
    return len(served) == len(reread)


def read_groups(corpus: Corpus, rng: Generator) -> bool:
    """A mutated shard as a webdataset pipeline hands its groups to `decode_groups`."""
    name = [name for name in corpus.files if name.endswith(".tar")][rng.integers(2)]
    path = corpus.put(name, mutate(rng, corpus.files[name], TAR_WISE))
    found, _ = groups(path)
    samples = attempt(lambda: list(decode_groups(found)), path)
    return samples is not None


TRIALS: list[Callable[[Corpus, Generator], bool]] = [read_shard, read_index, build_index, read_groups]


def attempt(read: Callable[[], Any], path: Path, *, done: object = None) -> Any:
    """What is read (`done` if nothing), or None where it is refused as it should be."""
    folder = path if path.is_dir() else path.parent
    size = sum(file.stat().st_size for file in folder.iterdir())
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    try:
        value = read()
    except (ValueError, OSError) as error:
        if str(path) not in str(error):
            raise ViolationError(f"the error does not name {path}: {error!r}") from error
        value = done = None
    _, peak = tracemalloc.get_traced_memory()
    if peak - before > SPARE + TIMES * size:
        raise ViolationError(f"{path}: {peak - before} bytes were allocated for files of {size}")
    return done if value is None else value


def same(read: Callable[[], Sample], expected: Sample, path: Path) -> bool:
    """Whether a sample is served, which must then be the expected one."""
    sample = attempt(read, path)
    if sample is not None:
        compare(sample, expected)
    return sample is not None


def stream(index: Path, expected: list[Sample] | None, path: Path) -> bool:
    """Whether a stream gives all, each once."""

    def read() -> list[Sample]:
        options: dict[str, Any] = {"max_tokens": 1 << 40, "batch_size": 4, "window": 10}
        batches = ShardStream(index, collate_fn=list, fields=["tokens"], **options)
        return [sample for batch in batches for sample in batch]

    samples = attempt(read, path)
    if samples is not None and expected is not None:
        keys = sorted(sample["__key__"] for sample in samples)
        if keys != sorted(sample["__key__"] for sample in expected):
            raise ViolationError(f"{path}: the stream gives {keys}")
    return samples is not None


def compare(sample: Sample, expected: Sample) -> None:
    """Hold a sample against what it must be."""
    if not equal(sample, expected):
        raise ViolationError(f"other data is served: {sample}, expected {expected}")


def equal(sample: Sample, expected: Sample) -> bool:
    """Whether two samples have the same fields of the same bytes."""
    if sample.keys() != expected.keys():
        return False
    pairs = [(sample[name], expected[name]) for name in sample]
    return all(
        a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray)
        else bool(a == b) or a != a
        for a, b in pairs
    )


# --- what tarfile and NumPy say


def groups(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Neighbours of one key, as webdataset hands them over, and whether tarfile has come to the end of the file."""
    found: list[dict[str, Any]] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                key, suffix = split_name(info.name) or ("", "")
                if info.offset_data + info.size > path.stat().st_size:
                    return found, False
                if info.isreg() and key:
                    if not found or found[-1]["__key__"] != key:
                        found.append({"__key__": key, "__url__": str(path)})
                    file = tar.extractfile(info)
                    found[-1][suffix] = file.read() if file else b""
    except (tarfile.TarError, ValueError, OverflowError, MemoryError):
        return found, False
    return found, True


def oracle(group: dict[str, Any], layout: str) -> Iterator[Sample]:
    """The samples of a group, the slow and plain way; none where NumPy or Python refuse it."""
    members = {suffix: data for suffix, data in group.items() if suffix not in {"__key__", "__url__"}}
    try:
        if layout == "plain":
            values = {field_of(suffix)[0]: decode(suffix, data) for suffix, data in members.items()}
            yield {"__key__": group["__key__"]} | values
        else:
            yield from cut_block({suffix.removesuffix(".npy"): load(data) for suffix, data in members.items()})
    except (ValueError, KeyError, zlib.error):
        return


def cut_block(arrays: dict[str, Any]) -> Iterator[Sample]:
    """The samples of a block."""
    stored = arrays.pop(KEYS.removesuffix(".npy"))
    keys = zlib.decompress(stored.tobytes()).decode().split("\0") if stored.dtype == np.uint8 else stored.tolist()
    columns = {}
    for name in [name for name in arrays if not name.endswith(".lengths")]:
        lengths = arrays.get(f"{name}.lengths")
        columns[name] = arrays[name] if lengths is None else np.split(arrays[name], np.cumsum(lengths)[:-1])
    for index, key in enumerate(keys):
        yield {"__key__": key} | {name: column[index] for name, column in columns.items()}


def load(data: bytes) -> Any:
    """An array as NumPy reads it, in native byte order."""
    array = np.load(io.BytesIO(data))
    return array.astype(array.dtype.newbyteorder("=")) if array.ndim else array[()]


def decode(suffix: str, data: bytes) -> Any:
    """A member as its suffix says."""
    decoders: dict[str, Callable[[bytes], Any]] = {
        "npy": load,
        "cls": lambda data: np.int64(int(data)),
        "json": json.loads,
        "txt": bytes.decode,
    }
    return decoders.get(field_of(suffix)[1], bytes)(data)


# --- runs


def run_trial(corpora: list[Corpus], seed: int) -> tuple[str, bool]:
    """The trial of a seed: its name, and whether all was served."""
    rng = np.random.default_rng(seed)
    corpus, trial = corpora[rng.integers(len(corpora))], TRIALS[rng.integers(len(TRIALS))]
    served = trial(corpus, rng)
    corpus.repair()
    return trial.__name__, served


def run_chunk(folder: Path, seeds: range) -> Counter[tuple[str, bool]]:
    """Trials one after the other, with bounds on time and memory; the seed is told at an error."""
    mine = folder / f"{os.getpid()}"
    if not mine.exists():
        shutil.copytree(folder / "corpora", mine)
    corpora = [_load(mine / name) for name in NAMES]
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MOST, resource.RLIM_INFINITY))
    tracemalloc.start()
    counts: Counter[tuple[str, bool]] = Counter()
    for seed in seeds:
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        (folder / f"{os.getpid()}.seed").write_text(str(seed))
        try:
            counts[run_trial(corpora, seed)] += 1
        except Exception as error:
            raise ViolationError(f"seed {seed}: {error!r}\n{traceback.format_exc(limit=-6)}") from error
    faulthandler.cancel_dump_traceback_later()
    (folder / f"{os.getpid()}.seed").unlink()
    tracemalloc.stop()
    return counts


def fuzz(count: int, first: int) -> Counter[tuple[str, bool]]:
    """Make trials in as many processes as there are cores.

    Returns:
        How many trials of each name were served (True) and refused.

    Raises:
        ViolationError: At the first; the message begins with the seed.
    """
    counts: Counter[tuple[str, bool]] = Counter()
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(os.cpu_count()) as pool:
        folder = Path(name)
        make_corpora(folder / "corpora")
        last = first + count
        chunks = [range(seed, min(seed + CHUNK, last)) for seed in range(first, last, CHUNK)]
        try:
            for chunk in as_completed([pool.submit(run_chunk, folder, chunk) for chunk in chunks]):
                counts += chunk.result()
        except BrokenProcessPool:
            seeds = [path.read_text() for path in folder.glob("*.seed")]
            raise ViolationError(f"seed {' or '.join(seeds)}: a process crashed or hung") from None
        except ViolationError:
            pool.shutdown(cancel_futures=True)
            raise
    return counts


def report(counts: Counter[tuple[str, bool]]) -> str:
    """A line for each kind of trial, and one for all."""
    names = [trial.__name__ for trial in TRIALS]
    rows = [(name, counts[name, False], counts[name, True]) for name in names]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    return "\n".join(f"{n:12} tried {a + b:6}  refused {a:6}  served {b:6}" for n, a, b in rows)


def main(count: str = str(COUNT), seed: str = "0") -> int:
    """Fuzz, and print what came of it; the exit status."""
    try:
        text, status = report(fuzz(int(count), int(seed))), 0
    except ViolationError as error:
        text, status = f"violation at {error}\nagain: python tests/support/fuzz.py 1 SEED", 1
    sys.stdout.write(f"{text}\n")
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
