"""Streams of mixtures: the plan of a batch sampler's laws, read from shards in windows, on any replicas and workers."""

import copy
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mixture_oracles import Case, check_passes, measure_errors
from served import serving
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from collate import PadCollator, VarlenCollator
from samplers import LengthIndex, Mixture, ShardDataset, ShardStream, ShardWriter

RNG = np.random.default_rng(5)
SIZES = {"web": (240, 40), "books": (90, 60), "code": (160, 9)}
LENGTHS = {name: RNG.integers(1, longest, size).tolist() for name, (size, longest) in SIZES.items()}
STARTS = dict(zip(LENGTHS, np.cumsum([0, 240, 90]).tolist(), strict=True))
# An example plans and reads several epochs.
EXAMPLES = max(4, settings().max_examples // 30)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LengthIndex]:
    """Indexes of three corpora, in which a sample holds its index in the mixture, once for each step."""
    indexes = {}
    for name, lengths in LENGTHS.items():
        folder = tmp_path_factory.mktemp(name)
        with ShardWriter(folder, max_samples=20, block_size=8) as writer:
            for number, length in enumerate(lengths):
                writer.write({"__key__": f"{name}{number}", "x": np.full(length, STARTS[name] + number, np.int32)})
        indexes[name] = ShardDataset(folder).index
    return indexes


def ids(samples: Any) -> list[int]:
    """The sample indices of a batch, which is all that most tests look at."""
    return [int(sample["x"][0]) for sample in samples]


class StreamCase(Case):
    """A mixture of shards and the options of a stream."""

    def stream(self, corpora: Any, num_replicas: int = 1, rank: int = 0, **weights: float) -> Any:
        mixture = Mixture(corpora, weights={**self.weights, **weights}, **self.mixture_options)
        return ShardStream(mixture, collate_fn=ids, num_replicas=num_replicas, rank=rank, **self.options)

    def ranks(self, corpora: Any, num_replicas: int) -> list[Any]:
        try:
            return [self.stream(corpora, num_replicas, rank) for rank in range(num_replicas)]
        except ValueError as error:
            # Few rows in all, and many replicas.
            assume("last step" not in str(error) and "a batch for each" not in str(error))
            raise


@st.composite
def stream_cases(draw: st.DrawFn) -> StreamCase:
    packs = draw(st.booleans())
    bucketed = [{"max_tokens": 160}, {"batch_size": 5}, {"max_tokens": 200, "widths": 8}]
    packing = [{"capacity": 80}, {"capacity": 80, "rows": 2}]
    mixture_options = {
        "unit": draw(st.sampled_from(["tokens", "samples"])),
        "stop": draw(st.sampled_from(["shortest", "longest", 30])),
        "within": draw(st.sampled_from(["batch", "sample"])),
    }
    options = draw(st.sampled_from(packing if packs else bucketed))
    options = options | {"seed": draw(st.integers(0, 9)), "window": draw(st.sampled_from([30, 60, 1000]))}
    weights = {name: float(draw(st.integers(1, 4))) for name in LENGTHS}
    return StreamCase(LENGTHS, weights, mixture_options, packs, options)


def dealt(ranks: list[Any], steps: int | None = None) -> list[list[int]]:
    """The batches of all ranks, step by step: all, or some."""
    limit = range(ranks[0].remaining if steps is None else steps)
    lists = [[batch for _, batch in zip(limit, rank, strict=False)] for rank in ranks]
    assert {len(each) for each in lists} == {len(limit)}
    return [batch for step in zip(*lists, strict=True) for batch in step]


@settings(max_examples=EXAMPLES)
@given(stream_cases(), st.integers(1, 3))
def test_a_stream_of_a_mixture_has_its_shares_in_every_prefix(
    corpora: Any, case: StreamCase, num_replicas: int
) -> None:
    # Red before: a stream took shards of one corpus only.
    ranks = case.ranks(corpora, num_replicas)
    seen: Counter[int] = Counter()
    whole: list[list[int]] = []
    for epoch in range(3):
        batches = dealt(ranks)
        assert len(batches) == len(ranks[0]) * num_replicas
        assert [sorted(batch) for batch in ranks[0].plan(epoch).batches] == [sorted(batch) for batch in batches]
        check_passes(case, batches, seen)
        whole += batches
    total = sum(case.weights.values())
    errors, largest = measure_errors(case, whole, [weight / total for weight in case.weights.values()])
    within = case.mixture_options["within"]
    assert np.abs(errors).max() <= {"batch": 1, "sample": 2}[within] * num_replicas * largest + 1e-6
    if within == "batch":
        assert all(len({case.source_of(index) for index in batch}) == 1 for batch in whole)


@settings(max_examples=EXAMPLES)
@given(stream_cases(), st.lists(st.integers(1, 3), min_size=2, max_size=3), st.data())
def test_a_stream_resumes_and_changes_its_mixture_anywhere(
    corpora: Any, case: StreamCase, chain: list[int], data: st.DataObject
) -> None:
    case.mixture_options["within"] = "batch"
    ranks, taken = case.ranks(corpora, chain[0]), list[list[int]]()
    for _ in range(data.draw(st.integers(0, 1))):
        taken += dealt(ranks)
    for num_replicas in chain[1:]:
        steps = data.draw(st.integers(0, len(ranks[0])))
        taken += dealt(ranks, steps)
        position = json.loads(json.dumps(ranks[0].position(steps)))
        case = case._replace(weights={name: float(data.draw(st.integers(1, 9))) for name in LENGTHS})
        mixture = Mixture(corpora, weights=case.weights, **case.mixture_options)
        before, ranks = ranks, case.ranks(corpora, num_replicas)
        try:
            # The stream of the mixture before takes the new one; a new process has that alone.
            for rank in before:
                rank.seek(position, mixture=mixture)
            changed = json.loads(json.dumps(before[0].next_position))
            for rank in ranks:
                rank.seek(changed)
        except ValueError as error:
            assume("last step" not in str(error) and "a batch for each" not in str(error))
            raise
        assert ranks[0].mixture_report() == before[0].mixture_report()
        assert ranks[0].next_position == changed
    check_passes(case, taken + dealt(ranks))


def make(corpora: Any, **options: Any) -> Any:
    mixture = Mixture(corpora, weights={"web": 2, "books": 3, "code": 1}, stop=40)
    return ShardStream(mixture, **({"collate_fn": ids, "max_tokens": 200, "window": 60} | options))


@pytest.mark.parametrize("packed", [False, True])
def test_workers_and_saved_states_give_the_same_batches(corpora: Any, packed: bool) -> None:
    def fresh() -> Any:
        base: Any = {"collate_fn": ids, "window": 60} | ({"capacity": 80} if packed else {"max_tokens": 200})
        mixture = Mixture(corpora, weights={"web": 2, "books": 3, "code": 1}, stop=40)
        return ShardStream(mixture, **base)

    expected = [list(stream) for stream in [fresh()] for _ in range(2)]
    for workers in (0, 2):
        stream = fresh()
        loader = DataLoader(stream, batch_size=None, num_workers=workers)
        assert [list(loader) for _ in range(2)] == expected
        first = StatefulDataLoader(fresh(), batch_size=None, num_workers=workers)
        batches = iter(first)
        taken = [next(batches) for _ in range(7)]
        state = pickle.loads(pickle.dumps(first.state_dict()))
        second = StatefulDataLoader(fresh(), batch_size=None, num_workers=workers)
        second.load_state_dict(state)
        assert taken + list(second) == expected[0]
        assert list(second) == expected[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_changed_mixture_reaches_workers_and_saved_states(corpora: Any, workers: int) -> None:
    later = Mixture(corpora, weights={"web": 1, "books": 1, "code": 6}, stop=30)
    plain = make(corpora)
    begun = [batch for _, batch in zip(range(9), plain, strict=False)]
    plain.seek(plain.position(9), mixture=later)
    expected = [list(plain), list(plain)]

    stream = make(corpora)
    loader = StatefulDataLoader(stream, batch_size=None, num_workers=workers)
    assert [batch for _, batch in zip(range(9), loader, strict=False)] == begun
    stream.seek(stream.position(9), mixture=later)
    running = iter(loader)
    head = [next(running) for _ in range(5)]
    assert head == expected[0][:5]
    saved = pickle.loads(pickle.dumps(loader.state_dict()))
    # Red where only the worker that loaded the state knew what had been taken before: the next epoch was another one.
    resumed = StatefulDataLoader(
        ShardStream(later, collate_fn=ids, max_tokens=200, window=60), batch_size=None, num_workers=workers
    )
    resumed.load_state_dict(saved)
    assert [list(resumed), list(resumed)] == [expected[0][5:], expected[1]]
    assert resumed.dataset.next_position["mixture"] == plain.next_position["mixture"]


def test_living_workers_refuse_a_mixture_that_they_do_not_have(corpora: Any) -> None:
    stream = make(corpora)
    loader = DataLoader(stream, batch_size=None, num_workers=1, persistent_workers=True)
    list(loader)
    position = stream.position(3)
    # A position of the same mixture reaches them.
    stream.seek(position)
    assert len(list(loader)) == len(stream) - 3
    stream.seek(position, mixture=Mixture(corpora, weights={"web": 1, "books": 1, "code": 1}, stop=40))
    with pytest.raises(RuntimeError, match="another mixture took over while this worker lived"):
        list(loader)
    assert len(list(DataLoader(stream, batch_size=None, num_workers=1))) == len(stream)


def test_each_source_is_read_window_after_window_by_every_replica(corpora: Any) -> None:
    # Red where the batches of a pass were in random order, as in a batch sampler: all shards were needed at all times;
    # and where replicas took neighbours in turn: each read all shards.
    for num_replicas in (1, 2):
        for rank in range(num_replicas):
            mixture = Mixture(corpora)
            stream = ShardStream(
                mixture, collate_fn=ids, max_tokens=60, window=60, num_replicas=num_replicas, rank=rank
            )
            local = [np.array(batch) for batch in stream if max(batch) < SIZES["web"][0]]
            shards = [np.unique(batch // 20) for batch in local]
            # Of the 12 shards of a pass, in windows of three: from the first batch to the last that needs it.
            firsts, lasts = {}, {}
            for number, each in enumerate(shards):
                for shard in each.tolist():
                    firsts.setdefault(shard, number)
                    lasts[shard] = number
            needed = [sum(firsts[shard] <= number <= lasts[shard] for shard in firsts) for number in range(len(shards))]
            assert len(needed) > 40 // num_replicas
            assert max(needed) <= 6
            assert len(firsts) <= 12 // num_replicas + 3
    short = ShardStream(Mixture(corpora, stop=24), collate_fn=ids, max_tokens=60, window=60)
    # A third of a pass needs a third of the shards.
    batches = [np.array(batch) for batch in short if max(batch) < SIZES["web"][0]]
    assert len(batches) > 8
    assert len(np.unique(np.concatenate(batches) // 20)) <= 6


def test_few_files_are_open_however_many_sources_there_are(
    tmp_path: Path, corpora: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Red where each source kept as many shards open as a corpus may.
    folders = Path("/proc/self/fd")
    if not folders.exists():
        pytest.skip("counts open files in /proc")
    monkeypatch.setattr("samplers.progress.mixtures.mixed_shards.count_handles", lambda: 16)
    # Not those of other tests.
    shards = {str(Path(shard).resolve()) for index in corpora.values() for shard in index.shards}
    stream = make(corpora)
    assert not shards.intersection(open_files(folders))
    most = 0
    for _ in stream:
        most = max(most, sum(path in shards for path in open_files(folders)))
    assert 0 < most <= 16


def open_files(folder: Path) -> list[str]:
    found = []
    for entry in folder.iterdir():
        try:
            found.append(str(entry.readlink()))
        except OSError:
            continue
    return found


def tars(log: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in log.items() if name.endswith(".tar")}


def test_remote_shards_of_several_corpora_are_fetched_a_window_at_a_time(tmp_path: Path, corpora: Any) -> None:
    # Red where all batches were one read group: the first batch waited for the shards of the whole epoch.
    for name, index in corpora.items():
        for path in map(Path, index.shards):
            (tmp_path / f"{name}-{path.name}").write_bytes(path.read_bytes())
        built = LengthIndex.build(str(tmp_path / f"{name}-*.tar"))
        built.save(tmp_path / f"{name}.ltx")
    with serving(tmp_path) as server:
        indexes = {name: LengthIndex.open(server.url(f"{name}.ltx")) for name in corpora}
        # Without anything ahead, the first batch needs one window, of three shards or four.
        server.log()
        next(iter(make(indexes, read_ahead_bytes=0)))
        assert len(tars(server.log())) <= 4
        read = list(make(indexes))
        counts = tars(server.log())
    local = {name: LengthIndex.open(tmp_path / f"{name}.ltx") for name in corpora}
    assert read == list(make(local))
    # Whole, and a second time where an epoch reads two passes, or a window that lies across a border.
    assert counts
    assert sum(counts.values()) <= 2.5 * len(counts)


@pytest.mark.parametrize("within", ["batch", "sample"])
def test_damaged_samples_are_skipped_and_counted_over_all_sources(tmp_path: Path, corpora: Any, within: str) -> None:
    # Red where each source counted alone: a batch lost all samples that it had of one of its sources.
    for path in map(Path, corpora["web"].shards):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    target = sorted(tmp_path.iterdir())[3]
    whole = bytearray(target.read_bytes())
    # Values of the second block, whose checksum is then another.
    values = np.flatnonzero(np.frombuffer(whole, np.int32, len(whole) // 4) == 3 * 20 + 9)
    assert len(values) == LENGTHS["web"][69]
    whole[4 * int(values[0])] ^= 1
    target.write_bytes(whole)
    indexes = {**corpora, "web": corpora["web"].moved_to(str(tmp_path / "*.tar"))}
    options: Any = {"collate_fn": ids, "max_tokens": 400, "window": 60}
    mixtures: Any = [Mixture(each, stop="longest", within=within) for each in (corpora, indexes)]  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="web69.*do not have the checksum"):
        list(ShardStream(mixtures[1], **options))
    stream = ShardStream(mixtures[1], handler=lambda _: True, **options)
    whole_batches = list(ShardStream(mixtures[0], **options))
    expected = [[each for each in batch if each != 69] for batch in whole_batches]
    assert list(DataLoader(stream, batch_size=None, num_workers=2)) == expected
    times = sum(batch.count(69) for batch in whole_batches)
    assert stream.skipped == {str(target): {"damaged": times}}


def test_pieces_of_split_samples_are_read_from_their_sources(corpora: Any) -> None:
    mixture = Mixture(corpora, weights={"web": 2, "books": 3, "code": 1}, within="sample")
    collate = VarlenCollator(capacity=30, arrange="given", rows=2)
    stream = ShardStream(mixture, collate_fn=collate, capacity=30, rows=2, overlong="split", window=60)
    pieces = stream._table.pieces
    assert len(stream.data) == 490 + len(pieces.samples)
    plan = stream.plan(0)
    for batch, rows in zip(stream, plan.rows, strict=True):
        documents = [index for row in rows for index in row]
        expected = [index if index < 490 else int(pieces.samples[index - 490]) for index in documents]
        values = batch["x"]
        assert [int(each[0]) for each in values.sequences()] == expected


def test_a_mixture_of_shards_is_copied_and_sent_to_a_spawned_worker(corpora: Any) -> None:
    stream = make(corpora)
    later = Mixture(corpora, weights={"web": 1, "books": 1, "code": 6}, stop=30)
    stream.seek(stream.position(4), mixture=later)
    expected = list(stream)
    stream.set_epoch(0)
    twin, sent = copy.copy(stream), pickle.loads(pickle.dumps(stream))
    assert list(twin) == list(sent) == expected
    twin.seek(stream.position(0), mixture=make(corpora)._lengths)
    # The copy moves alone.
    assert stream.next_position["mixture"] != twin.next_position["mixture"]
    stream.set_epoch(0)
    assert list(DataLoader(stream, batch_size=None, num_workers=1, multiprocessing_context="spawn")) == expected


def test_what_a_stream_cannot_mix_names_the_way_out(corpora: Any) -> None:
    for wrong, options, message in (
        (
            {"web": [3, 4], "books": [5, 1]},
            {},
            "source 'web' of a stream must be a LengthIndex of shards.*mixture.concat",
        ),
        (corpora, {"index": corpora["web"]}, "index must be None with a mixture"),
        (corpora, {"interleave": 2}, "interleave must be 1 with a mixture.*cache"),
        (corpora, {"collate_fn": PadCollator(widths=8)}, "widths must be the stream's"),
        (corpora, {"fields": ["y"]}, "y"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ShardStream(Mixture(wrong), **({"collate_fn": ids, "max_tokens": 200} | options))
    # Red where only the first source was asked for its longest document.
    collate = VarlenCollator(capacity=80, max_length=50)
    with pytest.raises(ValueError, match="longest document of field 'x' is planned with 58"):
        ShardStream(Mixture(corpora), collate_fn=collate, capacity=80)
    one = ShardStream(corpora["web"].shards, corpora["web"], collate_fn=ids, max_tokens=200)
    with pytest.raises(TypeError, match="mixture must be a Mixture where one is planned"):
        one.seek(one.position(0), mixture=Mixture(corpora))
