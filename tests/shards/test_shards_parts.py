"""ShardWriter.write_parts: from many processes the same bytes as from one, and nothing half done, whatever happens."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import LAYOUTS, assert_same, files, read_with_webdataset, tokens, write
from hypothesis import given
from hypothesis import strategies as st

from samplers.shards.dataset import ShardDataset
from samplers.shards.format.samples import decode_groups
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.storage.process_pool import run_in_processes
from samplers.shards.writing.writer import ShardWriter


def part_of(lengths: Any) -> Any:
    """Samples of a part; a part is its first key and its lengths."""
    first, *rest = lengths
    return tokens(rest, first)


PARTS = [[0, 3, 1, 4], [10], [20, 1, 5], [30, 9, 2, 6, 5, 3]]
SAMPLES = [sample for part in PARTS for sample in part_of(part)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path, layout: str) -> None:
    for workers in (0, 1, 2, 7):
        index = ShardWriter.write_parts(
            tmp_path / f"{workers}", part_of, PARTS, workers=workers, layout=layout, max_samples=2
        )
        index.verify(checksums=True)
        assert files(tmp_path / f"{workers}") == files(tmp_path / "0")
    shards = [(0, 0), (0, 1), (2, 0), (3, 0), (3, 1), (3, 2)]
    names = [f"shard-{part:06}-{number:06}.tar" for part, number in shards]
    assert sorted(files(tmp_path / "0")) == sorted([*names, *(f"{name}.ltx" for name in names), "shard.ltx"])
    dataset = ShardDataset(tmp_path / "0")
    assert [Path(shard).name for shard in dataset.index.shards] == names
    for read, written in zip(dataset, SAMPLES, strict=True):
        assert_same(read, written)
    streamed = read_with_webdataset(tmp_path / "0", decode_groups)
    assert [sample["__key__"] for sample in streamed] == [sample["__key__"] for sample in SAMPLES]


@given(data=st.data())
def test_parts_hold_what_a_single_writer_would_write_in_their_order(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    lengths = data.draw(st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=5).filter(any))
    folder = tmp_path_factory.mktemp("corpus")
    parts = [[100 * place, *part] for place, part in enumerate(lengths)]
    options = {"max_samples": data.draw(st.integers(1, 4)), "block_size": data.draw(st.integers(1, 3))}
    index = ShardWriter.write_parts(folder / "parts", part_of, parts, **options)
    write(folder / "one", [sample for part in parts for sample in part_of(part)], **options)
    one = ShardDataset(folder / "one")
    for read, expected in zip(ShardDataset(folder / "parts"), one, strict=True):
        assert_same(read, expected)
    assert index.lengths.tolist() == one.index.lengths.tolist()
    LengthIndex.build(folder / "parts", checksums=True).save(folder / "parts" / "again.ltx")
    assert (folder / "parts" / "again.ltx").read_bytes() == (folder / "parts" / "shard.ltx").read_bytes()


def test_a_bar_counts_the_parts_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for workers in (0, 2):
        ShardWriter.write_parts(tmp_path / f"{workers}", part_of, PARTS, workers=workers, progress=True)
        assert "4/4" in capsys.readouterr().err
    ShardWriter.write_parts(tmp_path / "silent", part_of, PARTS)
    assert capsys.readouterr().err == ""


SPAWNED = """
import multiprocessing, sys
sys.path[:0] = sys.argv[2:]
from test_shards_parts import PARTS, part_of
from samplers import ShardWriter

if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    print(len(ShardWriter.write_parts(sys.argv[1], part_of, PARTS, workers=2)))
"""


def test_processes_may_be_spawned(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(SPAWNED)
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support")]
    command = [sys.executable, str(program), str(tmp_path / "a"), *paths]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert run.stdout == "10\n"
    ShardWriter.write_parts(tmp_path / "b", part_of, PARTS)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def failing_part(kind: Any, lengths: Any) -> Iterator[Any]:
    """Like part_of, but the part that begins at 20 goes wrong after its first sample."""
    for place, sample in enumerate(part_of(lengths)):
        if lengths[0] == 20 and place == 1:
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "exit":
                os._exit(3)
            if kind == "error":
                raise OverflowError("too much")
            sample = {"dtype": sample | {"tokens": np.ones(2)}, "key": sample | {"__key__": "k20"}, "no": [1]}[kind]
        yield sample


@pytest.mark.parametrize(
    ("kind", "workers", "message"),
    [
        *((kind, workers, message) for workers in (0, 2) for kind, message in (
            ("error", r"part 2, \[20, 1, 5\]: OverflowError: too much; finished shards stay: continue with append"),
            ("dtype", r"part 2, \[20, 1, 5\]: TypeError: sample 'k21', field 'tokens': must be int64 \[L\]"),
            ("key", r"part 2, \[20, 1, 5\]: ValueError: __key__ must be unique, 'k20' was written before"),
            ("no", r"part 2, \[20, 1, 5\]: TypeError: a sample must be .*, got list"),
        )),
        ("killed", 2, r"part 2, \[20, 1, 5\]: its process was killed by SIGKILL; memory may have run out: give fewer"),
        ("exit", 2, r"part 2, \[20, 1, 5\]: its process ended with exit code 3"),
    ],
)  # fmt: skip
def test_an_error_or_a_kill_names_the_part_and_leaves_whole_shards_alone(
    tmp_path: Path, kind: str, workers: int, message: str
) -> None:
    broken = partial(failing_part, kind)
    with pytest.raises(RuntimeError, match=message):
        ShardWriter.write_parts(tmp_path / "a", broken, PARTS, workers=workers, max_samples=1)
    left = files(tmp_path / "a")
    assert "shard.ltx" not in left
    assert not [name for name in left if name.endswith(".tmp")]
    for shard in (tmp_path / "a").glob("*.tar"):
        LengthIndex.build(shard).verify()
    index = ShardWriter.write_parts(tmp_path / "a", part_of, PARTS, workers=2, append=True, max_samples=1)
    ShardWriter.write_parts(tmp_path / "b", part_of, PARTS, max_samples=1)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert len(index) == len(SAMPLES)


def asked(folder: Path, lengths: Any) -> Iterator[Any]:
    """Like part_of; each sample that is asked for is noted."""
    for sample in part_of(lengths):
        with (folder / f"asked-{lengths[0]}").open("a") as file:
            file.write(f"{sample['__key__']} ")
        yield sample


def test_finished_parts_are_not_written_again_and_more_parts_may_follow(tmp_path: Path) -> None:
    def noted() -> Any:
        found = {path.name: path.read_text().split() for path in sorted(tmp_path.glob("asked-*"))}
        for path in tmp_path.glob("asked-*"):
            path.unlink()
        return found

    samples = partial(asked, tmp_path)
    ShardWriter.write_parts(tmp_path / "a", samples, PARTS[:3], max_samples=2)
    noted()
    before = files(tmp_path / "a")
    ShardWriter.write_parts(tmp_path / "a", samples, PARTS[:3], append=True, max_samples=2)
    assert noted() == {"asked-0": ["k0"], "asked-20": ["k20"]}
    assert files(tmp_path / "a") == before
    ShardWriter.write_parts(tmp_path / "a", samples, PARTS, append=True, max_samples=2)
    assert noted() == {"asked-0": ["k0"], "asked-20": ["k20"], "asked-30": ["k30", "k31", "k32", "k33", "k34"]}
    ShardWriter.write_parts(tmp_path / "b", samples, PARTS, max_samples=2)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_other_parts_than_those_that_were_written_are_noticed(tmp_path: Path) -> None:
    ShardWriter.write_parts(tmp_path, part_of, PARTS)
    with pytest.raises(RuntimeError, match=r"part 2, .*'k20' was written before, now 'k30' comes instead: give the"):
        ShardWriter.write_parts(tmp_path, part_of, [*PARTS[:2], PARTS[3]], append=True)
    with pytest.raises(RuntimeError, match=r"part 0, \[0\]: .*'k0' was written before, now None comes instead"):
        ShardWriter.write_parts(tmp_path, part_of, [[0]], append=True)
    # Fewer parts are those that are asked for; the others stay.
    assert len(ShardWriter.write_parts(tmp_path, part_of, PARTS[:1], append=True)) == len(SAMPLES)


def test_parts_that_are_not_finished_are_not_left_out(tmp_path: Path) -> None:
    two = [PARTS[0], [20, 1, 5, 6]]
    with pytest.raises(RuntimeError, match="part 1"):
        ShardWriter.write_parts(tmp_path, late_error, two, max_samples=1)
    assert "shard-000001-000000.tar" in files(tmp_path)
    with pytest.raises(
        ValueError, match=r"shard-000001-000000.tar is of a part that is not finished, got only 1 parts"
    ):
        ShardWriter.write_parts(tmp_path, late_error, two[:1], append=True)
    with pytest.raises(
        ValueError, match=r"shard-000000-000000.tar is of a part, and not all parts are written: continue"
    ):
        ShardWriter(tmp_path, append=True)


def late_error(lengths: Any) -> Iterator[Any]:
    yield from part_of(lengths)
    if lengths[0] == 20:
        raise OSError("gone")


def test_a_single_writer_goes_on_behind_parts(tmp_path: Path) -> None:
    ShardWriter.write_parts(tmp_path, part_of, PARTS)
    write(tmp_path, tokens([8, 9], 50), append=True, max_samples=1)
    assert sorted(path.name for path in tmp_path.glob("*.tar"))[-2:] == ["shard-000004.tar", "shard-000005.tar"]
    expected = [len(sample["tokens"]) for sample in SAMPLES] + [8, 9]
    assert ShardDataset(tmp_path).index.lengths.tolist() == expected
    index = ShardWriter.write_parts(tmp_path, part_of, PARTS, append=True)
    assert index.lengths.tolist() == expected
    assert LengthIndex.build(tmp_path).lengths.tolist() == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_a_key_in_two_parts_is_refused_with_both_shards(tmp_path: Path, workers: int) -> None:
    with pytest.raises(
        ValueError, match=r"unique over all parts, 'k1' is in .*-00000[01]-000000.tar and .*-000000.tar:"
    ):
        ShardWriter.write_parts(tmp_path, part_of, [[0, 3, 4], [1, 5]], workers=workers)
    assert "shard.ltx" not in files(tmp_path)


def of_a_kind(kind: Any) -> Iterator[Any]:
    yield {"__key__": f"{kind}", "x": np.ones((2, kind[0]), kind[1]), "v": np.ones(kind[2])}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", [(2, "f4", 3), (1, "f8", 3), (1, "f4", 4)])
def test_parts_of_different_kinds_are_refused_with_both_shards(
    tmp_path: Path, layout: str, other: tuple[int, str, int]
) -> None:
    with pytest.raises(ValueError, match=r"shard-00000[01]-000000.tar") as caught:
        ShardWriter.write_parts(tmp_path, of_a_kind, [(1, "f4", 3), other], layout=layout, stack=["v"])
    assert all(f"shard-00000{part}-000000.tar" in str(caught.value) for part in (0, 1))
    assert "shard.ltx" not in files(tmp_path)


def test_bad_requests_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_samples must be at least 1, got 0"):
        ShardWriter.write_parts(tmp_path / "a", part_of, PARTS, max_samples=0)
    with pytest.raises(ValueError, match="nothing was written to .*a: a corpus needs a sample"):
        ShardWriter.write_parts(tmp_path / "a", part_of, [[0], [1]])
    with pytest.raises(ValueError, match="nothing was written"):
        ShardWriter.write_parts(tmp_path / "a", part_of, [])
    with pytest.raises(TypeError, match="<generator object .* cannot be sent to another process .*: give names or num"):
        ShardWriter.write_parts(tmp_path / "a", list, [(sample for sample in SAMPLES)], workers=1)
    assert files(tmp_path / "a") == {}
    ShardWriter.write_parts(tmp_path / "a", part_of, PARTS)
    with pytest.raises(FileExistsError, match="already holds shard-000000-000000.tar: write to another folder"):
        ShardWriter.write_parts(tmp_path / "a", part_of, PARTS)


SLOW = """
import os, sys, time
from pathlib import Path
import numpy as np
from samplers.shards.writing import shard_group
from samplers.shards.writing.writer import ShardWriter

folder = Path(sys.argv[1])
# Each shard gets its name at once, so that it does not depend on the time which do.
shard_group.PATIENCE = 0

def samples(part):
    (folder / f"process-{part}").write_text(str(os.getpid()))
    for place in range(20):
        if place == 13 and len(sys.argv) > 2:
            (folder / f"waits-{part}").touch()
            time.sleep(600)
        yield {"__key__": f"{part}-{place}", "x": np.arange(part + place)}

append = (folder / "corpus").exists()
ShardWriter.write_parts(folder / "corpus", samples, range(3), workers=2, max_samples=5, append=append)
"""


def wait_until(condition: Any) -> None:
    """Poll for two minutes."""
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_killed_run_takes_its_processes_along_and_is_gone_on_with(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path), "slow"]) as process:
        wait_until(lambda: len(list(tmp_path.glob("waits-*"))) == 2)
        process.kill()
    workers = [int(path.read_text()) for path in tmp_path.glob("process-*")]
    assert len(workers) == 2
    wait_until(lambda: not any(is_alive(worker) for worker in workers))
    left = files(tmp_path / "corpus")
    assert {name for name in left if name.endswith(".tmp")} == {f"shard-00000{part}-000002.tar.tmp" for part in (0, 1)}
    subprocess.run([sys.executable, "-c", SLOW, str(tmp_path)], check=True)
    resumed = files(tmp_path / "corpus")
    (tmp_path / "whole").mkdir()
    subprocess.run([sys.executable, "-c", SLOW, str(tmp_path / "whole")], check=True)
    assert resumed == files(tmp_path / "whole" / "corpus")


def is_alive(process: Any) -> Any:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    status = Path(f"/proc/{process}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class OddError(Exception):
    """Cannot be made again from its arguments."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__(f"{first} and {second}")


def raise_odd(item: Any) -> None:
    raise OddError(item, 2)


def test_an_error_that_cannot_travel_is_told_by_its_name(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="OddError: 1 and 2") as caught:
        list(run_in_processes(raise_odd, [1], 1, unit="item", progress=False))
    assert "in raise_odd" in caught.value.__notes__[0]


def test_all_results_come_whatever_the_number_of_workers() -> None:
    for workers in (0, 1, 3, 50):
        results = dict(run_in_processes(abs, [-3, 4, -5, 0], workers, unit="item", progress=False))
        assert results == {0: 3, 1: 4, 2: 5, 3: 0}
        assert list(run_in_processes(abs, [], workers, unit="item", progress=False)) == []


def note_and_wait(path: Path) -> None:
    path.write_text(str(os.getpid()))
    time.sleep(600 * (path.name != "quick"))


def test_who_stops_early_waits_for_nobody(tmp_path: Path) -> None:
    results = run_in_processes(note_and_wait, [tmp_path / "slow", tmp_path / "quick"], 2, unit="item", progress=False)
    next(results)
    wait_until(lambda: (tmp_path / "slow").exists() and (tmp_path / "slow").read_text())
    results.close()
    wait_until(lambda: not is_alive(int((tmp_path / "slow").read_text())))
