"""fit_cost: predictions against the times that made them, the fit against conditions of the best, and plans by it."""

import copy
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from samplers import LengthBucketBatchSampler, PackingBatchSampler, bucket_by_length, fit_cost, plan_epoch
from samplers.planning.fitting.cost_fit import _non_negative

GRID = [(rows, width) for rows in (1, 3, 8, 20) for width in (7, 16, 40, 90)]
FACTORS = st.lists(st.sampled_from([0.0, 0.2, 1.0, 3.0]), min_size=4, max_size=4)


def time_of(factors: list[float], rows: Any, width: Any) -> Any:
    """Milliseconds by hand, of a step with a constant, and of each row, time step, padded token and square."""
    row, step, token, square = factors
    return 1.5 + row * rows + 0.1 * step * width + 0.01 * token * rows * width + 1e-4 * square * rows * width**2


def fitted(**options: Any) -> Any:
    return fit_cost([(*shape, time_of([0.2, 1.0, 1.0, 0.2], *shape)) for shape in GRID], **options)


@given(FACTORS.filter(any), st.integers(1, 60), st.integers(1, 200))
def test_times_that_follow_the_shape_are_predicted_for_others(factors: list[float], rows: int, width: int) -> None:
    cost = fit_cost([(*shape, time_of(factors, *shape)) for shape in GRID])
    expected = time_of(factors, rows, width)
    assert cost.milliseconds([rows], [width]) == pytest.approx(expected, rel=1e-3)
    assert cost.error < 1e-3 < cost.error_of_constant
    assert cost.limit == max(time_of(factors, *shape) for shape in GRID)
    # A larger batch is never cheaper.
    more = cost.milliseconds([rows, rows + 1, rows], [width, width, width + 1])
    assert more[0] == more.min()


@pytest.mark.parametrize("seed", range(4))
def test_steps_that_something_slowed_down_hardly_count(seed: int) -> None:
    chance = np.random.default_rng(seed)
    factors = [0.2, 1.0, 1.0, 0.2]
    observations = [
        (*shape, time_of(factors, *shape) * (chance.uniform(2, 50) if slow == 0 else chance.uniform(0.99, 1.01)))
        for shape in GRID
        for slow in chance.permutation(5)
    ]
    cost = fit_cost(observations)
    predicted = cost.milliseconds(*np.array(GRID).T)
    assert predicted == pytest.approx([time_of(factors, *shape) for shape in GRID], rel=0.05)


@given(st.integers(0, 1 << 30), st.integers(1, 6), st.integers(1, 12))
def test_factors_fulfil_the_conditions_of_the_best(seed: int, terms: int, observations: int) -> None:
    """None above zero can be changed for the better, none at zero raised (conditions of Karush, Kuhn and Tucker)."""
    chance = np.random.default_rng(seed)
    relative, weights = chance.uniform(0, 1, (observations, terms)), chance.uniform(0.1, 10, observations)
    factors = _non_negative(relative, weights)
    slope = relative.T @ (weights * (relative @ factors - 1))
    assert (factors >= 0).all()
    assert slope[factors > 0] == pytest.approx(0, abs=1e-5)
    assert (slope >= -1e-5).all()


def test_padding_and_real_tokens_are_told_apart_by_lengths() -> None:
    chance = np.random.default_rng(0)
    observations = []
    for _ in range(30):
        lengths = chance.integers(1, 60, chance.integers(2, 20))
        width = int(lengths.max()) + int(chance.integers(0, 9))
        padded = len(lengths) * width
        observations.append((lengths, width, 2 + 0.01 * lengths.sum() + 0.004 * padded))
    cost = fit_cost(observations)
    factors = cost.factors
    assert factors["token"] == pytest.approx(0.01, rel=1e-3)
    assert factors["padded_token"] == pytest.approx(0.004, rel=1e-2)
    # What a plan counts: no more real tokens than padded ones.
    assert cost.milliseconds([4], [50], [120]) == pytest.approx(2 + 1.2 + 0.8, rel=1e-3)
    assert cost.milliseconds([4], [50]) == pytest.approx(2 + 2.0 + 0.8, rel=1e-3)


def test_batches_of_several_fields_have_tuples_of_widths() -> None:
    shapes = [(rows, (width, other)) for rows in (1, 4, 9) for width in (5, 20, 60) for other in (3, 30)]
    cost = fit_cost([(rows, both, 1 + 0.01 * rows * sum(both)) for rows, both in shapes])
    assert cost.milliseconds([10, 2], [(10, 30), (7, 5)]) == pytest.approx([5, 1.24], rel=1e-3)
    plan = plan_epoch([(20, 10), (8, 30), (5, 5)] * 40, cost=cost.within(4))
    assert plan.milliseconds.max() <= 4


def test_no_planned_step_takes_longer_than_the_limit() -> None:
    lengths = np.random.default_rng(0).integers(1, 90, 600).tolist()
    cost = fitted().within(12)
    plan = plan_epoch(lengths, cost=cost, num_replicas=3)
    by_hand = [
        [time_of([0.2, 1.0, 1.0, 0.2], len(batch), max(lengths[sample] for sample in batch)) for batch in step]
        for step in zip(*[iter(plan.batches)] * 3, strict=True)
    ]
    assert plan.milliseconds == pytest.approx(np.array(by_hand), rel=1e-3)
    assert plan.milliseconds.max() <= 12 * 1.001
    # Most batches are nearly full: the limit is used.
    assert np.median(plan.milliseconds) > 9
    report = plan.report()
    assert report.step_milliseconds == pytest.approx(np.mean([max(step) for step in by_hand]), rel=1e-3)
    waits = sum(max(step) - time for step in by_hand for time in step)
    assert report.waiting == pytest.approx(waits / sum(3 * max(step) for step in by_hand), rel=1e-2)
    assert "step milliseconds" in str(report)
    sampler = LengthBucketBatchSampler(lengths, cost=cost, num_replicas=3, rank=1)
    sampler.seek(
        LengthBucketBatchSampler(lengths, cost=pickle.loads(pickle.dumps(cost)), num_replicas=3, rank=1).position(2)
    )
    assert sampler.remaining == plan.steps - 2


def test_a_plan_by_other_limits_tells_no_times() -> None:
    plan = plan_epoch([5, 6, 7], max_tokens=20)
    assert plan.report().step_milliseconds is None
    assert "milliseconds" not in str(plan.report())
    with pytest.raises(ValueError, match="milliseconds need a cost from fit_cost"):
        _ = plan.milliseconds


def packed_cost(**options: Any) -> Any:
    chance = np.random.default_rng(1)
    steps = [chance.integers(1, 100, chance.integers(1, 30)) for _ in range(25)]
    return fit_cost([(each, 3 + 0.02 * each.sum() + 1e-4 * (each**2).sum()) for each in steps], packed=True, **options)


def test_rows_are_packed_by_the_milliseconds_of_their_documents() -> None:
    cost = packed_cost()
    assert cost([10, 100]) == pytest.approx([0.2 + 0.01, 2 + 1], rel=1e-3)
    lengths = np.random.default_rng(0).integers(1, 100, 400)
    sampler = PackingBatchSampler(lengths, capacity=200, cost=cost, max_cost=4.5, num_replicas=2, rank=0)
    plan = sampler.plan(0)
    by_hand = [
        [sum(cost([lengths[sample]])[0] for sample in batch) for batch in step]
        for step in zip(*[iter(plan.batches)] * 2, strict=True)
    ]
    assert plan.batch_costs == pytest.approx(np.array(by_hand))
    assert plan.batch_costs.max() <= 4.5
    assert plan.milliseconds == pytest.approx(np.array(by_hand) + 3, rel=1e-3)
    assert plan.report().step_milliseconds == pytest.approx(plan.milliseconds.max(1).mean())
    without = PackingBatchSampler(lengths, capacity=200, num_replicas=2, rank=0).plan(0)
    assert without.report().waiting is None


def test_a_cost_is_copied_printed_and_refuses_the_other_kind() -> None:
    cost = fitted()
    assert copy.deepcopy(cost) == pickle.loads(pickle.dumps(cost)) == cost
    assert len(repr(cost)) < 200
    with pytest.raises(TypeError, match="fitted to padded batches"):
        cost([5, 6])
    with pytest.raises(TypeError, match="fitted to packed batches"):
        packed_cost()([5], [6])
    with pytest.raises(TypeError, match="fitted to packed batches"):
        packed_cost().milliseconds([5], [6])


def test_a_limit_of_packed_steps_is_the_sampler_s() -> None:
    """Red before: it was taken, and nothing asked for it."""
    with pytest.raises(TypeError, match="has no limit: give PackingBatchSampler"):
        packed_cost(limit=5)
    with pytest.raises(TypeError, match="has no limit: give PackingBatchSampler"):
        packed_cost().within(5)


@pytest.mark.parametrize(
    ("observations", "options", "kind", "message"),
    [
        ([], {}, ValueError, "got none"),
        ([(1, 2, 3.0)] * 20, {}, ValueError, "of 8 shapes at least, got 1"),
        ([(rows, 5, rows) for rows in range(1, 20)], {}, ValueError, "differ in their widths, got 5 in all"),
        ([(5, width, width) for width in range(1, 20)], {}, ValueError, "differ in their rows, got 5 in all"),
        ([(*shape, 100 / sum(shape)) for shape in GRID], {}, ValueError, "must follow its shape"),
        ([(1, 2, -3.0)], {}, ValueError, r"observation 0 must have positive numbers, got \(1, 2, -3.0\)"),
        ([(1, 2, float("nan"))], {}, ValueError, "observation 0 must have positive"),
        ([(1, 0, 3.0)], {}, ValueError, "observation 0 must have positive"),
        ([([], 3.0)], {}, ValueError, "observation 0 must have positive"),
        ([([4, 9], 8, 3.0)], {}, ValueError, "observation 0 must not have lengths above its width"),
        ([(1, 2, 3.0), (1, 2)], {}, TypeError, r"observation 1 must be \(rows, width, milliseconds\)"),
        ([(1, "x", 3.0)], {}, TypeError, "observation 0"),
        ([5], {}, TypeError, "observation 0"),
        ([(1, 2, 3.0)], {"packed": True}, TypeError, r"observation 0 must be \(lengths, milliseconds\)"),
        ([(1, 2, 3.0), (1, (2, 3), 3.0)], {}, ValueError, "widths of one number of fields"),
        ([(*shape, time_of([1, 1, 1, 1], *shape)) for shape in GRID], {"limit": 0}, ValueError, "limit must be"),
        # These were red: numbers that overflow were an error of the solver, and a falling time a plan without a limit.
        ([(*shape, time_of([1, 1, 1, 1], *shape)) for shape in GRID], {"limit": "x"}, TypeError, "limit must be a num"),
        (
            [(*shape, time_of([1, 1, 1, 1], *shape)) for shape in GRID],
            {"limit": True},
            TypeError,
            "limit must be a num",
        ),
        (
            [(*shape, time_of([1, 1, 1, 1], *shape)) for shape in GRID],
            {"limit": 10**400},
            ValueError,
            "limit must be m",
        ),
        ([(1e150, 2e150, 3.0)], {}, ValueError, "observation 0 must have numbers between 1e-50 and 1e"),
        ([(1, 2, 1e-310)], {}, ValueError, "observation 0 must have numbers between 1e-50 and 1e"),
        (
            [(rows, width, 1000 - rows - width) for rows in (4, 8, 16) for width in (20, 50, 90)],
            {},
            ValueError,
            "the time of a step must grow with its shape, got a fit of 942 ms for all",
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused(observations: Any, options: Any, kind: Any, message: str) -> None:
    with pytest.raises(kind, match=message):
        fit_cost(observations, **options)


def test_a_fitted_cost_without_a_term_for_rows_needs_another_limit() -> None:
    """It was red: without a limit of rows, the whole corpus was one batch."""
    steps = [(rows, width, 2 + 0.01 * width) for rows in (4, 8, 16) for width in (20, 50, 90)]
    cost = fit_cost(steps)
    for plan in (plan_epoch, LengthBucketBatchSampler):
        with pytest.raises(ValueError, match="must grow with the rows.*constant 2, width 0.01.*batch_size"):
            plan([60] * 1000, cost=cost)
    with pytest.raises(ValueError, match="must grow with the rows"):
        bucket_by_length("x", cost=cost)
    assert plan_epoch([60] * 1000, cost=cost, batch_size=8).steps == 125
    growing = fit_cost([(rows, width, time + 0.01 * rows) for rows, width, time in steps], limit=3)
    assert plan_epoch([60] * 1000, cost=growing).batch_shapes[0][0] <= 40
