"""Mixture: several sources and the shares that they have in training."""

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from types import MappingProxyType
from typing import Any, Final, Literal, TypeAlias, get_args

import numpy as np

from collate.errors import LengthError
from collate.widths import check_count
from samplers.planning.budget import Floats, Integers
from samplers.planning.mixtures.dataset import JoinedDataset
from samplers.planning.sorting import Lengths, as_length_array

Unit: TypeAlias = Literal["tokens", "samples", "padded"]
"""What the shares of a mixture count: real time steps, samples, or padded time steps."""
Within: TypeAlias = Literal["batch", "sample"]
"""Whether a batch has samples of one source, or samples of several."""
Stop: TypeAlias = Literal["shortest", "longest"] | int
"""When an epoch ends: after the first source, after the last one, or after this many steps."""

# Shares are rounded to this many parts, so that they are the same on every machine.
SHARE_PARTS: Final = 1 << 40


class Mixture:
    """Several sources in place of `lengths`: their names, their lengths, and the share of each in training.

    A batch sampler that is given one plans all of them together. Shares are exact: however many sources there are, no
    part of the training from its start on has more than a step more or less of a source than its share. Sources are
    read in *passes*: no sample comes a second time before all of its source have come, and each pass has a shuffle of
    its own. An epoch ends as `stop` says, and the next one continues each source where it stood.

    Sample indices count through all sources in the order of the mapping: the first sample of the second source follows
    the last of the first, as in the dataset that `concat` makes.

    Args:
        sources: Lengths of each source by its name, in time steps: integers `[N]`, or `[N, K]` for samples of K fields;
            a list, an array, a memory map, or an index.
        weights: Weight of each source by its name, at least 0; they are divided by their sum. A source of weight 0 is
            not read. None (default) takes the units of each source: then all sources have as many passes.
        unit: What shares count: `"tokens"` (default; real time steps over all fields), `"samples"`, or `"padded"`
            (padded time steps; the steps of rows, where documents are packed).
        temperature: Weights are raised to the power 1 / `temperature`: 1 or None (default) leaves them, larger ones
            make them more even, and `math.inf` equal.
        passes: By name, the passes of a source in an epoch at most, at least 1.
        stop: When an epoch ends. `"shortest"` (default): when the first source has had all of its passes; those that
            `passes` does not name have one. `"longest"`: when all sources have been through at least once. A number:
            after this many steps; a sampler takes it times its replicas as the batches of every epoch, which stay as
            many when other replicas resume.
        within: `"batch"` (default): the samples of a batch are of one source. `"sample"`: of several, where their
            lengths are alike, or where documents of several fit in a row; for one field, and for padded tokens.

    Attributes:
        names: The names of the sources.
        sizes: Samples of each source, int64 `[sources]`.
        starts: Sample index at which each source begins, int64 `[sources]`.

    Raises:
        TypeError: The sources are not a mapping of names, or an option has the wrong type.
        LengthError: A length is negative; the message names the source.
        ValueError: There is no source, a weight is negative, NaN or infinite, names a source that is not there or is
            missing, all weights are 0, or an option is out of its range.

    Examples:
        >>> mixture = Mixture({"web": [5, 3, 4, 4], "books": [9, 8]}, weights={"web": 3, "books": 1})
        >>> mixture
        Mixture(web=4 samples, books=2 samples, weights={'web': 3.0, 'books': 1.0})
        >>> mixture.locate([0, 5])
        [('web', 0), ('books', 1)]
    """

    def __init__(
        self,
        sources: Mapping[str, Lengths],
        *,
        weights: Mapping[str, float] | None = None,
        unit: Unit = "tokens",
        temperature: float | None = None,
        passes: Mapping[str, float] | None = None,
        stop: Stop = "shortest",
        within: Within = "batch",
    ) -> None:
        self._sources = _check_sources(sources)
        self.names = tuple(self._sources)
        self.weights = None if weights is None else MappingProxyType(_check_weights(weights, self.names))
        self.unit = _check_choice("unit", unit, get_args(Unit))
        self.within = _check_choice("within", within, get_args(Within))
        self.temperature = _check_temperature(temperature)
        self.passes = MappingProxyType(_check_passes(passes, self.names))
        self.stop = _check_stop(stop)
        self.sizes: Integers = np.array([len(as_length_view(lengths)) for lengths in self._sources.values()])
        self.starts: Integers = np.cumsum(self.sizes) - self.sizes

    def __repr__(self) -> str:
        counts = [f"{name}={size} samples" for name, size in zip(self.names, self.sizes.tolist(), strict=True)]
        options: dict[str, Any] = {
            "weights": None if self.weights is None else dict(self.weights),
            "unit": None if self.unit == "tokens" else self.unit,
            "temperature": self.temperature,
            "passes": dict(self.passes) or None,
            "stop": None if self.stop == "shortest" else self.stop,
            "within": None if self.within == "batch" else self.within,
        }
        given = [f"{name}={value!r}" for name, value in options.items() if value is not None]
        return f"{type(self).__name__}({', '.join(counts + given)})"

    def __getstate__(self) -> dict[str, Any]:
        proxies = {name: dict(value) for name, value in self.__dict__.items() if isinstance(value, MappingProxyType)}
        return {**self.__dict__, **proxies}

    @property
    def sources(self) -> Mapping[str, Lengths]:
        """The lengths of each source, as given."""
        return MappingProxyType(self._sources)

    @property
    def size(self) -> int:
        """Samples of all sources."""
        return int(self.sizes.sum())

    def locate(self, sample_indices: Sequence[int]) -> list[tuple[str, int]]:
        """The source of each sample, and its index there.

        Raises:
            TypeError: An index is not an int, or there is no list of them.
            IndexError: An index is out of range.
        """
        indices = np.asarray(sample_indices)
        if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
            raise TypeError(f"sample indices must be a list of ints, got {sample_indices!r}")
        indices = indices.astype(np.int64)
        outside = (indices < 0) | (indices >= self.size)
        if outside.any():
            raise IndexError(f"sample indices must be in range({self.size}), got {indices[outside][0]}")
        numbers = np.searchsorted(self.starts, indices, side="right") - 1
        local = (indices - self.starts[numbers]).tolist()
        return [(self.names[number], index) for number, index in zip(numbers.tolist(), local, strict=True)]

    def concat(self, datasets: Mapping[str, Any]) -> JoinedDataset:
        """The map-style datasets of all sources as one, by the sample indices of the plan; nothing is copied.

        Args:
            datasets: The dataset of each source by its name, with `__getitem__` and `__len__`; if it has
                `__getitems__`, a batch is read with one call for each source.

        Raises:
            TypeError: They are not a mapping, or one has no length.
            ValueError: One is missing, is of no source, or has another number of samples than its lengths.
        """
        if not isinstance(datasets, Mapping):
            raise TypeError(f"datasets must be a mapping of names, got {type(datasets).__name__}")
        _check_names("datasets", datasets, self.names, complete=True)
        joined = JoinedDataset([datasets[name] for name in self.names])
        for name, planned, size in zip(self.names, self.sizes.tolist(), joined.sizes.tolist(), strict=True):
            if planned != size:
                raise ValueError(
                    f"datasets must have the samples whose lengths are planned, got {size} of source {name!r} for "
                    f"{planned} lengths: give the dataset that was measured"
                )
        return joined

    def shares_of(self, units: Sequence[int]) -> Floats:
        """The share of each source, where they have these many units: float64 `[sources]`; the sum is 1."""
        values = list(map(float, units)) if self.weights is None else [self.weights[name] for name in self.names]
        # Of the largest, so that neither their sum nor a power of them is above what a float holds.
        largest, is_read = max(values), np.array(values) > 0
        values = [value / largest for value in values]
        if self.temperature is not None:
            values = [value ** (1 / self.temperature) if value else 0.0 for value in values]
        parts = np.array([round(value / math.fsum(values) * SHARE_PARTS) for value in values], np.float64)
        # A weight is never rounded to none.
        parts[(parts == 0) & is_read] = 1
        shares: Floats = parts / parts.sum()
        return shares


def as_length_view(lengths: Lengths) -> Any:
    """Something of as many entries as a source has samples."""
    return getattr(lengths, "lengths", lengths)


def _check_sources(sources: Mapping[str, Lengths]) -> dict[str, Lengths]:
    """Check that sources are lengths by name.

    Raises:
        TypeError: They are not, or lengths are not integers.
        ValueError: There is none, or lengths have the wrong shape.
        LengthError: A length is negative.
    """
    if not isinstance(sources, Mapping):
        raise TypeError(f"sources must be a mapping of names to lengths, got {type(sources).__name__}")
    if not sources:
        raise ValueError("sources must have at least one source, got none")
    checked: dict[str, Lengths] = {}
    for name, lengths in sources.items():
        if not isinstance(name, str) or not name:
            raise TypeError(f"names of sources must be texts, got {name!r}")
        with named_errors(name):
            # An index is kept, for its fingerprint and its order.
            checked[name] = lengths if hasattr(lengths, "fingerprint") else as_length_array(lengths)
    fields = {name: _count_fields(lengths) for name, lengths in checked.items()}
    if len(set(fields.values())) > 1:
        raise ValueError(f"sources must have equally many fields, got {fields}")
    return checked


def _count_fields(lengths: Any) -> int:
    shape = np.shape(as_length_view(lengths))
    return int(shape[1]) if len(shape) > 1 else 1


class named_errors:  # noqa: N801
    """A context that puts the name of a source before the messages of its errors.

    Args:
        name: Of the source.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if type(error) in {TypeError, ValueError, LengthError}:
            raise type(error)(f"source {self._name!r}: {error}") from error  # type: ignore[misc]


def _check_names(option: str, given: Mapping[str, Any], names: Sequence[str], *, complete: bool) -> None:
    """Check that the keys of an option are names of sources, or all of them.

    Raises:
        ValueError: They are not.
    """
    unknown = [name for name in given if name not in names]
    if unknown:
        raise ValueError(f"{option} must be of sources, got {unknown}: the sources are {list(names)}")
    missing = [name for name in names if name not in given]
    if complete and missing:
        raise ValueError(f"{option} must be given for every source, got none for {missing}")


def _check_weights(weights: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Check the weights.

    Raises:
        TypeError: They are not a mapping, or one is not a number.
        ValueError: One is negative or not finite, is of no source or missing, or all are 0.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights must be a mapping of names to numbers, got {type(weights).__name__}")
    _check_names("weights", weights, names, complete=True)
    for name in names:
        value = _check_number(f"weights[{name!r}]", weights[name])
        if not 0 <= value < math.inf:
            raise ValueError(f"weights[{name!r}] must be a finite number of at least 0, got {weights[name]}")
    if not any(weights[name] for name in names):
        raise ValueError(f"weights must have one above 0, got {dict(weights)}")
    return {name: float(weights[name]) for name in names}


def _check_passes(passes: Mapping[str, float] | None, names: Sequence[str]) -> dict[str, float]:
    """Check the bounds of passes.

    Raises:
        TypeError: They are not a mapping, or one is not a number.
        ValueError: One is below 1 or NaN, or of no source.
    """
    if passes is None:
        return {}
    if not isinstance(passes, Mapping):
        raise TypeError(f"passes must be a mapping of names to numbers, got {type(passes).__name__}")
    _check_names("passes", passes, names, complete=False)
    for name, most in passes.items():
        if not 1 <= _check_number(f"passes[{name!r}]", most) < math.inf:
            raise ValueError(f"passes[{name!r}] must be a finite number of at least 1, got {most}")
    return {name: float(most) for name, most in passes.items()}


def _check_temperature(temperature: float | None) -> float | None:
    """Check the temperature.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not above 0.
    """
    if temperature is None:
        return None
    checked = _check_number("temperature", temperature)
    if not checked > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}: 1 leaves the weights as they are")
    return checked


def _check_number(name: str, value: object) -> float:
    """A real number as a float.

    Raises:
        TypeError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, (Real, np.number)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> Any:
    """Check an option of few texts.

    Raises:
        ValueError: It is none of them.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def _check_stop(stop: Any) -> Stop:
    """Check when an epoch ends.

    Raises:
        TypeError: It is neither a text nor an int.
        ValueError: It is an unknown text, or below 1.
    """
    if isinstance(stop, str):
        if stop not in {"shortest", "longest"}:
            raise ValueError(f"stop must be 'shortest', 'longest' or a number of steps, got {stop!r}")
        return stop  # type: ignore[return-value]
    return check_count("stop", stop, least=1, hint="give 'shortest', 'longest' or the steps of an epoch")
