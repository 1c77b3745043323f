"""PadCollator: a list of samples -> batches, every field in one row order."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Final, Literal, Protocol, Self, cast

import numpy as np
import torch
from torch import Tensor

from collate.batch import LengthTrackedBatch
from collate.errors import LengthError
from collate.lengths.permutation import row_order
from collate.lengths.validation import check_declared
from collate.operations.construct import padded_batch
from collate.operations.sendable import check_can_travel, check_structure_can_travel
from collate.padding.columns import (
    NUMBER_DTYPES,
    Column,
    are_numbers,
    declared_numbers,
    stack_numbers,
    stack_samples,
    take_rows,
    titled,
)
from collate.padding.options import check_max_length, check_shape_list, each_checked, field_widths, option_of
from collate.padding.padding_value import UNCHOSEN, check_padding_value, warn_of_labels
from collate.padding.rows import RaggedRows, measure_rows
from collate.padding.unread import UnreadRows, UnreadStack, finish_reading, read_unread
from collate.tensors.nested import assemble, columns_of
from collate.tensors.numpy_view import Int64Array
from collate.tensors.steps import PaddingValue
from collate.widths import AllowedWidths, PaddedShape, Widths, check_widths, padded_width

# Options that a `repr` leaves out.
_DEFAULTS: Final = {
    **dict.fromkeys(["sort_by", "widths", "shapes", "max_length", "length_field"]),
    "stack": (),
    "on_empty": "keep",
}


class PlansLengths(Protocol):
    """The options of a sampler by which lengths are planned."""

    @property
    def max_length(self) -> Any:
        """Steps that longer sequences are cut to; None cuts nothing."""

    @property
    def widths(self) -> Any:
        """What padded widths are rounded up to, as `padded_width` takes it."""


class PadCollator:
    """A `collate_fn` that pads variable-length fields and keeps their lengths; it can be pickled.

    Samples are tensors, arrays, tuples, named tuples or (nested) mappings, and the batch has the same structure. Its
    type alone decides what a field becomes: tensors, arrays and lists of numbers with an axis or more become a
    `LengthTrackedBatch`; fields named in `stack`, numbers and 0-d arrays become one tensor `[B, ...]`; everything else
    becomes a list. All fields come in one row order. No sample is ever dropped, no buffer used twice.

    A Python list has no dtype, so the values in a batch decide: where all lists are empty, they are taken for
    integers; a list of strings among them makes the field a list; lists of ints next to lists of floats are refused.
    Make arrays or tensors of what may be empty or mixed, and the type is the same in every batch.

    Fields are named by their keys or indices, nested ones by dotted paths (`"audio.frames"`, `"0"`); a sample that is
    a single tensor is the field `""`. Where an option is given per field, every variable-length field must be in it.

    Args:
        padding_value: What the padding holds, for all fields or per field (0 for tokens, -100 for labels). Without it a
            field called `labels` is padded with 0 too, and a warning says so.
        sort_by: The field whose lengths give the row order, longest first; None takes the first variable-length field,
            False keeps the order of the samples.
        stack: Fields of one fixed shape, to be stacked.
        widths: None, an int or the allowed widths, for all fields or per field; see `padded_width`.
        shapes: A sampler's closed list of (rows, width): a batch is filled with padding and empty rows to the smallest
            shape that holds it. A width may be a tuple, one for each variable-length field in order. Stacked fields are
            filled with zeros, lists with None.
        max_length: Sequences are cut to this many time steps, for all fields or per field.
        length_field: The field that declares another's length, as `{"tokens": "num_tokens"}`, or its name alone where
            only one field is variable-length. Declared lengths are compared with the real ones, before `max_length`.
        on_empty: `"keep"` empty samples, or raise an `"error"`.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option has an impossible value.

    Examples:
        >>> import torch
        >>> from collate import PadCollator
        >>> collate = PadCollator(padding_value={"tokens": 0, "tags": -100})
        >>> samples = [{"tokens": [7], "tags": [1], "id": "a"}, {"tokens": [8, 9], "tags": [2, 3], "id": "b"}]
        >>> batch = collate(samples)
        >>> batch["tags"].padded, batch["id"]
        (tensor([[   2,    3],
                [   1, -100]]), ['b', 'a'])
    """

    # Pickles of earlier releases do not have it.
    _is_padding_chosen = True

    def __init__(
        self,
        padding_value: PaddingValue | Mapping[str, PaddingValue] = UNCHOSEN,
        *,
        sort_by: str | Literal[False] | None = None,
        stack: Collection[str] = (),
        widths: Widths | Mapping[str, Widths] = None,
        shapes: Sequence[PaddedShape] | None = None,
        max_length: int | Mapping[str, int] | None = None,
        length_field: str | Mapping[str, str] | None = None,
        on_empty: Literal["keep", "error"] = "keep",
    ) -> None:
        if on_empty not in ("keep", "error"):
            raise ValueError(f"on_empty must be 'keep' or 'error', got {on_empty!r}")
        if isinstance(stack, str):
            raise TypeError(f"stack must be a collection of field names, got the string {stack!r}: write ({stack!r},)")
        if sort_by is not None and sort_by is not False and not isinstance(sort_by, str):
            raise TypeError(
                f"sort_by must be a field's name, None or False, got {sort_by!r}: None sorts by the first field, and "
                'tuples have the names "0", "1" and so on'
            )
        if shapes is not None and widths is not None:
            raise ValueError("shapes name the padded widths already: leave widths out")
        self._is_padding_chosen = padding_value is not UNCHOSEN
        self.padding_value = padding_value if self._is_padding_chosen else 0
        self.sort_by = sort_by
        self.stack = frozenset(stack)
        self.widths: AllowedWidths | Mapping[str, AllowedWidths] = each_checked(widths, check_widths)
        self.shapes = None if shapes is None else check_shape_list(shapes)
        self.max_length = each_checked(max_length, check_max_length)
        self.length_field = length_field
        self.on_empty = on_empty

    @classmethod
    def for_sampler(
        cls,
        sampler: PlansLengths,
        padding_value: PaddingValue | Mapping[str, PaddingValue] = UNCHOSEN,
        **options: Any,
    ) -> Self:
        """Make a collator that cuts and pads as a sampler has planned, so that batches keep to its budget.

        Args:
            sampler: Its `max_length` and `widths` are taken; each is None, or a value that the option of that name
                takes. If it has a method `acknowledge_max_length`, that is called: samples will be cut, and no warning
                is needed.
            padding_value: As in the class.
            **options: All others, as in the class; `shapes` stand for the sampler's `widths`.

        Raises:
            TypeError: The sampler lacks one of the two, or an option has the wrong type.
            ValueError: `max_length` or `widths` is given again, and differs; or an option has an impossible value.

        Examples:
            >>> from types import SimpleNamespace
            >>> sampler = SimpleNamespace(max_length=4, widths=8)
            >>> PadCollator.for_sampler(sampler)([[1] * 9, [2]]).padded.shape, sampler.max_length
            (torch.Size([2, 8]), 4)
        """
        missing = [name for name in ("max_length", "widths") if not hasattr(sampler, name)]
        if missing:
            way_out = "give a length-bucketing sampler, or make the collator with PadCollator(...)"
            if (capacity := getattr(sampler, "capacity", None)) is not None:
                way_out = f"collate its rows of {capacity!r} steps with VarlenCollator.for_sampler(sampler)"
            raise TypeError(f"a {type(sampler).__name__} has no {' and no '.join(missing)}: {way_out}")
        planned = {"max_length": sampler.max_length, "widths": sampler.widths}
        if options.get("shapes") is not None:
            # They are the sampler's widths already.
            del planned["widths"]
        collate = cls(padding_value, **(options | planned))
        # Compared as the class stores them: widths [8, 16] and (16, 8) are the same.
        for name in planned.keys() & options.keys():
            again = getattr(cls(padding_value, **{name: options[name]}), name)
            if again != getattr(collate, name):
                raise ValueError(
                    f"{name}={options[name]!r} differs from the sampler's {planned[name]!r}, by which batches are "
                    "planned: leave it out, or give it to the sampler"
                )
        if hasattr(sampler, "acknowledge_max_length"):
            sampler.acknowledge_max_length()
        return collate

    def __repr__(self) -> str:
        options = {name: getattr(self, name) for name in ("padding_value", *_DEFAULTS)}
        options["stack"] = tuple(sorted(self.stack))
        given = [f"{name}={value!r}" for name, value in options.items() if value != _DEFAULTS.get(name, _DEFAULTS)]
        return f"{type(self).__name__}({', '.join(given)})"

    def __call__(self, samples: Sequence[object]) -> Any:
        """Collate B >= 1 samples of one structure; see the class for what becomes of each field.

        Raises:
            LengthError: There is no sample, a declared length is not the real one, a sample is empty though
                `on_empty="error"`, or a row is longer than every allowed width or shape.
            TypeError: Samples differ in structure or dtype; or a field cannot be sent from a worker.
            ValueError: Feature shapes differ, or an option names no field of these samples.
        """
        columns = self.read(samples)
        rows = {name: column for name, column in columns.items() if isinstance(column, RaggedRows)}
        # One order for all fields, from the lengths of one: see `row_order` for an example with two.
        order = self._order(rows, len(samples))
        shape = self._shapes_of(rows, len(samples))
        fields = {name: self._field(name, column, order, shape) for name, column in columns.items()}
        return fields if finish_reading(columns) else assemble(samples[0], fields)

    def read(self, samples: Sequence[object]) -> dict[str, Column]:
        """Take samples apart into fields, checked and cut: what all collators share.

        Returns:
            For each field its `RaggedRows` where it is variable-length, else a tensor `[B, ...]` or a list, in source
            order. For samples that a dataset has not read yet, `UnreadRows` and `UnreadStack`, until `finish_reading`.

        Raises:
            LengthError: There is no sample, a declared length is not the real one, or a sample is empty though
                `on_empty="error"`.
            TypeError: As a call does.
            ValueError: As a call does.
        """
        if len(samples) == 0:
            raise LengthError("cannot collate an empty list of samples: the sampler gave a batch without indices")
        if (unread := self._read_unread(samples)) is not None:
            return unread
        columns = columns_of(samples)
        read = {name: self._read(name, values) for name, values in columns.items()}
        variable = {name: column for name, column in read.items() if isinstance(column, RaggedRows)}
        self._check_names(columns, variable)
        # Before rows are cut: a declared length is that of the whole sequence.
        self._check_lengths(variable, read, samples)
        check_structure_can_travel(samples[0], columns)
        return read | {name: self._cut(name, column) for name, column in variable.items()}

    def _read_unread(self, samples: Sequence[object]) -> dict[str, Column] | None:
        """The fields of samples that are not read yet; None where they must be read one by one."""
        columns = None if self.length_field is not None else read_unread(samples, self.stack)
        if columns is None:
            return None
        variable = {name: column for name, column in columns.items() if isinstance(column, UnreadRows)}
        self._check_names(columns, variable)
        self._check_lengths(variable, {}, samples)
        # A row is cut only after its checksum is compared, and that is one of all its steps.
        is_cut = any(self._cut(name, rows) is not rows for name, rows in variable.items())
        return None if is_cut else cast("dict[str, Column]", columns)

    def padding_value_of(self, name: str, rows: RaggedRows) -> PaddingValue:
        """What the padding of a field holds.

        Raises:
            ValueError: Its dtype cannot hold it.
        """
        value = cast(PaddingValue, option_of(self.padding_value, name))
        try:
            return check_padding_value(value, rows.dtype)
        except ValueError as error:
            raise ValueError(f"{titled(name)}: {error}") from None

    def _read(self, name: str, values: list[object]) -> Column:
        """A field's values as rows, a stacked tensor or a list, by their types alone.

        Raises:
            TypeError: Tensors or arrays are mixed with other types.
        """
        if name in self.stack:
            return stack_samples(name, values)
        kinds = set(map(type, values))
        if kinds <= NUMBER_DTYPES.keys():
            return stack_numbers(name, values, kinds)
        # By type and number of axes only, never by length: a field whose rows happen to be equally long stays variable.
        if all(issubclass(kind, (Tensor, np.ndarray, np.generic)) for kind in kinds):
            has_axis = cast("Tensor", values[0]).ndim > 0
            return measure_rows(values, titled(name), kinds) if has_axis else stack_samples(name, values)
        if kinds == {list} and are_numbers(cast("list[list[object]]", values)):
            return measure_rows(values, titled(name))
        if any(issubclass(kind, (Tensor, np.ndarray, np.generic)) for kind in kinds):
            raise TypeError(f"{titled(name)} must be of one kind, got {sorted(kind.__name__ for kind in kinds)}")
        check_can_travel(name, values)
        return values

    def _check_names(self, columns: Collection[str], variable: Mapping[str, object]) -> None:
        """Refuse an option that names a field which the samples do not have: it would have no effect.

        Raises:
            ValueError: An option names such a field, or lacks one.
        """
        if isinstance(self.sort_by, str) and self.sort_by not in variable:
            raise ValueError(f"sort_by names {self.sort_by!r}, the variable-length fields are {sorted(variable)}")
        if self.stack and not self.stack <= set(columns):
            raise ValueError(f"stack names {sorted(self.stack - set(columns))}, the fields are {sorted(columns)}")
        for option in ("padding_value", "widths", "max_length"):
            value = getattr(self, option)
            # To ask whether a number is a mapping takes as long as all other checks.
            if value is None or type(value) is int:
                continue
            if isinstance(value, Mapping) and set(value) != variable.keys():
                raise ValueError(
                    f"{option} is given for {sorted(value)}, the variable-length fields are {sorted(variable)}: "
                    "name each of them"
                )

    def _check_lengths(
        self, variable: Mapping[str, RaggedRows], read: Mapping[str, Column], samples: Sequence[object]
    ) -> None:
        """Check declared lengths and empty samples, before rows are cut.

        Raises:
            LengthError: A declared length is not the real one, or a sample is empty and must not be.
            ValueError: There is no such field.
        """
        for name, declared in self._declared(variable).items():
            if name not in variable or declared not in read:
                raise ValueError(f"length_field says that {declared!r} is the length of {name!r}: no such field")
            numbers = declared_numbers(read[declared], titled(name))
            check_declared(numbers, variable[name].lengths, titled(name), _sample_keys(samples))
        if self.on_empty == "error":
            for name, rows in variable.items():
                if not rows.lengths.all():
                    index = int(np.flatnonzero(rows.lengths == 0)[0])
                    raise LengthError(
                        f"{titled(name)}: sample {index} is empty: leave it out with min_length=1 in the sampler, or "
                        'allow it with on_empty="keep"'
                    )

    def _declared(self, variable: Mapping[str, RaggedRows]) -> Mapping[str, str]:
        """The length field of each variable-length field that has one.

        Raises:
            ValueError: One name is given for several variable-length fields.
        """
        if self.length_field is None or isinstance(self.length_field, Mapping):
            return self.length_field or {}
        if len(variable) != 1:
            raise ValueError(
                f"length_field={self.length_field!r} could be the length of any of {sorted(variable)}: "
                "give a mapping from field to length field"
            )
        return {next(iter(variable)): self.length_field}

    def _cut(self, name: str, rows: RaggedRows) -> RaggedRows:
        """Rows cut to `max_length`."""
        limit = option_of(self.max_length, name)
        return rows if limit is None else rows.clipped(limit)

    def _order(self, rows: Mapping[str, RaggedRows], size: int) -> Int64Array:
        """The order of all fields' rows: int64 `[B]`."""
        if self.sort_by is False or not rows:
            return np.arange(size)
        by = next(iter(rows)) if self.sort_by is None else self.sort_by
        return row_order(rows[by].lengths, "longest")

    def _shapes_of(self, rows: Mapping[str, RaggedRows], size: int) -> tuple[int, dict[str, int]]:
        """The rows of the batch, and the width of each variable-length field.

        Raises:
            LengthError: No shape holds the batch.
        """
        longest = {name: int(column.lengths.max()) for name, column in rows.items()}
        if self.shapes is None:
            return size, {name: padded_width(limit, option_of(self.widths, name)) for name, limit in longest.items()}
        # Smallest first, see `check_shape_list`.
        for shape in self.shapes:
            widths = field_widths(shape, list(longest))
            if shape[0] >= size and all(widths[name] >= limit for name, limit in longest.items()):
                return shape[0], widths
        raise LengthError(
            f"no shape holds {size} rows of {longest} steps, the largest are {self.shapes[-3:]}: "
            "collate with the shapes of the sampler that made the batch"
        )

    def _field(
        self,
        name: str,
        column: Column,
        order: Int64Array,
        shape: tuple[int, dict[str, int]],
    ) -> object:
        """A field in row order, padded or filled to the rows of the shape.

        Raises:
            ValueError: The dtype cannot hold the padding value.
        """
        rows, widths = shape
        missing = rows - len(order)
        if isinstance(column, RaggedRows):
            value = self.padding_value_of(name, column)
            if not self._is_padding_chosen and name.rpartition(".")[2] == "labels":
                warn_of_labels(name, column, widths[name])
            return padded_batch(LengthTrackedBatch, column, order, shape=(rows, widths[name]), padding_value=value)
        if isinstance(column, UnreadStack):
            return column.stack(order, rows)
        if isinstance(column, Tensor):
            column = take_rows(column, order)
            return torch.cat([column, column.new_zeros(missing, *column.shape[1:])]) if missing else column
        # A list has no dtype whose zero could fill it.
        return [column[index] for index in order.tolist()] + [None] * missing


def _sample_keys(samples: Sequence[object]) -> list[object]:
    """The samples' keys, where they have any (webdataset's `__key__`), for errors to name."""
    return [sample.get("__key__") if isinstance(sample, Mapping) else None for sample in samples]
