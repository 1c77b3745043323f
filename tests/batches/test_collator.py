"""PadCollator: what becomes of each field, in one row order, through real loaders."""

import json
import pickle
import threading
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import sequences
from torch.utils.data import DataLoader, Dataset

from collate import DevicePrefetcher, LengthError, LengthTrackedBatch, PadCollator, token_scale

Pair = namedtuple("Pair", "left right")


@given(sequences(), st.integers(0, 2**31), st.booleans())
def test_every_field_comes_in_the_row_order_of_one(rows: list[torch.Tensor], seed: int, by_other: bool) -> None:
    rng = np.random.default_rng(seed)
    others = [torch.arange(int(rng.integers(0, 9))) for _ in rows]
    samples = [
        {"x": x, "inner": {"y": y, "id": index}, "name": f"n{index}"}
        for index, (x, y) in enumerate(zip(rows, others, strict=True))
    ]
    batch = PadCollator(sort_by="inner.y" if by_other else None)(samples)
    order = batch["inner"]["id"].tolist()
    counts = [len(value) for value in (others if by_other else rows)]
    assert order == sorted(range(len(rows)), key=lambda index: -counts[index])
    assert batch["name"] == [f"n{index}" for index in order]
    for field, values in ((batch["x"], rows), (batch["inner"]["y"], others)):
        assert field.permutation.tolist() == order
        assert all(torch.equal(a, b) for a, b in zip(field.unsort().sequences(), values, strict=True))


@pytest.mark.parametrize(
    ("value", "kind", "dtype"),
    [
        (torch.ones(2), LengthTrackedBatch, torch.float32),
        (np.ones(1, np.int32), LengthTrackedBatch, torch.int32),
        (np.ones((2, 3)), LengthTrackedBatch, torch.float64),
        (np.ones(2, ">i4"), LengthTrackedBatch, torch.int32),
        ([1, 2], LengthTrackedBatch, torch.int64),
        ([1.0], LengthTrackedBatch, torch.float32),
        ([True], LengthTrackedBatch, torch.bool),
        ([], LengthTrackedBatch, torch.int64),
        ([[1, 2], [3, 4]], LengthTrackedBatch, torch.int64),
        (3, torch.Tensor, torch.int64),
        (2.5, torch.Tensor, torch.float32),
        (True, torch.Tensor, torch.bool),
        (np.float64(1), torch.Tensor, torch.float64),
        (np.int16(1), torch.Tensor, torch.int16),
        (torch.tensor(1.0), torch.Tensor, torch.float32),
        (np.array(1), torch.Tensor, torch.int64),
        ("text", list, None),
        (b"bytes", list, None),
        (None, list, None),
        (["a", "b"], list, None),
        ({1, 2}, list, None),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_what_a_field_becomes_depends_on_its_type_alone(
    value: Any, kind: type[Any], dtype: torch.dtype | None, count: int
) -> None:
    field = PadCollator()([{"f": value}] * count)["f"]
    assert isinstance(field, kind)
    assert len(field) == count
    if isinstance(field, LengthTrackedBatch):
        assert field.padded.dtype == dtype
        assert field.lengths.tolist() == [len(value)] * count
    elif dtype is not None:
        assert field.dtype == dtype
        assert field.shape == (count,)
    else:
        assert field == [value] * count


def test_samples_keep_their_structure() -> None:
    rows = [torch.arange(2), torch.arange(3)]
    bare = PadCollator()(rows)
    assert bare.lengths.tolist() == [3, 2]
    plain = PadCollator()([(row, 1) for row in rows])
    assert type(plain) is tuple
    named = PadCollator(padding_value={"left": -1})([Pair(row, "r") for row in rows])
    assert isinstance(named, Pair)
    assert named.left.padded.tolist() == [[0, 1, 2], [0, 1, -1]]
    assert named.right == ["r", "r"]


def test_options_are_taken_per_field() -> None:
    collate = PadCollator(
        padding_value={"a": 7, "1.b": -100},
        widths={"a": 4, "1.b": [5, 9]},
        max_length={"a": 2, "1.b": 6},
        sort_by=False,
    )
    with pytest.raises(ValueError, match=r"padding_value is given for .'1.b', 'a'., the variable-length fields are"):
        collate([{"a": [1]}])
    batch = collate([{"a": [1, 2, 3], 1: {"b": [4]}}, {"a": [], 1: {"b": [5] * 8}}])
    assert batch["a"].padded.tolist() == [[1, 2, 7, 7], [7, 7, 7, 7]]
    assert batch["a"].lengths.tolist() == [2, 0]
    assert batch[1]["b"].padded.shape == (2, 9)
    assert batch[1]["b"].lengths.tolist() == [1, 6]


def test_fields_named_in_stack_keep_one_shape() -> None:
    samples = [{"x": [1] * n, "image": np.ones((2, 3), np.float32), "pair": [1, 2], "t": torch.ones(4)} for n in (1, 2)]
    batch = PadCollator(stack=["image", "pair", "t"])(samples)
    assert batch["image"].shape == (2, 2, 3)
    assert batch["pair"].tolist() == [[1, 2], [1, 2]]
    assert batch["t"].shape == (2, 4)


def test_a_batch_is_filled_to_the_smallest_shape_that_holds_it() -> None:
    collate = PadCollator(9, shapes=[(8, 2), (4, 8), (2, 4)])
    batch = collate([{"x": [1], "y": 5, "s": "a"}, {"x": [1, 2, 3], "y": 6, "s": "b"}])
    assert batch["x"].padded.tolist() == [[1, 2, 3, 9], [1, 9, 9, 9]]
    batch = collate([{"x": [1] * n, "y": n, "s": "a"} for n in (2, 3, 1)])
    assert batch["x"].padded.shape == (4, 8)
    assert batch["x"].lengths.tolist() == [3, 2, 1, 0]
    assert batch["x"].permutation.tolist() == [1, 0, 2, 3]
    assert batch["y"].tolist() == [3, 2, 1, 0]
    assert batch["s"] == ["a", "a", "a", None]
    batch["x"].verify()


def test_no_buffer_is_used_twice() -> None:
    collate = PadCollator()
    first = collate([[1, 2], [3]])
    before = first.padded.clone()
    collate([[7, 8], [9]])
    assert torch.equal(first.padded, before)


def test_samples_from_read_only_memory_are_copied_without_a_warning(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(6, dtype=np.float32).reshape(3, 2))
    mapped = np.load(tmp_path / "a.npy", mmap_mode="r")
    batch = PadCollator()([mapped, mapped[:2], mapped[::-1], mapped[:1].copy()])
    assert batch.lengths.tolist() == [3, 3, 2, 1]
    batch.padded.zero_()
    assert mapped[2, 1] == 5


def test_gradients_of_samples_flow_through_the_collator() -> None:
    rows = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    PadCollator(sort_by=False)(rows).padded.sum().backward()
    assert all(row.grad.tolist() == [1] * len(row) for row in rows)


class Ragged(Dataset):
    """Sequences of length 0 to 9; which object stands in the third field is chosen by each test."""

    def __init__(self, extra: Any = None, fail: bool = False) -> None:
        self.extra, self.fail = extra, fail

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.fail and index == 5:
            raise LengthError("sample 5 is not what it says")
        return {"x": torch.full((index % 10,), index), "n": index, "extra": self.extra}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    "method",
    [pytest.param("fork", marks=pytest.mark.unix), "spawn", pytest.param("forkserver", marks=pytest.mark.unix)],
)
def test_loaders_of_every_kind_give_the_same_batches(workers: int, method: str) -> None:
    if workers == 0 and method != "fork":
        pytest.skip("without workers there is nothing to start")
    options = {"multiprocessing_context": method, "persistent_workers": True} if workers else {}
    loader = DataLoader(Ragged(), batch_size=6, num_workers=workers, collate_fn=PadCollator(-1), **options)
    for _ in range(2):
        batches = list(loader)
        assert [len(batch["x"]) for batch in batches] == [6, 6, 6, 2]
        for start, batch in zip(range(0, 20, 6), batches, strict=True):
            batch["x"].verify()
            rows = batch["x"].unsort().sequences()
            assert [row.tolist() for row in rows] == [[n] * (n % 10) for n in range(start, min(start + 6, 20))]


def test_an_error_of_a_worker_reaches_the_user_as_itself() -> None:
    loader = DataLoader(Ragged(fail=True), batch_size=6, num_workers=1, collate_fn=PadCollator())
    with pytest.raises(LengthError, match="sample 5 is not what it says"):
        list(loader)


def history() -> Any:
    return [torch.ones(2, requires_grad=True) * 2]


# Spawned workers cannot even be sent these samples.
@pytest.mark.unix
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (threading.Lock(), "field 'extra': the .* in sample 0 cannot be sent from a worker"),
        ([threading.Lock()], "field 'extra': the list in sample 0"),
        (lambda: None, "field 'extra': the function in sample 0"),
        (history(), "field 'extra': the list in sample 0 .* requires? gradients: detach"),
        (
            namedtuple("Local", "x")([1]),
            r"structure of its samples \(dict\) cannot be sent .* top level of a module",
        ),
    ],
    ids=["lock", "list of locks", "lambda", "history", "local class"],
)
def test_what_cannot_travel_from_a_worker_is_refused_instead_of_hanging(extra: Any, message: str) -> None:
    options = {"batch_size": 6, "num_workers": 1, "multiprocessing_context": "fork", "timeout": 30}
    with pytest.raises(TypeError, match=message):
        list(DataLoader(Ragged(extra), collate_fn=PadCollator(), **options))


def test_without_workers_any_object_goes_into_a_list() -> None:
    extra = threading.Lock()
    assert next(iter(DataLoader(Ragged(extra), batch_size=6, collate_fn=PadCollator())))["extra"] == [extra] * 6


@pytest.mark.unix
def test_stacked_tensors_leave_a_worker_without_their_graph() -> None:
    """Only a fork brings a graph into a worker."""
    weight = torch.ones(2, requires_grad=True)
    options: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "fork"}
    loader = DataLoader(Ragged(weight * 2), batch_size=6, collate_fn=PadCollator(stack=["extra"]), **options)
    assert next(iter(loader))["extra"].tolist() == [[2, 2]] * 6
    assert PadCollator(stack=["w"])([{"w": weight}] * 2)["w"].requires_grad


def test_the_collator_can_be_pickled() -> None:
    collate = PadCollator({"x": -1}, shapes=[(4, 8)], length_field={"x": "n"}, on_empty="error")
    again = pickle.loads(pickle.dumps(collate))
    sample = [{"x": [1, 2], "n": 2}]
    assert torch.equal(again(sample)["x"].padded, collate(sample)["x"].padded)


@pytest.mark.parametrize("kind", [torch.tensor, np.int32, np.array, int, np.uint8, lambda n: torch.tensor([n])])
def test_a_declared_length_may_be_any_kind_of_integer(kind: Callable[..., Any]) -> None:
    samples = [{"x": [1, 2], "n": kind(2)}, {"x": [3], "n": kind(1)}]
    assert PadCollator(length_field={"x": "n"})(samples)["x"].lengths.tolist() == [2, 1]


@pytest.mark.parametrize(
    ("length", "got"),
    [
        (torch.tensor(5.7), "torch.float32"),
        (torch.tensor(5.0), "torch.float32"),
        (np.float32(5.7), "torch.float32"),
        (np.array(5.7), "torch.float64"),
        (5.7, "torch.float32"),
        (torch.tensor(True), "torch.bool"),
        (np.bool_(True), "torch.bool"),
        (True, "torch.bool"),
        (torch.tensor([5.7]), "torch.float32"),
        ("5", "list"),
        (None, "list"),
        ([5, 5], "LengthTrackedBatch"),
    ],
)
def test_a_declared_length_that_is_no_integer_is_refused_and_not_cut(length: Any, got: str) -> None:
    """Red before: tensors and NumPy's numbers were cut to an integer, and a bool was 1."""
    steps = 1 if isinstance(length, bool | np.bool_) or length is True else 5
    samples = [{"x": [0] * steps, "n": length}] * 2
    with pytest.raises(TypeError, match=f"declared lengths of field 'x' must be integers, got {got}"):
        PadCollator(length_field={"x": "n"})(samples)


@pytest.mark.parametrize("stack", [(), ("x",)])
@pytest.mark.parametrize("masked", [False, True])
def test_masked_arrays_are_refused(masked: bool, stack: tuple[str, ...]) -> None:
    """Red before: what was masked became real steps."""
    samples = [{"x": np.ma.masked_array([1, 2, 3], [0, masked, 0])}, {"x": np.arange(3)}]
    with pytest.raises(TypeError, match=r"field 'x': sample 0 is a masked array, .* \.compressed\(\)"):
        PadCollator(stack=stack)(samples)


SAMPLES = [{"x": [1, 2], "n": 2, "y": [1]}, {"x": [3], "n": 1, "y": [2]}]


@pytest.mark.parametrize(
    ("options", "samples", "kind", "message"),
    [
        ({}, [], LengthError, "empty list of samples"),
        (
            {},
            [{"x": [1]}, {"y": [1]}],
            ValueError,
            "sample 1 must have the fields of sample 0: it lacks 'x' and has 'y'",
        ),
        ({}, [{"x": [1]}, {"x": [1], "z": 0}], ValueError, "has 'z' besides"),
        ({}, [([1],), ([1], 2)], ValueError, "got 2 instead of 1"),
        ({}, [([1],), {"x": [1]}], TypeError, "sample 1 must be a tuple like sample 0, got dict"),
        ({}, [{"a": {"b": [1]}}, {"a": [1]}], TypeError, "field 'a' of sample 1 must be a dict"),
        ({}, [{"a": {"b": [1]}, "a.b": [1]}], ValueError, "two fields are called 'a.b'"),
        ({}, [{"x": 1}, {"x": 2.0}], TypeError, "field 'x' must be numbers of one kind, got .'float', 'int'"),
        ({}, [{"x": torch.ones(1)}, {"x": "a"}], TypeError, "field 'x' must be of one kind, got .'Tensor', 'str'"),
        ({}, [{"x": torch.ones(1)}, {"x": np.ones(1)}], TypeError, "field 'x': .* float32 in sample 0 and float64"),
        (
            {},
            [{"x": torch.ones(1)}, {"x": torch.ones(1).int()}],
            TypeError,
            "field 'x': all samples must have one dtype",
        ),
        ({}, [{"x": torch.ones(1, 2)}, {"x": torch.ones(1, 3)}], ValueError, "field 'x': .* one feature shape"),
        ({}, [{"x": torch.ones(1)}, {"x": torch.ones(())}], ValueError, "field 'x': sample 1 has no axis"),
        ({}, [{"x": np.array([{}])}], TypeError, "field 'x': torch has no dtype for arrays of object"),
        ({"padding_value": -100}, [{"x": np.ones(1, np.uint8)}], ValueError, "field 'x': padding_value -100 cannot"),
        (
            {"padding_value": 0.5},
            [{"x": [1]}],
            ValueError,
            "field 'x': padding_value 0.5 cannot be held by torch.int64",
        ),
        ({"padding_value": {"x": 0}}, SAMPLES, ValueError, "padding_value is given for .'x'., the variable-length"),
        ({"sort_by": "n"}, SAMPLES, ValueError, "sort_by names 'n', the variable-length fields are .'x', 'y'."),
        ({"stack": ["z"]}, SAMPLES, ValueError, "stack names .'z'., the fields are"),
        ({"stack": "x"}, SAMPLES, TypeError, "stack must be a collection of field names"),
        ({"stack": ["x"]}, SAMPLES, ValueError, "field 'x' is stacked, so all samples must be alike"),
        ({"widths": {"x": 0, "y": 1}}, SAMPLES, ValueError, "widths must be at least 1, got 0"),
        ({"widths": [1]}, SAMPLES, LengthError, "widths must reach the longest sequence, 2 steps"),
        ({"max_length": 0}, SAMPLES, ValueError, "max_length must be at least 1, got 0"),
        ({"shapes": [(1, 8)]}, SAMPLES, LengthError, "no shape holds 2 rows of {'x': 2, 'y': 1} steps"),
        ({"shapes": []}, SAMPLES, ValueError, "shapes must name at least one"),
        ({"shapes": [(0, 1)]}, SAMPLES, ValueError, r"rows of shapes must be at least 1, got 0: .*\(0, 1\)"),
        ({"shapes": [(2, 1.5)]}, SAMPLES, TypeError, "a width of shapes must be an int, got 1.5"),
        ({"shapes": [(2, True)]}, SAMPLES, TypeError, "a width of shapes must be an int, got True"),
        ({"shapes": [5]}, SAMPLES, ValueError, r"shapes must be pairs \(rows, width\), got 5"),
        ({"shapes": [(2, (2, 2, 2))]}, SAMPLES, ValueError, r"has 3 widths, the variable-length fields are .'x', 'y'."),
        ({"sort_by": True}, SAMPLES, TypeError, "sort_by must be a field's name, None or False, got True"),
        # Red before: 0 sorted by the first field.
        ({"sort_by": 0}, SAMPLES, TypeError, "sort_by must be a field's name, None or False, got 0"),
        ({"sort_by": np.False_}, SAMPLES, TypeError, "sort_by must be a field's name, None or False, got np.False_"),
        ({"widths": 1.5}, SAMPLES, TypeError, "widths must be an int, got 1.5"),
        ({"max_length": 2.0}, SAMPLES, TypeError, "max_length must be an int, got 2.0"),
        ({"shapes": [(2, 2)], "widths": 2}, SAMPLES, ValueError, "leave widths out"),
        (
            {"length_field": {"y": "n"}},
            SAMPLES,
            LengthError,
            "field 'y': sample 0 has 1 steps, its declared length is 2",
        ),
        ({"length_field": {"x": "m"}}, SAMPLES, ValueError, "'m' is the length of 'x': no such field"),
        ({"length_field": "n"}, SAMPLES, ValueError, "could be the length of any of .'x', 'y'."),
        ({"length_field": "n"}, [{"x": [1], "n": 1.0}], TypeError, "declared lengths of field 'x' must be integers"),
        (
            {"length_field": "n"},
            [{"x": [1], "n": 2, "__key__": "k7"}],
            LengthError,
            r"field 'x': sample 0 \(key 'k7'\) has 1 steps, its declared length is 2 \(inflated",
        ),
        ({"on_empty": "error"}, [{"x": [1]}, {"x": []}], LengthError, "field 'x': sample 1 is empty: leave it out"),
        ({"padding_value": [0]}, SAMPLES, TypeError, r"padding_value must be a number, got \[0\] of type list"),
        ({"padding_value": 2**64}, [[1], [1, 2]], ValueError, "18446744073709551616 cannot be held by torch.int64"),
        ({"padding_value": 10**400}, [[1.0], [1.0, 2.0]], ValueError, "cannot be held by torch.float32"),
        ({"on_empty": "drop"}, SAMPLES, ValueError, "on_empty must be 'keep' or 'error', got 'drop'"),
    ],
)
def test_bad_samples_and_options_are_refused_by_name(
    options: dict[str, Any], samples: list[Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        PadCollator(**options)(samples)


def test_options_may_be_numpy_s_integers_and_shapes_come_from_json() -> None:
    """Red before: "not iterable", refused, and an error of comparing lists."""
    sample = {"x": [1] * 9, "y": [1] * 3}
    cut = PadCollator(widths=np.int64(8), max_length=np.int64(7))([sample])
    assert (cut["x"].padded.shape, cut["x"].lengths.tolist()) == ((1, 8), [7])
    shapes = json.loads("[[4, [9, 8]], [2, [9, 3]], [2, [9, 2]]]")
    assert PadCollator(shapes=shapes)([sample])["y"].padded.shape == (2, 3)
    json.dumps(PadCollator(shapes=[(np.int64(2), (np.int64(9), np.int64(8)))]).shapes)


# --- a collator for a sampler


@dataclass
class Planned:
    """What of a sampler is read."""

    max_length: object = None
    widths: object = None


def of(collate: PadCollator) -> tuple[Any, ...]:
    return collate.max_length, collate.widths, collate.padding_value, collate.sort_by


@pytest.mark.parametrize(
    ("sampler", "same", "other"),
    [
        (Planned(4, 8), {"max_length": 4, "widths": np.int64(8)}, {"max_length": 5}),
        (Planned(4, [16, 8]), {"widths": (8, 16)}, {"widths": 8}),
        (Planned(), {"max_length": None, "widths": None}, {"max_length": 3}),
        (Planned(np.int64(4)), {"max_length": 4}, {"widths": 3}),
        (Planned({"x": 4}, {"x": 8}), {"max_length": {"x": 4}}, {"max_length": 4}),
    ],
)
def test_a_collator_for_a_sampler_has_its_widths_and_its_greatest_length(
    sampler: Planned, same: dict[str, Any], other: dict[str, int]
) -> None:
    plain = PadCollator(-1, sort_by=False, max_length=sampler.max_length, widths=sampler.widths)
    for again in ({}, same):
        assert of(PadCollator.for_sampler(sampler, -1, sort_by=False, **again)) == of(plain)
    with pytest.raises(ValueError, match=f"{next(iter(other))}=.* differs from the sampler's"):
        PadCollator.for_sampler(sampler, **other)


def test_a_collator_is_made_for_nothing_but_a_sampler_of_lengths() -> None:
    with pytest.raises(TypeError, match="a list has no max_length and no widths"):
        PadCollator.for_sampler([[0, 1]])


def test_shapes_of_a_sampler_stand_for_its_widths() -> None:
    collate = PadCollator.for_sampler(Planned(4, 8), shapes=[(2, 8), (1, 16)])
    assert collate([[1] * 9]).padded.shape == (2, 8)


def test_a_subclass_makes_its_own_kind_for_a_sampler() -> None:
    class Mine(PadCollator):
        pass

    assert type(Mine.for_sampler(Planned())) is Mine


@pytest.mark.parametrize("count", [2.0, "2", True, None])
@pytest.mark.parametrize(
    "use",
    [
        lambda count: PadCollator(max_length=2.5 if count is None else count),
        lambda count: PadCollator(shapes=[(count, 8)]),
        lambda count: PadCollator(shapes=[(8, (8, count))]),
        lambda count: LengthTrackedBatch.from_sequences([[1]]).split(count),
        lambda count: LengthTrackedBatch.from_sequences([[1]]).split_steps(count),
        lambda count: LengthTrackedBatch(torch.ones(1, 1), [1], first_step=count),
        lambda count: DevicePrefetcher([], "cpu", depth=count),
        lambda count: token_scale(count),
    ],
)
def test_a_count_that_is_no_int_is_a_type_error_everywhere(
    use: Callable[..., Any], count: bool | float | str | None
) -> None:
    with pytest.raises(TypeError, match="must be an int, got"):
        use(count)


def test_labels_that_nobody_chose_to_pad_with_zero_are_warned_of() -> None:
    # Red: they were padded with 0, a class, in silence.
    samples = [{"labels": [1, 2], "tags": [1]}, {"labels": [1], "tags": [1]}]
    for name, each in (("labels", samples), ("y.labels", [{"y": {"labels": [1]}}, {"y": {"labels": []}}])):
        with pytest.warns(
            UserWarning, match=f"field '{name}' is padded with 0, which a loss counts as class 0: choose"
        ):
            PadCollator()(each)
    with pytest.warns(UserWarning, match="field 'labels'"):
        pickle.loads(pickle.dumps(PadCollator(widths=4)))([{"labels": [1]}])
    # Chosen, without padding, or no class.
    PadCollator(0)(samples)
    PadCollator({"labels": -100, "tags": 0})(samples)
    PadCollator()(samples[:1])
    PadCollator()([{"labels": [0.5, 1.0]}, {"labels": [0.5]}])
