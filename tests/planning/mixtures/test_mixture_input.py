"""Mixtures refuse what they cannot do, with names and numbers; and join the datasets of their sources."""

import math
from typing import Any

import numpy as np
import pytest

from samplers import LengthBucketBatchSampler, LengthError, Mixture, PackingBatchSampler
from samplers.planning.sorting import as_length_array

SOURCES = {"web": [5, 3, 4, 4, 2, 6], "books": [9, 8, 7, 9]}


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"weights": {"web": -1, "books": 1}}, ValueError, r"weights\['web'\] .* at least 0, got -1"),
        ({"weights": {"web": math.nan, "books": 1}}, ValueError, r"weights\['web'\] .* got nan"),
        ({"weights": {"web": math.inf, "books": 1}}, ValueError, r"weights\['web'\] .* got inf"),
        ({"weights": {"web": 0, "books": 0}}, ValueError, "one above 0"),
        ({"weights": {"web": 1, "books": 1, "code": 1}}, ValueError, r"got \['code'\]: the sources are \['web', 'bo"),
        ({"weights": {"web": 1}}, ValueError, r"for every source, got none for \['books'\]"),
        ({"weights": {"web": "1", "books": 1}}, TypeError, r"weights\['web'\] must be a number, got '1'"),
        ({"weights": {"web": True, "books": 1}}, TypeError, "must be a number, got True"),
        ({"weights": [1, 1]}, TypeError, "mapping of names to numbers, got list"),
        ({"temperature": 0}, ValueError, "temperature must be above 0, got 0"),
        ({"temperature": math.nan}, ValueError, "temperature must be above 0, got nan"),
        ({"unit": "words"}, ValueError, "unit must be one of 'tokens', 'samples', 'padded', got 'words'"),
        ({"within": "row"}, ValueError, "within must be one of 'batch', 'sample', got 'row'"),
        ({"stop": "never"}, ValueError, "stop must be 'shortest', 'longest' or a number of steps, got 'never'"),
        ({"stop": 0}, ValueError, "stop must be at least 1, got 0"),
        ({"stop": 1.5}, TypeError, "stop must be an int"),
        ({"passes": {"web": 0.5}}, ValueError, r"passes\['web'\] must be a finite number of at least 1, got 0.5"),
        ({"passes": {"code": 2}}, ValueError, r"got \['code'\]"),
    ],
)
def test_a_wrong_option_is_named_with_its_value(options: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Mixture(SOURCES, **options)


@pytest.mark.parametrize(
    ("sources", "error", "says"),
    [
        ([[1, 2]], TypeError, "mapping of names to lengths, got list"),
        ({}, ValueError, "at least one source"),
        ({"a": []}, ValueError, "source 'a': lengths must be"),
        ({"a": [1.5]}, TypeError, "source 'a': lengths must be integers"),
        ({1: [1]}, TypeError, "names of sources must be texts, got 1"),
        ({"a": [1, 2], "b": [[1, 2]]}, ValueError, "equally many fields, got {'a': 1, 'b': 2}"),
    ],
)
def test_wrong_sources_are_named(sources: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Mixture(sources)


def test_a_source_that_cannot_be_planned_is_named() -> None:
    with pytest.raises(LengthError, match="source 'books': 2 of 4 samples alone exceed"):
        LengthBucketBatchSampler(Mixture(SOURCES), max_tokens=8)
    with pytest.raises(ValueError, match="source 'web': no sample is left to plan: min_length=7 leaves out 6"):
        LengthBucketBatchSampler(Mixture(SOURCES), max_tokens=20, min_length=7)
    with pytest.raises(ValueError, match="source 'books' must have a sample to plan, got none of its 4 in indices"):
        LengthBucketBatchSampler(Mixture(SOURCES), max_tokens=20, indices=[0, 1, 2])
    with pytest.raises(LengthError, match="source 'a': lengths must be from 0"):
        LengthBucketBatchSampler(Mixture({"a": [3, -1]}), max_tokens=20)
    with pytest.raises(ValueError, match=r"passes\['web'\] must be at least \d.* share of 0.5 of the tokens"):
        LengthBucketBatchSampler(
            Mixture(
                {"web": [3] * 10, "books": [9] * 100}, weights={"web": 1, "books": 1}, passes={"web": 2}, stop="longest"
            ),
            max_tokens=20,
        )
    with pytest.raises(ValueError, match="a batch for each of 9 replicas"):
        LengthBucketBatchSampler(Mixture(SOURCES), max_tokens=20, num_replicas=9, rank=0)
    with pytest.raises(TypeError, match="batch samplers, ShardStream and plan_epoch take one"):
        as_length_array(Mixture(SOURCES))  # type: ignore[arg-type]


def test_samples_of_several_fields_stay_in_batches_of_their_own() -> None:
    sources = {name: np.column_stack([lengths, lengths]) for name, lengths in SOURCES.items()}
    for kind, options in (
        (LengthBucketBatchSampler, {"max_tokens": 40}),
        (PackingBatchSampler, {"capacity": [20, 20]}),
    ):
        with pytest.raises(ValueError, match="within='sample' must have .* one field"):
            kind(Mixture(sources, within="sample"), **options)  # type: ignore[operator]
        sampler = kind(Mixture(sources, stop="longest"), **options)  # type: ignore[operator]
        assert {index for batch in sampler for index in batch} == set(range(10))


def test_only_a_sampler_of_a_mixture_takes_another() -> None:
    plain = LengthBucketBatchSampler([3, 4, 5], max_tokens=9)
    with pytest.raises(
        TypeError, match="mixture must be a Mixture where one is planned, got Mixture for a plan of list"
    ):
        plain.seek(plain.next_position, mixture=Mixture(SOURCES))
    with pytest.raises(TypeError, match="must be of a plan of one, got list"):
        plain.mixture_report()
    mixed = LengthBucketBatchSampler(Mixture(SOURCES), max_tokens=20)
    with pytest.raises(ValueError, match="must be the text that position"):
        mixed.seek(mixed.next_position | {"mixture": "[]"})
    other = LengthBucketBatchSampler(Mixture(SOURCES, weights={"web": 1, "books": 9}), max_tokens=20)
    with pytest.raises(ValueError, match="options differ"):
        other.seek(mixed.next_position)


def test_weights_are_divided_by_their_sum_and_evened_by_temperature() -> None:
    weights = {"web": 8, "books": 2}
    assert Mixture(SOURCES, weights=weights).shares_of([1, 1]).tolist() == pytest.approx([0.8, 0.2])
    assert Mixture(SOURCES, weights=weights, temperature=2).shares_of([1, 1]).tolist() == pytest.approx([2 / 3, 1 / 3])
    assert Mixture(SOURCES, temperature=math.inf).shares_of([90, 10]).tolist() == [0.5, 0.5]
    assert Mixture(SOURCES).shares_of([90, 10]).tolist() == pytest.approx([0.9, 0.1])
    assert Mixture(SOURCES, weights={"web": 1e-300, "books": 1}).shares_of([1, 1])[0] > 0


def test_without_weights_one_epoch_is_one_pass_of_everything() -> None:
    for options in ({"max_tokens": 18}, {"batch_size": 2}):
        sampler = LengthBucketBatchSampler(Mixture(SOURCES, stop="longest"), **options)
        assert sorted(index for batch in sampler for index in batch) == list(range(10))


def test_the_same_lengths_under_two_names_have_their_own_shuffles() -> None:
    lengths = list(range(1, 41))
    mixture = Mixture({"a": lengths, "b": lengths})
    batches = list(LengthBucketBatchSampler(mixture, max_tokens=90))
    orders = [[index % 40 for batch in batches for index in batch if index // 40 == number] for number in (0, 1)]
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_a_source_of_weight_zero_is_not_read() -> None:
    mixture = Mixture(SOURCES, weights={"web": 0, "books": 1})
    sampler = LengthBucketBatchSampler(mixture, max_tokens=18)
    assert sorted(index for batch in sampler for index in batch) == [6, 7, 8, 9]
    assert [source.name for source in sampler.mixture_report().sources] == ["books"]


def test_joined_datasets_are_read_by_the_indices_of_the_plan() -> None:
    class Reader(list[int]):
        def __getitems__(self, indices: list[int]) -> list[int]:
            calls.append(indices)
            return [self[index] for index in indices]

    calls: list[list[int]] = []
    mixture = Mixture(SOURCES)
    data = {"books": Reader([60, 70, 80, 90]), "web": [0, 10, 20, 30, 40, 50]}
    joined = mixture.concat(data)
    assert len(joined) == 10
    assert [joined[index] for index in range(10)] == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert joined[-1] == 90
    assert joined.__getitems__([9, 0, 6, 5]) == [90, 0, 60, 50]
    assert calls == [[3, 0]]
    assert mixture.locate([5, 6]) == [("web", 5), ("books", 0)]
    with pytest.raises(IndexError, match=r"range\(10\), got 10"):
        joined[10]
    with pytest.raises(IndexError, match=r"range\(10\), got -1"):
        mixture.locate([-1])
    with pytest.raises(ValueError, match="got 1 of source 'books' for 4 lengths"):
        mixture.concat(data | {"books": [1]})
    with pytest.raises(ValueError, match=r"got none for \['web'\]"):
        mixture.concat({"books": [1]})
    with pytest.raises(TypeError, match="map-style, with __len__ and __getitem__, got a generator"):
        mixture.concat(data | {"web": (each for each in ())})
