"""A `ShardStream` with a capacity: packs of shards, read window by window, on any replicas and from any position."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from corpora import tokens, write
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from collate import PadCollator, VarlenCollator
from samplers import PackingBatchSampler, ShardStream

LENGTHS = np.random.default_rng(0).integers(0, 60, 300).tolist()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("shards")
    write(folder, tokens(LENGTHS), max_samples=40, block_size=16)
    return folder


def keep(samples: list[Any]) -> list[tuple[int, list[int]]]:
    """The number and the tokens of each sample."""
    return [(int(sample["label"]), sample["tokens"].tolist()) for sample in samples]


def stream(corpus: Path, **options: Any) -> ShardStream:
    return ShardStream(corpus, **({"collate_fn": keep, "capacity": 128, "window": 80} | options))


SHARING = st.fixed_dictionaries(
    {
        "num_replicas": st.integers(1, 7),
        "capacity": st.sampled_from([60, 100, 257]),
        "rows": st.integers(1, 3),
        "window": st.integers(1, 400),
        "seed": st.integers(0, 9),
        "interleave": st.integers(1, 2),
        "cost": st.sampled_from([None, np.square]),
        "drop_last": st.booleans(),
        "shuffle": st.booleans(),
    }
)


@settings(max_examples=15)
@given(SHARING, st.integers(0, 9))
def test_replicas_share_an_epoch_of_full_rows(corpus: Path, options: Any, epoch: int) -> None:
    try:
        streams = [stream(corpus, rank=rank, **options) for rank in range(options["num_replicas"])]
    except ValueError as error:
        assume("must have a document for each" not in str(error))
        raise
    plan = streams[0].plan(epoch)
    for data in streams:
        data.set_epoch(epoch)
    batches = [list(data) for data in streams]
    assert {len(each) for each in batches} == {len(streams[0])} == {plan.steps}
    taken = [label for each in batches for batch in each for label, _ in batch]
    assert len(set(taken)) == len(taken)
    assert len(taken) == len(LENGTHS) - plan.report().last_dropped
    assert plan.report().last_dropped == 0 or options["drop_last"]
    # The plan has the same batches, and their rows.
    interleaved = [[label for label, _ in batch] for step in zip(*batches, strict=True) for batch in step]
    assert interleaved == list(plan.batches)
    collate = VarlenCollator(arrange="given", capacity=options["capacity"])
    for batch, rows in zip(interleaved[:12], plan.rows[:12], strict=True):
        assert [sample for row in rows for sample in row] == batch
        collated = collate([np.zeros(LENGTHS[sample], np.int64) for sample in batch])
        assert collated.documents_per_row.tolist() == [len(row) for row in rows]
        assert len(rows) <= options["rows"]


@settings(max_examples=15)
@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 12)), min_size=1, max_size=4), st.integers(0, 3))
def test_a_position_goes_on_with_other_replicas(corpus: Path, chain: Any, seed: int) -> None:
    position, taken = None, []
    for replicas, steps in chain:
        streams = [stream(corpus, num_replicas=replicas, rank=rank, seed=seed) for rank in range(replicas)]
        for data in streams:
            try:
                data.seek(position or data.position(0))
            except ValueError as error:
                # One row may be left, with fewer documents than replicas.
                assume("must have a document for each" not in str(error))
                raise
        count = min(steps, streams[0].remaining)
        taken += [batch for data in streams for _, batch in zip(range(count), data, strict=False)]
        position = json.loads(json.dumps(streams[0].position(count)))
    last = stream(corpus, seed=seed)
    last.seek(position or last.position(0))
    assert sorted(label for batch in [*taken, *last] for label, _ in batch) == list(range(300))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_resumes_packs_with_pieces(corpus: Path, workers: int) -> None:
    def loader() -> Any:
        data = stream(corpus, capacity=32, overlong="split")
        return StatefulDataLoader(data, batch_size=None, num_workers=workers)

    whole = list(loader())
    assert all(sum(len(values) for _, values in batch) <= 32 for batch in whole)
    first = loader()
    running = iter(first)
    taken = [next(running) for _ in range(len(whole) // 2)]
    second = loader()
    second.load_state_dict(first.state_dict())
    assert taken + list(second) == whole
    # Pieces joined are the samples.
    parts: dict[int, list[list[int]]] = {}
    for label, values in (sample for batch in whole for sample in batch):
        parts.setdefault(label, []).append(values)
    joined = [[value for part in sorted(parts[label]) for value in part] for label in range(300)]
    assert joined == [sample["tokens"].tolist() for sample in tokens(LENGTHS)]  # type: ignore[attr-defined]


def test_a_worker_that_is_spawned_reads_the_same_packs(corpus: Path) -> None:
    data = stream(corpus, capacity=32, overlong="split", rows=2)
    again = pickle.loads(pickle.dumps(data))
    assert list(again) == list(data)
    assert again.fingerprint == data.fingerprint
    spawned = DataLoader(stream(corpus), batch_size=None, num_workers=1, multiprocessing_context="spawn")
    labels = [[label for label, _ in batch] for batch in spawned]
    assert labels == [[label for label, _ in batch] for batch in stream(corpus)]


def test_each_epoch_has_other_rows_and_as_many(corpus: Path) -> None:
    data = stream(corpus)
    epochs = [list(DataLoader(data, batch_size=None)) for _ in range(3)]
    assert {len(epoch) for epoch in epochs} == {len(data)}
    rows = [{frozenset(label for label, _ in batch) for batch in epoch} for epoch in epochs]
    assert len(rows[0] & rows[1]) < len(rows[0]) // 20


GIVEN = VarlenCollator(arrange="given", capacity=128)


@pytest.mark.parametrize(
    "options",
    [
        {"collate_fn": VarlenCollator()},
        {"collate_fn": VarlenCollator(capacity=128)},
        {"collate_fn": GIVEN, "rows": 3},
        {"collate_fn": GIVEN, "cost": np.square, "max_cost": 9e9},
        {"collate_fn": VarlenCollator(capacity=128, arrange="given", max_length=100), "rows": 2},
        {"collate_fn": VarlenCollator(capacity=40, max_length=40), "capacity": 40, "overlong": "cut"},
        {"collate_fn": VarlenCollator(capacity=40, max_length=40), "capacity": 40, "overlong": "split"},
        {"collate_fn": VarlenCollator(capacity=128, max_documents=9, align=8), "max_documents": 9, "multiple": 8},
    ],
)
def test_a_collator_that_agrees_makes_the_planned_rows(corpus: Path, options: Any) -> None:
    data = stream(corpus, **options)
    planned = [[len(row) for row in batch] for batch in data.plan(0).rows]
    assert [batch["tokens"].documents_per_row.tolist() for batch in data] == planned


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"collate_fn": VarlenCollator(capacity=64)},
            "capacity must be the stream's, got 64 and 128 for field 'tokens'",
        ),
        # Red before, all of these to the two that fit: only capacities were compared.
        ({"collate_fn": VarlenCollator(), "rows": 2}, "capacity must be the stream's, got None and 128"),
        ({"collate_fn": VarlenCollator(capacity=128, max_documents=4)}, "max_documents must be the stream's, got 4"),
        ({"collate_fn": VarlenCollator(capacity=128), "max_documents": 4}, "max_documents must be .*, got None and 4"),
        ({"collate_fn": VarlenCollator(capacity=128, align=2)}, "align must be the stream's, got 2 and 1"),
        ({"collate_fn": VarlenCollator(capacity=128), "rows": 2}, "arrange must be the stream's, got 'best-fit'"),
        (
            {"collate_fn": GIVEN, "rows": 2, "cost": np.square, "max_cost": 9e9},
            "max_cost must have rows=1 .*, got rows=2",
        ),
        ({"collate_fn": VarlenCollator(capacity=128, max_length=9)}, "max_length must be the stream's, got 9 and None"),
        ({"collate_fn": VarlenCollator(capacity=40), "capacity": 40, "overlong": "cut"}, "max_length must be"),
        ({"collate_fn": PadCollator()}, "must put several samples into a row .*: give a VarlenCollator"),
        ({"capacity": 50, "overlong": "error"}, "must fit in a row of capacity 50"),
        ({"capacity": 1, "overlong": "drop", "min_length": 2}, "drops them all"),
    ],
)
def test_what_does_not_fit_the_packs_is_refused(corpus: Path, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stream(corpus, **options)


def test_options_of_budgets_and_pad_collators_are_refused(corpus: Path) -> None:
    with pytest.raises(TypeError, match="options must be among capacity, .*, got max_tokens"):
        stream(corpus, max_tokens=5)
    with pytest.raises(TypeError, match="has no widths"):
        PadCollator.for_sampler(stream(corpus))
    with pytest.raises(TypeError, match=r"rows of 20 steps with VarlenCollator.for_sampler"):
        PadCollator.for_sampler(PackingBatchSampler([7, 3], capacity=20))


def test_samples_that_are_dropped_are_counted(corpus: Path) -> None:
    report = stream(corpus, capacity=32, overlong="drop", min_length=3).plan(0).report()
    assert report.overlong_dropped == sum(length > 32 for length in LENGTHS)
    assert report.too_short == sum(length < 3 for length in LENGTHS)
    assert report.documents == sum(3 <= length <= 32 for length in LENGTHS)


def test_a_later_epoch_shares_its_last_step_as_the_first_did(tmp_path: Path) -> None:
    # Red before: five rows, of which one has two documents. Three replicas could share the last step of epochs 0 and 1,
    # and not that of epoch 2, as no draw changed the batches of a step.
    write(tmp_path, tokens([163, 148]))
    data = stream(tmp_path, capacity=64, overlong="split", num_replicas=3, rank=0, seed=2**64 - 1)
    assert {data.plan(epoch).steps for epoch in range(20)} == {len(data)}
