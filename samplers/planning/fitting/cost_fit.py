"""fit_cost: what a training step costs, in milliseconds, found from steps that were timed.

The time of a step is taken as a sum of terms that grow with its shape, each with a factor of zero or more: so a larger
batch never seems cheaper. The factors are those with the least sum of absolute relative errors, which steps that
something else slowed down hardly move. This sum is reached by least squares with weights that are made again from the
errors (P. Green, "Iteratively Reweighted Least Squares for Maximum Likelihood Estimation", 1984); as there are few
terms, each least-squares problem is solved for every subset of them, so that the result is exact.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from samplers.planning.budget import Floats, Integers

# Shapes that must be known: more than there are terms, so that some can be held out.
LEAST_SHAPES: Final = 8
FOLDS: Final = 5
ITERATIONS: Final = 40
# A relative error below this has no greater weight.
SMALLEST_ERROR: Final = 1e-4
# Numbers of an observation: their squares and quotients must stay within floats.
_SMALLEST: Final = 1e-50
_LARGEST: Final = 1e50
PADDED_TERMS: Final = ("constant", "row", "width", "padded_token", "token", "square")
_NO_LIMIT: Final = "a cost of packed batches has no limit: give PackingBatchSampler(max_cost=) milliseconds of a row"
PACKED_TERMS: Final = ("constant", "row", "token", "square")


@dataclass(frozen=True)
class FittedCost:
    """Milliseconds of a training step, by the shape of its batch; the `cost` of a sampler.

    For padded batches, `cost(rows, widths)` is the predicted time of a step over `limit`, as
    `LengthBucketBatchSampler(cost=...)` takes it: a batch is full when its step takes `limit` milliseconds. For packed
    ones, `cost(lengths)` is in milliseconds of a document, as `PackingBatchSampler(cost=...)` takes it, and so is
    its `max_cost`.

    Attributes:
        factors: Milliseconds of each term: `constant` for a step, and for each `row` (or document), time step of
            `width`, real `token`, `padded_token`, and `square` of a row's width (or of a document's length).
        error: Median relative error on shapes that were held out: 0.05 is 5 %.
        error_of_constant: The same of one time for all shapes: the mean, or the best one, whichever predicts better.
        shapes: Number of different shapes that were timed.
        limit: Milliseconds that are a cost of 1; the slowest shape that was timed, where none is given. For packed
            batches only the latter: the sampler's `max_cost` is their limit.
        is_packed: Whether batches hold documents without padding.
    """

    factors: dict[str, float]
    error: float
    error_of_constant: float
    shapes: int
    limit: float
    is_packed: bool = False

    def __call__(self, rows: npt.ArrayLike, widths: npt.ArrayLike | None = None) -> Floats:
        """What a sampler asks for.

        Args:
            rows: Rows of batches, int64 `[n]`; for packed batches, lengths of documents, `[n]` or `[n, K]`.
            widths: Their widths, int64 `[n]` or `[n, K]`; none for packed batches.

        Returns:
            float64 `[n]`: shares of `limit`; for packed batches, milliseconds of each document.

        Raises:
            TypeError: The cost is of packed batches, and is asked about padded ones, or the other way round.
        """
        if self.is_packed != (widths is None):
            kinds = ("packed", "padded") if self.is_packed else ("padded", "packed")
            raise TypeError(
                f"this cost was fitted to {kinds[0]} batches, and is asked about {kinds[1]} ones: fit it to steps of "
                f"those, with packed={not self.is_packed}"
            )
        if widths is not None:
            return self.milliseconds(rows, widths) / self.limit
        lengths = _columns(rows)
        terms = {"row": np.ones(len(lengths)), "token": lengths.sum(1), "square": (lengths**2).sum(1)}
        return self._sum(terms)

    def milliseconds(self, rows: npt.ArrayLike, widths: npt.ArrayLike, tokens: npt.ArrayLike | None = None) -> Floats:
        """Predicted time of steps with padded batches.

        Args:
            rows: Rows of each batch, `[n]`.
            widths: Padded widths, `[n]` or `[n, K]`.
            tokens: Real tokens of each, `[n]`; None counts all padded tokens as real.

        Returns:
            float64 `[n]`.

        Raises:
            TypeError: The cost is of packed batches.
        """
        if self.is_packed:
            raise TypeError("this cost was fitted to packed batches: call it with the lengths of documents")
        return self._sum(_padded_terms(np.asarray(rows, np.float64), _columns(widths), tokens))

    @property
    def grows_with_rows(self) -> bool:
        """Whether more rows of a width cost more; if not, a planner needs another limit of rows."""
        return any(self.factors.get(name) for name in ("row", "token", "padded_token", "square"))

    def within(self, limit: float) -> Self:
        """The same cost, with another limit in milliseconds.

        Raises:
            TypeError: The limit is not a number, or the cost is of packed batches.
            ValueError: The limit is not above 0.
        """
        if self.is_packed:
            raise TypeError(_NO_LIMIT)
        return replace(self, limit=_check_limit(limit))

    def __repr__(self) -> str:
        factors = ", ".join(f"{name} {value:.3g}" for name, value in self.factors.items() if value)
        return (
            f"FittedCost(ms: {factors}; error {self.error:.1%} on held-out shapes of {self.shapes}, "
            f"limit {self.limit:.3g} ms)"
        )

    def _sum(self, terms: dict[str, Any]) -> Floats:
        total: Floats = np.zeros(len(terms["row"]))
        for name, values in terms.items():
            if self.factors[name]:
                total = total + self.factors[name] * values
        return total


@dataclass(frozen=True)
class _Timed:
    """Observations as columns.

    Attributes:
        shapes: The number of each observation's shape, int64 `[n]`; equal shapes have equal numbers.
        terms: The terms of each, float64 `[n, terms]`.
        milliseconds: Its time, float64 `[n]`.
    """

    shapes: Integers
    terms: Floats
    milliseconds: Floats


def fit_cost(observations: Iterable[Sequence[Any]], *, packed: bool = False, limit: float | None = None) -> FittedCost:
    """Fit the time of a training step to steps that were timed.

    Time each step with the device synchronised, and leave out the first ones of a run. Use shapes as they will come,
    with rows and widths that vary independently: where each width has its own number of rows, nobody can tell which of
    them the time is for, and predictions hold for such shapes only.

    Args:
        observations: For each step `(rows, width, milliseconds)`, with a tuple as the width of several fields, or
            `(lengths, milliseconds)`, which tells padding from real tokens: the batch is as wide as the longest, or
            `(lengths, width, milliseconds)`.
        packed: Steps are of packed rows: `(lengths, milliseconds)` has the lengths of all documents in the step, and
            padding costs nothing.
        limit: Milliseconds that a padded batch may take; None takes the slowest shape that was timed.

    Returns:
        The cost, with its error: each fifth of the shapes is predicted by a fit to the others.

    Raises:
        TypeError: An observation has the wrong form, or the limit is not a number, or given for packed steps.
        ValueError: A number is not positive or not finite, fewer than 8 shapes were timed, all have the same width or
            number of rows, or one time for all predicts shapes that were held out as well as the fit does, or is the
            best fit.

    Examples:
        >>> steps = [(rows, width, 2 + 0.01 * rows * width) for rows in (4, 8, 16) for width in (20, 50, 90)]
        >>> cost = fit_cost(steps, limit=10)
        >>> cost
        FittedCost(ms: constant 2, padded_token 0.01; error 0.0% on held-out shapes of 9, limit 10 ms)
        >>> cost.milliseconds([10], [60]).round(3).tolist()
        [8.0]
        >>> from samplers import plan_epoch
        >>> plan_epoch([60] * 100, cost=cost).batch_shapes
        [(13, (60,)), (11, (60,))]
    """
    if packed and limit is not None:
        raise TypeError(_NO_LIMIT)
    timed = _read(list(observations), packed=packed)
    names = PACKED_TERMS if packed else PADDED_TERMS
    count = int(timed.shapes.max()) + 1
    if count < LEAST_SHAPES:
        raise ValueError(f"observations must be of {LEAST_SHAPES} shapes at least, got {count}: time more shapes")
    _check_variety(timed, names)
    typical = np.array([np.median(timed.milliseconds[timed.shapes == shape]) for shape in range(count)])
    error, error_of_constant = _held_out_errors(timed, typical)
    if not error < error_of_constant:
        raise ValueError(
            f"the time of a step must follow its shape, got an error of {error:.1%} on shapes that were held out, "
            f"where one time for all has {error_of_constant:.1%}: synchronise the device before each reading of the "
            "clock, leave out the first steps, and time shapes of more different sizes"
        )
    factors = dict(zip(names, _fit(timed.terms, timed.milliseconds).tolist(), strict=True))
    if not any(factors[name] for name in names if name != "constant"):
        raise ValueError(
            f"the time of a step must grow with its shape, got a fit of {factors['constant']:.3g} ms for all: time "
            "shapes of more different sizes"
        )
    limit = float(typical.max()) if limit is None else _check_limit(limit)
    return FittedCost(factors, error, error_of_constant, count, limit, packed)


def _read(observations: list[Sequence[Any]], *, packed: bool) -> _Timed:
    """Check observations, and compute their terms.

    Raises:
        TypeError: One has the wrong form.
        ValueError: A number is not positive or not finite, or there are none.
    """
    if not observations:
        raise ValueError("observations must be given, got none: time some steps")
    names = PACKED_TERMS if packed else PADDED_TERMS
    rows, milliseconds, fields = [], [], set()
    for number, observation in enumerate(observations):
        lengths, widths, time = _parts(observation, number, packed=packed)
        if packed:
            terms = {"constant": 1, "row": len(lengths), "token": lengths.sum(), "square": (lengths**2).sum()}
        else:
            count = np.array([lengths if lengths.ndim == 0 else len(lengths)], np.float64)
            terms = _padded_terms(count, widths[None], None if lengths.ndim == 0 else lengths.sum(keepdims=True))
        rows.append(np.hstack([terms[name] for name in names]))
        milliseconds.append(time)
        fields.add(len(widths))
    if len(fields) > 1:
        raise ValueError(f"observations must have widths of one number of fields, got {sorted(fields)}")
    # Observations with equal terms cannot be told apart.
    _, shapes = np.unique(rows, axis=0, return_inverse=True)
    return _Timed(shapes.reshape(-1).astype(np.int64), np.array(rows), np.array(milliseconds))


def _parts(observation: Sequence[Any], number: int, *, packed: bool) -> tuple[Floats, Floats, float]:
    """Lengths `[n]` (or the number of rows, `[]`), widths `[K]`, and the time of an observation.

    Raises:
        TypeError: It has the wrong form.
        ValueError: A number is not positive or not finite.
    """
    forms = "(lengths, milliseconds)" if packed else "(rows, width, milliseconds) or (lengths, milliseconds)"
    try:
        parts = [np.asarray(part, np.float64) for part in observation]
        is_pair = len(parts) == 2 and parts[0].ndim == 1
        is_triple = len(parts) == 3 and not packed and parts[0].ndim <= 1 and parts[1].ndim <= 1
        if not (is_pair or is_triple) or parts[-1].ndim:
            raise TypeError(f"observation {number} must be {forms}, got {observation!r}")
    except (TypeError, ValueError) as error:
        raise TypeError(f"observation {number} must be {forms}, got {observation!r}") from error
    for part in parts:
        if not part.size or not np.isfinite(part).all() or (part <= 0).any():
            raise ValueError(f"observation {number} must have positive numbers, got {observation!r}")
    if min(part.min() for part in parts) < _SMALLEST or max(part.max() for part in parts) > _LARGEST:
        raise ValueError(
            f"observation {number} must have numbers between {_SMALLEST:g} and {_LARGEST:g}, got {observation!r}"
        )
    width = parts[1] if is_triple else parts[0].max(keepdims=True)
    if parts[0].ndim and parts[0].max() > width.sum():
        raise ValueError(f"observation {number} must not have lengths above its width, got {observation!r}")
    return parts[0], np.atleast_1d(width), float(parts[-1])


def _padded_terms(rows: Floats, widths: Floats, tokens: npt.ArrayLike | None) -> dict[str, Any]:
    """The terms of batches by name: `[n]` each, from rows `[n]` and widths `[n, K]`."""
    width = widths.sum(1)
    return {
        "constant": np.ones(len(rows)),
        "row": rows,
        "width": width,
        "token": rows * width if tokens is None else np.asarray(tokens, np.float64),
        "padded_token": rows * width,
        "square": rows * (widths**2).sum(1),
    }


def _columns(widths: npt.ArrayLike) -> Floats:
    """Widths or lengths as float64 `[n, K]`."""
    values = np.asarray(widths, np.float64)
    return values[:, None] if values.ndim == 1 else values


def _check_variety(timed: _Timed, names: tuple[str, ...]) -> None:
    """Refuse steps that are all alike in what must vary.

    Raises:
        ValueError: One of the terms is the same in all.
    """
    varying = ("token",) if "width" not in names else ("row", "width")
    for name in varying:
        values = timed.terms[:, names.index(name)]
        if values.min() == values.max():
            raise ValueError(
                f"observations must differ in their {name}s, got {values[0]:g} in all: time steps with others too"
            )


def _check_limit(limit: Any) -> float:
    """A limit as a float.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not above 0, or not finite.
    """
    if isinstance(limit, (bool, str)) or np.ndim(limit):
        raise TypeError(f"limit must be a number of milliseconds, got {limit!r}")
    try:
        value = float(limit)
    except OverflowError:
        value = float("inf")
    if not 0 < value < float("inf"):
        raise ValueError(f"limit must be milliseconds above 0, got {limit}")
    return value


def _held_out_errors(timed: _Timed, typical: Floats) -> tuple[float, float]:
    """Median relative errors on shapes that were held out, of the fit and of one time for all.

    Args:
        timed: The observations.
        typical: Median time of each shape, `[shapes]`.
    """
    fold_of_shape = np.random.default_rng(0).permutation(len(typical)) % FOLDS
    errors = np.empty((3, len(typical)))
    firsts = np.unique(timed.shapes, return_index=True)[1]
    for fold in range(FOLDS):
        held = fold_of_shape == fold
        known = ~held[timed.shapes]
        terms, milliseconds = timed.terms[known], timed.milliseconds[known]
        predictions = [
            timed.terms[firsts[held]] @ _fit(terms, milliseconds),
            typical[~held].mean(),
            # The first term is the constant.
            _fit(terms[:, :1], milliseconds)[0],
        ]
        for row, predicted in zip(errors, predictions, strict=True):
            row[held] = np.abs(predicted / typical[held] - 1)
    of_fit, *of_constants = np.median(errors, axis=1).tolist()
    return of_fit, min(of_constants)


def _fit(terms: Floats, milliseconds: Floats) -> Floats:
    """Factors `[terms]` of zero or more, with the least sum of absolute relative errors.

    Args:
        terms: Of each observation, `[n, terms]`.
        milliseconds: Its time, `[n]`.
    """
    # Every observation in units of its own time, and every term in units of its largest value.
    relative = terms / milliseconds[:, None]
    scale = np.abs(relative).max(0)
    relative = relative / scale
    weights = np.ones(len(milliseconds))
    factors = np.zeros(terms.shape[1])
    for _ in range(ITERATIONS):
        before, factors = factors, _non_negative(relative, weights)
        if np.allclose(before, factors, rtol=1e-6, atol=0):
            break
        weights = 1 / np.maximum(np.abs(relative @ factors - 1), SMALLEST_ERROR)
    scaled: Floats = factors / scale
    return scaled


def _non_negative(relative: Floats, weights: Floats) -> Floats:
    """Factors of zero or more with the least weighted sum of squares of `relative @ factors - 1`.

    The best factors that are not zero are the plain solution of least squares for their own terms, so that one subset
    of the terms gives them. Of subsets that are equally good, the smallest is taken.

    Args:
        relative: Terms of each observation over its time, `[n, terms]`.
        weights: Of each observation, `[n]`.

    Returns:
        `[terms]`.
    """
    gram = relative.T @ (relative * weights[:, None])
    aim = relative.T @ weights
    best, best_gain = np.zeros(len(aim)), 0.0
    for size in range(1, len(aim) + 1):
        subsets = np.array(list(combinations(range(len(aim)), size)))
        grams = gram[subsets[:, :, None], subsets[:, None, :]]
        # Where terms depend on each other, a smaller subset is as good.
        eigenvalues = np.linalg.eigvalsh(grams)
        subsets, grams = (part[eigenvalues[:, 0] > 1e-12 * eigenvalues[:, -1]] for part in (subsets, grams))
        solutions = np.linalg.solve(grams, aim[subsets][:, :, None])[:, :, 0]
        gains = np.where((solutions >= 0).all(1), (aim[subsets] * solutions).sum(1), 0)
        if gains.max(initial=0) > best_gain * (1 + 1e-9):
            chosen = int(gains.argmax())
            best, best_gain = np.zeros(len(aim)), float(gains[chosen])
            best[subsets[chosen]] = solutions[chosen]
    return best
