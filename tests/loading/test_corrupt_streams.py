"""Corrupt samples in streams without an index: the stage and the node skip them where a handler says so.

All tests were red before: `handler=` was unknown, and one damaged sample ended a run.
"""

import gc
import pickle
from typing import Any

import numpy as np
import pytest
import torchdata.nodes as tn
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from samplers import LengthBucketNode, bucket_by_length
from samplers.shards.skipping import IN_A_ROW
from samplers.testing import check_node

SKIP = wds.ignore_and_continue


def sample(number: int, *, bad: bool = False) -> dict[str, Any]:
    body = {} if bad else {"x": [number] * (1 + number * 7 % 23)}
    return {"__key__": str(number), "__url__": f"{number // 50}.tar"} | body


def keys(batches: Any) -> list[int]:
    return sorted(int(each["__key__"]) for batch in batches for each in batch)


def stage(**options: Any) -> Any:
    return bucket_by_length("x", max_tokens=100, **({"buffer_size": 20, "handler": SKIP} | options))


def node(source: list[Any], **options: Any) -> LengthBucketNode[Any]:
    options = {"max_tokens": 100, "buffer_size": 20, "handler": SKIP} | options
    return LengthBucketNode(tn.IterableWrapper(source), "x", **options)


def counted(bad: set[int]) -> dict[str, dict[str, int]]:
    shards = sorted({f"{number // 50}.tar" for number in bad})
    return {shard: {"field": sum(f"{number // 50}.tar" == shard for number in bad)} for shard in shards}


@given(st.sets(st.integers(0, 149), max_size=100) | st.just(set(range(20, 120))), st.integers(1, 40))
def test_the_stage_and_the_node_give_all_but_what_is_skipped_and_count_it(bad: set[int], buffer: int) -> None:
    source = [sample(number, bad=number in bad) for number in range(150)]
    options = {"buffer_size": buffer, "max_failed": 1}
    for made, run in _both(source, **options):
        if max(map(len, _runs(bad)), default=0) >= IN_A_ROW:
            with pytest.raises(RuntimeError, match=f"{IN_A_ROW} samples in a row"):
                run()
            continue
        batches = run()
        assert keys(batches) == sorted(set(range(150)) - bad)
        assert all(len(batch) * max(len(each["x"]) for each in batch) <= 100 for batch in batches)
        assert made.skipped == counted(bad)


def _both(source: list[Any], **options: Any) -> list[tuple[Any, Any]]:
    """A stage and a node, and the functions that run them to their end."""
    one, other = stage(**options), node(source, **options)
    return [(one, lambda: list(one(source))), (other, lambda: _drain(other))]


def _runs(numbers: set[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def _drain(made: Any) -> list[Any]:
    made.reset()
    return list(made)


def test_without_a_handler_the_error_comes_and_nothing_is_counted() -> None:
    source = [sample(0), sample(1, bad=True)]
    with pytest.raises(KeyError, match="length names the field 'x', the sample has"):
        list(stage(handler=None)(source))
    plain = node(source, handler=None)
    plain.reset()
    with pytest.raises(KeyError, match="length names the field 'x'"):
        next(plain)
    assert stage(handler=None).skipped == plain.skipped == {}


def measure(each: Any) -> int:
    """Length of a number, which may be an error to raise."""
    if isinstance(each, Exception):
        raise each
    return int(each)


@pytest.mark.parametrize(
    ("odd", "reason"), [(ValueError("x"), "damaged"), (EOFError("x"), "unreadable"), (-1, "length"), (999, "length")]
)
def test_what_a_length_function_meets_in_the_data_may_be_skipped(odd: Any, reason: str) -> None:
    made = bucket_by_length(measure, max_tokens=100, handler=SKIP)
    assert sorted(each for batch in made([3, odd, 4]) for each in batch) == [3, 4]
    assert made.skipped == {"": {reason: 1}}


@pytest.mark.parametrize(
    "error", [TypeError("x"), KeyError("x"), AttributeError("x"), RuntimeError("x"), MemoryError()]
)
def test_an_error_of_a_length_function_is_never_skipped(error: Exception) -> None:
    for handler in (SKIP, None):
        with pytest.raises(type(error)):
            list(bucket_by_length(measure, max_tokens=100, handler=handler)([3, error, 4]))


def test_an_error_of_the_source_is_never_skipped() -> None:
    def source() -> Any:
        yield sample(0)
        raise ValueError("a bad shard")

    with pytest.raises(ValueError, match="a bad shard"):
        list(stage()(source()))
    failing = LengthBucketNode(tn.IterableWrapper(source()), "x", max_tokens=100, handler=SKIP)
    failing.reset()
    with pytest.raises(ValueError, match="a bad shard"):
        next(failing)


def test_a_handler_may_warn_raise_or_stop() -> None:
    source = [sample(0), sample(1, bad=True), sample(2)]
    with pytest.warns(UserWarning, match="length names the field"):
        assert keys(stage(handler=wds.warn_and_continue)(source)) == [0, 2]
    for handler in (wds.reraise_exception, wds.ignore_and_stop):
        with pytest.raises(KeyError, match="length names the field"):
            list(stage(handler=handler)(source))


@pytest.mark.parametrize("bad", [4, 5, 6])
def test_the_share_of_a_stream_counts_when_it_has_ended(bad: int) -> None:
    source = [sample(number, bad=number % 10 == 0 and number < 10 * bad) for number in range(100)]
    for _, run in _both(source, max_failed=0.05):
        if bad > 5:
            with pytest.raises(RuntimeError, match="6 of 100 samples could not be read, more than max_failed=0.05 of"):
                run()
        else:
            assert len(keys(run())) == 100 - bad


def test_the_nodes_contract_holds_among_corrupt_samples() -> None:
    source = [sample(number, bad=number % 9 == 4) for number in range(120)]
    assert check_node(lambda: node(source, max_failed=1), every=3) > 8


@given(st.sets(st.integers(0, 79), max_size=20), st.integers(0, 30), st.integers(1, 30))
def test_a_node_resumes_exactly_and_counts_no_sample_twice(bad: set[int], cut: int, buffer: int) -> None:
    source = [sample(number, bad=number in bad) for number in range(80)]
    running = node(source, buffer_size=buffer, max_failed=1)
    running.reset()
    taken = [batch for _, batch in zip(range(cut), running, strict=False)]
    state, before = running.state_dict(), running.skipped
    restored = node(source, buffer_size=buffer, max_failed=1)
    restored.reset(pickle.loads(pickle.dumps(state)))
    rest = list(restored)
    assert rest == list(running)
    assert keys([*taken, *rest]) == sorted(set(range(80)) - bad)
    total = sum(each["field"] for counts in (before, restored.skipped) for each in counts.values())
    assert total == len(bad)


class Bucketed(IterableDataset[Any]):
    """Every worker's share of 100 samples, bucketed."""

    def __init__(self, made: Any) -> None:
        self.made = made

    def __iter__(self) -> Any:
        info = get_worker_info()
        return self.made(sample(number, bad=number % 20 == 3) for number in range(info.id, 100, info.num_workers))


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_the_main_process_reads_what_workers_have_skipped(context: str) -> None:
    made = stage(max_failed=0.1)
    loader = DataLoader(Bucketed(made), batch_size=None, num_workers=2, multiprocessing_context=context)
    for epoch in (1, 2):
        assert len(keys(loader)) == 95
        assert made.skipped == {"0.tar": {"field": 3 * epoch}, "1.tar": {"field": 2 * epoch}}
    assert pickle.loads(pickle.dumps(made)).skipped == {}


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_a_pipeline_over_a_truncated_shard_loses_what_is_behind_the_cut(tmp_path: Any) -> None:
    for shard in range(2):
        with wds.TarWriter(str(tmp_path / f"{shard}.tar")) as tar:
            for number in range(shard * 30, shard * 30 + 30):
                tar.write({"__key__": str(number), "a.txt": str(number), "x.npy": np.arange(1 + number % 9)})
    cut = tmp_path / "0.tar"
    # In the second member of the eleventh sample, whose first one is whole; each has an extended header.
    cut.write_bytes(cut.read_bytes()[: 10 * 4096 + 2048 + 1536 + 10])
    made = bucket_by_length("x.npy", max_tokens=100, handler=SKIP)
    data = wds.DataPipeline(
        wds.SimpleShardList([str(cut), str(tmp_path / "1.tar")]),
        wds.tarfile_to_samples(handler=SKIP),
        wds.decode(handler=SKIP),
        made,
    )
    assert keys(data) == [*range(10), *range(30, 60)]
    assert made.skipped == {str(cut): {"field": 1}}
    del data
    gc.collect()
