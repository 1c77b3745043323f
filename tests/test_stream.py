"""Bucketing streams: nothing lost, nothing over budget, nobody waits too long, exact resume at every cut."""

import json
import pickle
import random

import pytest
import torchdata.nodes as tn
import webdataset as wds
from hypothesis import given
from hypothesis import strategies as st

from collate import LengthError
from samplers.bucketer import Bucketer
from samplers.budget import Budget
from samplers.stream import LengthBucketNode, bucket_by_length

LENGTHS = st.lists(st.integers(0, 40), max_size=80)
OPTIONS = st.fixed_dictionaries(
    {"buffer_size": st.integers(1, 20)},
    optional={"max_wait": st.integers(1, 60)},
)


def items(lengths):
    return [(length, (place, length)) for place, length in enumerate(lengths)]


@given(LENGTHS, OPTIONS, st.integers(40, 200), st.integers(1, 9) | st.none())
def test_every_sample_comes_once_within_the_budget(lengths, options, tokens, rows):
    bucketer = Bucketer(Budget(max_tokens=tokens, batch_size=rows), **options)
    batches = list(bucketer.batches_of(items(lengths)))
    assert sorted(sample for batch in batches for sample in batch) == [sample for _, sample in items(lengths)]
    for batch in batches:
        assert len(batch) * max(length for _, length in batch) <= tokens
        assert rows is None or len(batch) <= rows
        assert [length for _, length in batch] == sorted(length for _, length in batch)


@given(LENGTHS, OPTIONS)
def test_nobody_waits_longer_than_max_wait_and_the_buffer_stays_bounded(lengths, options):
    bucketer = Bucketer(Budget(max_tokens=100), **options)
    waiting = set()
    for arrival, (length, sample) in enumerate(items(lengths)):
        bucketer.push(length, sample)
        waiting.add(arrival)
        while bucketer.is_due:
            waiting -= {place for place, _ in bucketer.pop()}
        assert all(arrival - place < bucketer.max_wait for place in waiting)
        assert len(bucketer) == len(waiting) < options["buffer_size"]


@given(LENGTHS, OPTIONS, st.sampled_from(["drop", "alone"]))
def test_overlong_samples_are_counted_and_nothing_else_is_lost(lengths, options, overlong):
    bucketer = Bucketer(Budget(max_tokens=20), overlong=overlong, **options)
    batches = list(bucketer.batches_of(items(lengths)))
    long = [sample for length, sample in items(lengths) if length > 20]
    kept = [sample for batch in batches for sample in batch]
    expected = [sample for _, sample in items(lengths) if overlong == "alone" or sample not in long]
    assert sorted(kept) == expected
    assert (bucketer.dropped, bucketer.alone) == ((len(long), 0) if overlong == "drop" else (0, len(long)))
    assert all(len(batch) == 1 for batch in batches if any(sample in long for sample in batch))


def test_an_overlong_sample_is_an_error_by_default():
    with pytest.raises(LengthError, match="the sample at arrival 1 has 30 steps, which alone exceeds the budget"):
        list(bucket_by_length(int, max_tokens=20)([3, 30]))


def run_from(bucketer, source):
    """Go on from a bucketer's state with a source that begins at its oldest sample."""
    return list(bucketer.batches_of(source))


@given(LENGTHS, OPTIONS, st.sampled_from(["drop", "alone"]), st.lists(st.integers(0, 30), min_size=1, max_size=3))
def test_a_state_goes_on_exactly_after_any_number_of_saves(lengths, options, overlong, cuts):
    def new():
        return Bucketer(Budget(max_tokens=35), overlong=overlong, **options)

    whole = run_from(new(), items(lengths))
    done, state = [], new().state_dict()
    for cut in cuts:
        bucketer = new()
        bucketer.load_state_dict(state)
        batches = bucketer.batches_of(items(lengths)[state["oldest"] :])
        done += [batch for _, batch in zip(range(cut), batches, strict=False)]
        state = json.loads(json.dumps(bucketer.state_dict()))
    bucketer = new()
    bucketer.load_state_dict(state)
    assert done + run_from(bucketer, items(lengths)[state["oldest"] :]) == whole
    assert (bucketer.dropped, bucketer.alone).count(0) >= 1
    assert len(json.dumps(state)) < 300


def test_a_state_of_another_version_is_refused():
    bucketer = Bucketer(Budget(batch_size=1), buffer_size=1)
    with pytest.raises(ValueError, match="version 9, this bucketer reads 1"):
        bucketer.load_state_dict(bucketer.state_dict() | {"version": 9})


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({}, ValueError, "a budget must be given"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1, got 0"),
        ({"max_tokens": 1, "buffer_size": 0}, ValueError, "buffer_size must be at least 1, got 0"),
        ({"max_tokens": 1, "buffer_size": True}, TypeError, "buffer_size must be an int"),
        ({"max_tokens": 1, "max_wait": -1}, ValueError, "max_wait must be at least 1, got -1"),
        ({"max_tokens": 1, "overlong": "cut"}, ValueError, "overlong must be 'error', 'drop' or 'alone', got 'cut'"),
    ],
)
def test_bad_options_are_refused_when_the_stage_is_made(options, kind, message):
    with pytest.raises(kind, match=message):
        bucket_by_length(len, **options)


def test_a_length_is_read_by_function_field_or_number():
    samples = [{"x": [1, 2], "n": 2}, {"x": [3], "n": 1}]
    for length in ("x", "n", lambda sample: len(sample["x"])):
        assert list(bucket_by_length(length, batch_size=2)(samples)) == [samples[::-1]]
    assert list(bucket_by_length(1, batch_size=2)([(0, "ab")])) == [[(0, "ab")]]
    with pytest.raises(KeyError, match="length names the field 'y', the sample has .'x', 'n'."):
        list(bucket_by_length("y", batch_size=2)(samples))
    with pytest.raises(ValueError, match="length must be at least 0, got -1"):
        list(bucket_by_length("n", batch_size=2)([{"n": -1}]))


def sample_stream(count=120):
    rng = random.Random(0)
    return [{"__key__": str(place), "x": [place] * rng.randint(1, 30)} for place in range(count)]


@pytest.fixture
def shards(tmp_path):
    """Plain shards that webdataset wrote itself."""
    for number in range(4):
        with wds.TarWriter(str(tmp_path / f"{number}.tar"), mtime=0) as writer:
            for sample in sample_stream()[number::4]:
                writer.write({"__key__": sample["__key__"], "txt": " ".join(map(str, sample["x"]))})
    return [str(tmp_path / f"{number}.tar") for number in range(4)]


def words(sample):
    return len(sample["txt"].split())


# webdataset leaves its files to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("composed", [False, True])
def test_the_stage_works_in_webdataset_pipelines(shards, workers, composed):
    stage = pickle.loads(pickle.dumps(bucket_by_length(words, max_tokens=100, buffer_size=20)))
    if composed:
        data = wds.WebDataset(shards, shardshuffle=False, workersplitter=wds.split_by_worker).compose(stage)
    else:
        data = wds.DataPipeline(wds.SimpleShardList(shards), wds.split_by_worker, wds.tarfile_to_samples(), stage)
    for _ in range(2):
        batches = list(wds.WebLoader(data, batch_size=None, num_workers=workers))
        keys = [sample["__key__"] for batch in batches for sample in batch]
        assert sorted(keys) == sorted(sample["__key__"] for sample in sample_stream())
        assert all(len(batch) * max(map(words, batch)) <= 100 for batch in batches)


def identity(value):
    return value


def node(kind):
    source = tn.IterableWrapper(sample_stream())
    if kind == "mapped source":
        source = tn.ParallelMapper(source, identity, num_workers=2, method="thread")
    bucketed = LengthBucketNode(source, "x", max_tokens=100, buffer_size=16)
    wrap = {
        "mapper": lambda: tn.Mapper(bucketed, identity),
        "prefetcher": lambda: tn.Prefetcher(bucketed, prefetch_factor=3),
        "prefetcher, rare snapshots": lambda: tn.Prefetcher(bucketed, prefetch_factor=3, snapshot_frequency=4),
        "parallel mapper": lambda: tn.ParallelMapper(bucketed, identity, num_workers=2, method="thread"),
        "unbatcher": lambda: tn.Batcher(tn.Unbatcher(bucketed), batch_size=5),
    }
    return wrap.get(kind, lambda: bucketed)()


KINDS = ["plain", "mapped source", "mapper", "prefetcher", "prefetcher, rare snapshots", "parallel mapper", "unbatcher"]


def drain(running):
    found = []
    while True:
        try:
            found.append(next(running))
        except StopIteration:
            return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_node_saved_at_any_batch_goes_on_exactly_also_on_the_second_save(kind):
    whole_node = node(kind)
    whole_node.reset()
    whole = drain(whole_node)
    for cut in range(0, len(whole) + 1, 1 if kind == "plain" else 3):
        first = node(kind)
        first.reset()
        taken = [next(first) for _ in range(cut)]
        state = pickle.loads(pickle.dumps(first.state_dict()))
        second = node(kind)
        second.reset(state)
        taken += [next(second) for _ in range(min(2, len(whole) - cut))]
        third = node(kind)
        third.reset(pickle.loads(pickle.dumps(second.state_dict())))
        assert taken + drain(third) == whole


def test_a_node_gives_epoch_after_epoch_and_keeps_raising_at_the_end():
    loader = tn.Loader(node("plain"))
    first, second = list(loader), list(loader)
    assert first == second
    assert sorted(sample["__key__"] for batch in first for sample in batch) == sorted(map(str, range(120)))
    plain = node("plain")
    plain.reset()
    drain(plain)
    for _ in range(2):
        with pytest.raises(StopIteration):
            next(plain)
    assert plain.state_dict()
