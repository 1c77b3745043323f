"""A collator that is made for a packing sampler cuts its batches into the planned rows, or says why it cannot."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from torchdata.nodes import IterableWrapper

from collate import VarlenCollator
from samplers import LengthBucketBatchSampler, PackingBatchSampler, PackingNode, pack_by_length

LENGTHS = np.random.default_rng(0).integers(1, 40, 200)


@given(
    st.sampled_from([40, 64, 120]),
    st.integers(1, 4),
    st.sampled_from([1, 4, 8]),
    st.sampled_from([None, 2, 5]),
    st.sampled_from(["split", "cut"]),
)
def test_batches_are_cut_into_the_planned_rows(
    capacity: int, rows: int, multiple: int, max_documents: int | None, overlong: Any
) -> None:
    # Red before: nothing made a collator of the sampler's options, and one of other options cut other rows in silence.
    lengths = np.append(LENGTHS, [3 * capacity])
    sampler = PackingBatchSampler(
        lengths, capacity=capacity, rows=rows, multiple=multiple, max_documents=max_documents, overlong=overlong
    )
    collate = VarlenCollator.for_sampler(sampler, -1)
    assert collate.fields.padding_value == -1
    steps = lengths.tolist()
    if sampler.pieces is not None:
        steps += (sampler.pieces.stops - sampler.pieces.starts).tolist()
    for batch, planned in zip(sampler.plan(0).batches[:5], sampler.plan(0).rows[:5], strict=True):
        collated = collate([torch.zeros(steps[sample]) for sample in batch])
        assert collated.documents_per_row.tolist() == [len(row) for row in planned]
        assert collated.values.shape[1] == capacity


def test_a_loader_gives_planned_rows_of_a_stage() -> None:
    options: Any = {"capacity": 64, "rows": 2, "max_documents": 5, "multiple": 4, "max_length": 30, "buffer_size": 50}
    stage = pack_by_length(len, **options)
    node: Any = PackingNode(IterableWrapper([]), len, **options)
    for plans in (stage, node):
        collate = VarlenCollator.for_sampler(plans)
        assert (collate.capacity, collate.max_documents, collate.align, collate.max_length) == (64, 5, 4, 30)
    documents = [torch.zeros(length) for length in LENGTHS.tolist()]
    batches = [collate(batch) for batch in stage(documents)]
    assert sum(batch.documents_per_row.sum() for batch in batches) == 200
    assert all(batch.values.shape == (2, 64) for batch in batches[:-1])
    sampler = PackingBatchSampler(LENGTHS, capacity=64)
    loader = DataLoader(documents, batch_sampler=sampler, collate_fn=VarlenCollator.for_sampler(sampler))  # type: ignore[arg-type]
    assert all(batch.values.shape == (1, 64) for batch in loader)


def planned(**options: Any) -> Any:
    return SimpleNamespace(**({"capacity": 64, "max_documents": None, "multiple": 1} | options))


@pytest.mark.parametrize(
    ("sampler", "options", "words"),
    [
        (planned(), {"capacity": 32}, r"capacity=32 differs from the sampler's 64"),
        (planned(), {"max_documents": 3}, r"max_documents=3 differs from the sampler's None"),
        (planned(multiple=8), {"align": 4}, r"align=4 differs from the sampler's 8"),
        (planned(), {"arrange": "best-fit"}, r"arrange='best-fit' differs from the sampler's 'given'"),
        (planned(max_length=20), {"max_length": 30}, r"max_length=30 differs from the sampler's 20"),
        (planned(), {"max_length": 30}, r"max_length=30 differs from the sampler's None"),
        (planned(rows=4), {"rows": 2}, r"rows=2 differs from the sampler's 4"),
        (planned(rows=4, max_cost=9.0), {}, r"max_cost=9.0 must have rows=1, got rows=4: a collator does not know"),
        (planned(capacity=(8, 16)), {}, r"capacity must be given by field, .* has \[8, 16\]"),
        (planned(capacity=(8, 16)), {"capacity": {"a": 8, "b": 8}}, r"differs from the sampler's \(8, 16\)"),
    ],
)
def test_options_that_make_other_rows_are_refused(sampler: Any, options: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VarlenCollator.for_sampler(sampler, **options)


@pytest.mark.parametrize(
    ("sampler", "options", "capacity"),
    [
        (planned(capacity=[8, 16]), {"capacity": {"a": 16, "b": 8}}, {"a": 16, "b": 8}),
        (planned(capacity=(16, 16)), {}, 16),
        (planned(capacity=np.array([8, 16])), {"capacity": {"a": 8, "b": 16}}, {"a": 8, "b": 16}),
        (planned(), {"capacity": 64, "max_length": 64, "rows": 3, "align": 1}, 64),
    ],
)
def test_the_same_options_may_be_given_again(sampler: Any, options: Any, capacity: Any) -> None:
    assert VarlenCollator.for_sampler(sampler, **options).capacity == capacity


def test_a_sampler_that_plans_no_rows_is_refused() -> None:
    with pytest.raises(TypeError, match=r"has no capacity .* with PadCollator.for_sampler"):
        VarlenCollator.for_sampler(LengthBucketBatchSampler([3, 4], batch_size=2))  # type: ignore[arg-type]


def test_capacities_may_be_an_array() -> None:
    # Red before: "capacity must have one number for each of 2 fields, got [9 9]".
    lengths = np.array([[3, 4], [5, 2], [1, 8]])
    for capacity in (np.array([9, 9]), [9, 9], (np.int64(9), 9)):
        capacities: Sequence[int] = capacity  # type: ignore[assignment]
        sampler = PackingBatchSampler(lengths, capacity=capacities)
        assert sampler.shapes == [(1, (9, 9))]
        assert sampler.fingerprint == PackingBatchSampler(lengths, capacity=(9, 9)).fingerprint
    assert len(PackingBatchSampler([3, 4], capacity=np.array(9))) == 1  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"capacity must be an int, got 9.0"):
        PackingBatchSampler(lengths, capacity=np.array([9.0, 9.0]))  # type: ignore[arg-type]
