"""Names and error types of the public corners: aliases for one release, one check of counts, exports of the room."""

import operator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import tokens, write

import samplers
from collate.errors import LengthError
from samplers import LengthIndex, ShardDataset, ShardWriter
from samplers.dynamic.bucketer import Bucketer
from samplers.planning.budget import Budget
from samplers.shards.indexing.verify import find_errors
from samplers.shards.storage.process_pool import run_in_processes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path, tokens([3, 1]))
    return tmp_path


def test_the_room_of_shards_exports_its_public_names() -> None:
    """Red before: the room had no exports."""
    assert {name: getattr(samplers.shards, name) for name in ("LengthIndex", "ShardDataset", "ShardWriter")} == {
        "LengthIndex": LengthIndex,
        "ShardDataset": ShardDataset,
        "ShardWriter": ShardWriter,
    }
    assert callable(samplers.shards.decode_groups)


def test_a_former_name_of_length_fields_works_and_warns(folder: Path) -> None:
    """Red before: `length_fields` was called `fields`."""
    new = LengthIndex.build(folder, length_fields=["tokens"])
    with pytest.warns(DeprecationWarning, match="fields= of build is now called length_fields="):
        old = LengthIndex.build(folder, fields=["tokens"])
    assert old.fingerprint == new.fingerprint


def test_former_names_of_checksums_work_and_warn(folder: Path) -> None:
    """Red before: the options were called `payload` and `check`."""
    index = LengthIndex.open(folder / "shard.ltx")
    assert index.verify(checksums=True) == ()
    offset = int(index._tables.offsets[0, 0])
    shard = folder / "shard-000000.tar"
    content = bytearray(shard.read_bytes())
    content[offset] ^= 1
    shard.write_bytes(content)
    with (
        pytest.warns(DeprecationWarning, match="payload= of verify is now called checksums="),
        pytest.raises(ValueError, match="checksum"),
    ):
        index.verify(payload=True)
    with pytest.warns(DeprecationWarning, match="check= of ShardDataset is now called checksums="):
        unchecked = ShardDataset(folder, check=False)
    assert len(unchecked[0]["tokens"]) == 3
    for options in ({}, {"checksums": True}):
        with pytest.raises(ValueError, match="do not have the checksum"):
            ShardDataset(folder, **options)[0]


@pytest.mark.parametrize("count", [2.0, "2", True, None])
@pytest.mark.parametrize("name", ["max_samples", "max_bytes", "block_size"])
def test_a_count_of_a_writer_that_is_no_int_is_a_type_error(tmp_path: Path, name: str, count: Any) -> None:
    """Red before: a ValueError."""
    with pytest.raises(TypeError, match=f"{name} must be an int, got"):
        ShardWriter(tmp_path, **{name: count})


@pytest.mark.parametrize("name", ["max_samples", "max_bytes", "block_size"])
def test_a_count_of_a_writer_may_be_an_integer_of_numpy(tmp_path: Path, name: str) -> None:
    """Red before: refused."""
    ShardWriter(tmp_path, **{name: np.int64(5)})
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        ShardWriter(tmp_path, **{name: 0})


@pytest.mark.parametrize(("workers", "error"), [(1.0, TypeError), (True, TypeError), (-1, ValueError)])
def test_wrong_numbers_of_workers_are_refused_alike(folder: Path, workers: Any, error: type[Exception]) -> None:
    """Red before: `find_errors` did not check, the others raised a ValueError for all."""
    index = LengthIndex.open(folder / "shard.ltx")
    for call in (
        lambda: list(run_in_processes(operator.neg, [1], workers)),
        lambda: LengthIndex.build(folder, workers=workers),
        lambda: ShardWriter.write_parts(folder / "new", tokens, [[1]], workers=workers),
        lambda: list(find_errors(index._tables, checksums=False, workers=workers)),
    ):
        with pytest.raises(error, match="workers must be"):
            call()


def test_a_negative_length_is_a_length_error_in_the_bucketer() -> None:
    """Red before: a plain ValueError."""
    bucketer: Bucketer[dict[str, str]] = Bucketer(Budget(max_tokens=8), buffer_size=4)
    with pytest.raises(LengthError, match=r"length must be at least 0, got -1 for the sample at arrival 0 \(key 'a'\)"):
        bucketer.push(-1, {"__key__": "a"})
    assert (bucketer.arrivals, len(bucketer)) == (0, 0)
    with pytest.raises(TypeError, match="length must be an int"):
        bucketer.push(1.5, {})


def test_find_errors_names_each_bad_shard_in_order_in_processes(tmp_path: Path) -> None:
    """Worker processes finish in any order."""
    write(tmp_path, tokens([3, 1, 2, 4, 1]), max_samples=1)
    for number in (1, 4):
        (tmp_path / f"shard-{number:06}.tar").unlink()
    index = LengthIndex.open(tmp_path / "shard.ltx")
    for workers in (0, 2):
        errors = list(find_errors(index._tables, checksums=False, workers=workers))
        assert [error is not None for error in errors] == [False, True, False, False, True]
        assert "shard-000004.tar" in str(errors[4])
