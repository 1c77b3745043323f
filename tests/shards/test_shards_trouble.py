"""Writers and readers in trouble: few descriptors, a full disk, a rival, keys and values at the edge of the format."""

import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from corpora import LAYOUTS, tokens, write
from hypothesis import given
from hypothesis import strategies as st

from samplers.shards.dataset import ShardDataset
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.storage import atomic as newfile
from samplers.shards.storage.atomic import AtomicFile, remove_leftover
from samplers.shards.writing.writer import ShardWriter


def run(code: Any, *arguments: Any) -> Any:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_idle_appending_writer_keeps_what_another_has_added(tmp_path: Path) -> None:
    write(tmp_path, tokens([3, 1]), max_samples=1)
    idle = ShardWriter(tmp_path, append=True)
    with idle:
        write(tmp_path, tokens([5], 2), append=True)
    # There were two again before, and the third shard stood in no index.
    assert ShardDataset(tmp_path).index.lengths.tolist() == [3, 1, 5]
    with pytest.raises(FileExistsError, match="another writer is at work"), idle:
        idle.write(tokens([9], 9)[0])
    assert ShardDataset(tmp_path).index.lengths.tolist() == [3, 1, 5]


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=9))
def test_whatever_writers_do_in_turn_all_finished_shards_are_listed(
    tmp_path_factory: pytest.TempPathFactory, steps: Any
) -> None:
    folder = write(tmp_path_factory.mktemp("c"), tokens([1]))
    writers = [ShardWriter(folder, append=True).__enter__() for _ in range(3)]
    for number, (which, ends) in enumerate([*steps, (0, True), (1, True), (2, True)], start=1):
        # Refused are those that come too late, and those that were refused before.
        with suppress(FileExistsError, RuntimeError):
            writer = writers[which]
            if ends:
                writer.__exit__(None, None, None)
            else:
                writer.write(tokens([number], number)[0])
    listed = [Path(shard).name for shard in ShardDataset(folder).index.shards]
    assert listed == sorted(path.name for path in folder.glob("*.tar"))


FEW = """
import base64, hashlib, resource, sys
from dataclasses import replace
from pathlib import Path
import numpy as np
from samplers import LengthIndex, ShardDataset, ShardWriter

folder, shards = Path(sys.argv[1]), 100
with ShardWriter(folder, max_samples=20_000) as writer:
    for number in range(20_000):
        # An index stores equal starts of keys and digits in less than a byte a character.
        key = base64.b64encode(hashlib.sha512(str(number).encode()).digest()).decode()
        writer.write({"__key__": key, "x": np.zeros(number % 3, np.uint8)})
first = folder / "shard-000000.tar"
index = LengthIndex.open(f"{first}.ltx")
assert Path(f"{first}.ltx").stat().st_size > 1 << 20
for number in range(1, shards):
    other = folder / f"shard-{number:06}.tar"
    other.hardlink_to(first)
    shard = replace(index._tables.shards[0], path=str(other))
    LengthIndex(replace(index._tables, shards=(shard,))).save(f"{other}.ltx")
(folder / "shard.ltx").unlink()
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
"""


def test_a_writer_goes_on_behind_more_large_indexes_than_descriptors(tmp_path: Path) -> None:
    code = FEW + textwrap.dedent(
        """
        with ShardWriter(folder, append=True) as writer:
            writer.write({"__key__": "last", "x": np.zeros(9, np.uint8)})
        data = ShardDataset(folder)
        assert len(data) == 20_000 * (len(data.index.shards) - 1) + 1, len(data)
        some = ShardDataset(folder / "shard-*.tar")
        assert some.index.fingerprint == data.index.fingerprint
        kept = LengthIndex.build(folder, resume=True)
        assert kept.fingerprint == data.index.fingerprint
        batch = data.__getitems__(range(0, len(data), 20_000))
        print(len(data.index.shards), len(batch), batch[-1]["__key__"])
        """
    )
    # "Too many open files" before, when all was written and the corpus file was not.
    assert run(code, tmp_path).split() == ["101", "101", "last"]


def test_a_batch_of_many_shards_lives_with_few_descriptors(tmp_path: Path) -> None:
    write(tmp_path, [{"__key__": f"k{n}", "x": np.arange(n % 5)} for n in range(200)], max_samples=1)
    code = """
    import os, resource, sys
    from samplers import ShardDataset
    from samplers.progress.window_reader import ShardsInOrder
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    data = ShardDataset(sys.argv[1])
    order = list(range(199, -1, -1))
    batch = data.__getitems__(order)
    assert [sample["__key__"] for sample in batch] == [f"k{number}" for number in order]
    assert [len(sample["x"]) for sample in batch] == [number % 5 for number in order]
    # Others of the program's files leave room for two.
    held = []
    try:
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        os.close(held.pop())
        os.close(held.pop())
    assert len(list(data.__getitems__([0, 60, 120]))) == 3
    print(len(batch))
    """
    assert run(code, tmp_path).strip() == "200"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_writer_of_many_small_shards_lives_with_few_descriptors(layout: str, tmp_path: Path) -> None:
    """Red before: shards that wait for their names keep two files open each, and 32 of them waited."""
    code = """
    import resource, sys
    import numpy as np
    from samplers import ShardDataset, ShardWriter
    from samplers.shards.writing import shard_group
    # Groups are as large as they may be, however fast the disk is.
    shard_group.PATIENCE = float("inf")
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    with ShardWriter(sys.argv[1], layout=sys.argv[2], max_samples=1) as writer:
        for number in range(150):
            writer.write({"__key__": f"k{number}", "x": np.arange(3)})
    print(len(ShardDataset(sys.argv[1])))
    """
    assert run(code, tmp_path, layout).strip() == "150"


FULL = """
import resource, sys
from pathlib import Path
import numpy as np
from samplers import LengthIndex, ShardDataset, ShardWriter

def samples():
    rng = np.random.default_rng(0)
    for number in range(400):
        yield {"__key__": f"k{number}", "x": rng.integers(0, 255, 2000 + number, np.uint8)}

folder, layout, failed, refused = Path(sys.argv[1]), sys.argv[2], [], []
options = {"layout": layout, "max_samples": 150, "block_size": 20}
# No file may be longer: the disk is full in the midst of the second shard.
with_first = sum(2000 + n + 1600 for n in range(150)) if layout == "plain" else 0
try:
    with ShardWriter(folder, **options) as writer:
        for number, sample in enumerate(samples()):
            if number == 170:
                resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
            try:
                writer.write(sample)
            except OSError as error:
                failed.append(type(error).__name__)
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            except RuntimeError as error:
                refused.append(str(error))
except RuntimeError as error:
    print("at the end:", "continue with a new writer" in str(error))
print(len(failed), len(refused) > 100, sorted(path.name for path in folder.glob("*.t*")))
with ShardWriter(folder, append=True, **options) as writer:
    assert len(writer.keys) == 150
    for sample in samples():
        if sample["__key__"] not in writer.keys:
            writer.write(sample)
data = ShardDataset(folder)
data.index.verify(checksums=True)
for read, sample in zip(data, samples(), strict=True):
    assert read["__key__"] == sample["__key__"] and (read["x"] == sample["x"]).all()
"""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_after_a_full_disk_a_writer_takes_no_more_and_another_goes_on(tmp_path: Path, layout: str) -> None:
    # The writer went on before, wrote blocks twice, and left shards that no reader takes.
    out = run(FULL, tmp_path, layout).splitlines()
    assert out[0] == "at the end: True"
    assert out[1] == "1 True ['shard-000000.tar', 'shard-000000.tar.ltx']"


def test_one_long_key_ends_a_shard_sooner_and_loses_nothing(tmp_path: Path) -> None:
    keys = [f"s{n}" if n != 500 else "k" * 1000 for n in range(30_000)]
    write(tmp_path, [{"__key__": key, "t": np.zeros(2, np.uint8)} for key in keys])
    index = LengthIndex.open(tmp_path / "shard.ltx")
    assert list(index.keys) == keys
    assert 1 < len(index.shards) < 6
    index.verify(checksums=True)


def test_a_refused_sample_begins_no_shard_and_sets_no_kinds(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, layout="plain", max_samples=2) as writer:
        with pytest.raises(ValueError, match="does not fit a tar header"):
            writer.write({"__key__": "d" * 300, "other": np.arange(3)})
        for key in ("a", "b", "c" * 300):
            with suppress(ValueError):
                writer.write({"__key__": key, "t": np.arange(3)})
    assert list(ShardDataset(tmp_path).index.keys) == ["a", "b"]
    assert len(list(tmp_path.glob("*.tar*"))) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "sample",
    [
        {"x" * 70: np.arange(3)},
        {"x" * 90: np.arange(3)},
        {"x": np.arange(2), "v": np.zeros((1,) * 64)},
        {"x": np.zeros((2**31 - 1, 2**28, 0))},
        {"x": np.arange(2), "v": np.zeros((0, 2**59))},
        {"x": np.zeros((1,) * 64)},
    ],
    ids=["name of 70", "name of 90", "64 axes", "many steps of nothing", "much of nothing", "64 axes of steps"],
)
def test_what_write_takes_is_read_and_what_it_refuses_leaves_nothing(
    tmp_path: Path, layout: str, sample: dict[str, npt.NDArray[Any]]
) -> None:
    stack = ["v"] if "v" in sample else []
    with suppress(ValueError), ShardWriter(tmp_path, layout=layout, stack=stack) as writer:
        taken = 0
        for key in ("a", "b", "c"):
            with suppress(ValueError):
                writer.write({"__key__": key} | sample)
                taken += 1
    if taken:
        assert taken == 3
        read = ShardDataset(tmp_path)[2]
        assert all(read[name].shape == value.shape for name, value in sample.items())
    else:
        assert not list(tmp_path.iterdir())


@given(st.integers(90, 103), st.sampled_from(["/", "/a/", "a/", "a//", ""]))
def test_keys_that_begin_with_a_slash_are_read_as_written_or_refused(
    tmp_path_factory: pytest.TempPathFactory, length: Any, start: Any
) -> None:
    folder, key = tmp_path_factory.mktemp("c"), start + "k" * length
    with suppress(ValueError):
        write(folder, [{"__key__": key, "x": np.arange(2)}], layout="plain")
        assert list(ShardDataset(folder).index.keys) == [key]
        return
    assert not list(folder.iterdir())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_that_share_a_writer_lose_and_mix_nothing(layout: Any, tmp_path: Path) -> None:
    """Red before: they finished one shard twice, and the writer failed."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ShardWriter(tmp_path, layout=layout, max_samples=9, block_size=4) as writer:

            def add(first: int) -> None:
                for number in range(first, 200, 4):
                    writer.write({"__key__": f"s{number}", "x": np.full(number % 5 + 1, number)})

            with ThreadPoolExecutor(4) as pool:
                list(pool.map(add, range(4)))
    finally:
        sys.setswitchinterval(interval)
    dataset = ShardDataset(tmp_path)
    samples = dataset.__getitems__(list(range(len(dataset))))
    assert sorted(int(sample["__key__"][1:]) for sample in samples) == list(range(200))
    assert all(sample["x"].tolist() == [number] * (number % 5 + 1) for sample in samples for number in [sample["x"][0]])


def test_a_shard_that_does_not_read_back_gets_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("samplers.shards.writing.shard_file.END", b"damage" * 200)
    with pytest.raises(ValueError, match="offset"), ShardWriter(tmp_path) as writer:
        writer.write({"__key__": "a", "x": np.arange(3)})
    assert not list(tmp_path.iterdir())


def test_a_file_is_taken_over_from_a_killed_process_and_from_no_other(tmp_path: Path) -> None:
    path = tmp_path / "corpus.ltx"
    (tmp_path / "corpus.ltx.tmp").write_bytes(b"left behind")
    file = AtomicFile(path)
    with pytest.raises(FileExistsError, match="is being written"):
        remove_leftover(file.temporary)
    with pytest.raises(FileExistsError, match="another writer is at work"):
        AtomicFile(path)
    file.stream.write(b"whole")
    file.commit()
    assert path.read_bytes() == b"whole"
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.ltx"]


def race(folder: Path, number: Any, slow: Any, results: Any) -> None:
    # The time between creating a file and locking it is where two processes can take each other for dead.
    lock = newfile.lock

    def slowly(stream: Any) -> Any:
        slow.wait(0.002 * number)
        return lock(stream)

    newfile.lock = slowly
    done = 0
    for _ in range(30):
        try:
            file = AtomicFile(Path(folder) / "a")
        except FileExistsError:
            continue
        file.stream.write(bytes([number]) * 1000)
        file.commit()
        done += 1
    results.put(done)


def test_processes_that_race_for_a_name_never_lose_their_file(tmp_path: Path) -> None:
    # Ended with FileNotFoundError before, or with the file of one under the name of the other.
    context = get_context("fork")
    slow, results = context.Event(), context.Queue()
    racers = [context.Process(target=race, args=(tmp_path, number, slow, results)) for number in range(4)]
    for racer in racers:
        racer.start()
    counts = [results.get(timeout=60) for _ in racers]
    for racer in racers:
        racer.join()
        assert racer.exitcode == 0
    assert sum(counts) >= 1
    assert len(set((tmp_path / "a").read_bytes())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
