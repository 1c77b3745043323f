"""VarlenCollator: a list of samples -> rows that hold several of them, every field in the same rows."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Literal, Self

import numpy as np
from torch import Tensor

from collate.collator import PadCollator
from collate.errors import LengthError
from collate.padding.columns import take_rows, titled
from collate.padding.options import option_of
from collate.padding.rows import RaggedRows
from collate.padding.unread import UnreadStack, finish_reading
from collate.tensors.nested import assemble
from collate.tensors.steps import PaddingValue
from collate.varlen.batch import VarlenBatch
from collate.varlen.construct import trusted_documents
from collate.varlen.offsets import aligned_lengths
from collate.varlen.planned import PlansRows, planned_options
from collate.varlen.rows import Arrange, DocumentOrder, RowOptions
from collate.varlen.values_of_rows import join_documents, make_spans


class VarlenCollator:
    """A `collate_fn` that puts several samples into each row, without padding between them; it can be pickled.

    Samples are what `PadCollator` takes, and the batch has their structure: a field that is variable-length becomes a
    `VarlenBatch`, fields named in `stack`, numbers and 0-d arrays a tensor `[N, ...]`, everything else a list. All
    fields come in one order, the order of documents in the rows, and a sample is in the same row in every field: the
    two sides of a pair, such as `{"chosen": ..., "rejected": ...}`, stay together. Fields of equal lengths have equal
    offsets, made once; a field with other lengths has offsets of its own. No sample is ever dropped or cut without
    `max_length`.

    With `capacity` and `rows`, `max_documents` and one dtype, all batches of a run have one shape, and a compiled
    model is compiled once.

    Args:
        padding_value: what gaps hold, for all fields or per field (0 for tokens, -100 for labels).
        capacity: steps of a row, for all fields or per field; None puts all samples into one row that is as long as
            they take, the padding-free form.
        rows: rows of every batch, filled up with empty ones; None is as few as hold the samples.
        align: documents start at multiples of it: 1, 8, or twice the size of a context-parallel group. The capacity
            must be one.
        max_documents: documents that a row may have, which fixes the number of slots of `cu_seqlens`.
        max_seqlen: a bound of all lengths that kernels are told, the same for a run; None is the capacity.
        arrange: `"best-fit"` packs the list into as few rows as best fit finds, documents in a row in source order.
            `"given"` cuts the list in its order, each row taking as many documents as capacity and `max_documents`
            allow, which keeps rows that a packing sampler has planned.
        stack: fields of one fixed shape, to be stacked.
        max_length: sequences are cut to that many steps, for all fields or per field.
        length_field: the field that declares another's length, checked against the real one, as in `PadCollator`.
        on_empty: `"keep"` empty samples as documents without steps, or raise an `"error"`.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option has an impossible value.

    Examples:
        >>> from collate import VarlenCollator
        >>> collate = VarlenCollator({"tokens": 0, "tags": -100}, capacity=4)
        >>> one = {"tokens": [7], "tags": [1], "id": "a"}
        >>> samples = [one, {"tokens": [8, 9, 7, 6], "tags": [2, 3, 4, 5], "id": "b"}]
        >>> batch = collate(samples)
        >>> batch["tags"].values, batch["id"]
        (tensor([[   2,    3,    4,    5],
                [   1, -100, -100, -100]]), ['b', 'a'])
    """

    def __init__(
        self,
        padding_value: PaddingValue | Mapping[str, PaddingValue] = 0,
        *,
        capacity: int | Mapping[str, int] | None = None,
        rows: int | None = None,
        align: int = 1,
        max_documents: int | None = None,
        max_seqlen: int | None = None,
        arrange: Arrange = "best-fit",
        stack: Collection[str] = (),
        max_length: int | Mapping[str, int] | None = None,
        length_field: str | Mapping[str, str] | None = None,
        on_empty: Literal["keep", "error"] = "keep",
    ) -> None:
        self.capacity = dict(capacity) if isinstance(capacity, Mapping) else capacity
        capacities = self.capacity.values() if isinstance(self.capacity, dict) else [self.capacity]
        if not capacities:
            raise ValueError("capacity names no field: name each variable-length field, or give one number for all")
        options = RowOptions(None, rows, align, max_documents, max_seqlen, arrange)
        self.each = {steps: replace(options, capacity=steps).checked() for steps in capacities}
        self.options = replace(next(iter(self.each.values())), capacity=None)
        self.fields = PadCollator(
            padding_value,
            sort_by=False,
            stack=stack,
            max_length=max_length,
            length_field=length_field,
            on_empty=on_empty,
        )

    @classmethod
    def for_sampler(
        cls, sampler: PlansRows, padding_value: PaddingValue | Mapping[str, PaddingValue] = 0, **options: Any
    ) -> Self:
        """Make a collator that cuts the batches of a packing sampler into the planned rows.

        Args:
            sampler: A packing sampler, a `PackingNode` or the stage of `pack_by_length`. Its `capacity`,
                `max_documents`, `multiple` and `max_length` are taken.
            padding_value: As in the class.
            **options: All others, as in the class. If several fields have different capacities, `capacity` names them.

        Raises:
            TypeError: The sampler plans no rows, or an option has the wrong type.
            ValueError: An option of the sampler is given again, and differs; it is missing for a field; the sampler has
                `max_cost` and several rows in a batch; or an option has an impossible value.

        Examples:
            >>> from types import SimpleNamespace
            >>> VarlenCollator.for_sampler(SimpleNamespace(capacity=8, max_documents=3, multiple=2))
            VarlenCollator(capacity=8, align=2, max_documents=3, arrange='given', PadCollator(padding_value=0, \
sort_by=False))
        """
        return cls(padding_value, **planned_options(sampler, options))

    def __repr__(self) -> str:
        options = "".join(
            f", {each.name}={getattr(self.options, each.name)!r}"
            for each in fields(self.options)
            if each.name != "capacity" and getattr(self.options, each.name) != each.default
        )
        return f"{type(self).__name__}(capacity={self.capacity!r}{options}, {self.fields!r})"

    @property
    def align(self) -> int:
        """Documents start at multiples of it."""
        return self.options.align

    @property
    def max_documents(self) -> int | None:
        """Documents that a row may have; None is any number."""
        return self.options.max_documents

    @property
    def rows(self) -> int | None:
        """Rows of every batch, filled up with empty ones; None is as few as hold the samples."""
        return self.options.rows

    @property
    def arrange(self) -> Arrange:
        """How samples are put into rows."""
        return self.options.arrange

    @property
    def max_length(self) -> int | Mapping[str, int | None] | None:
        """Steps that sequences are cut to, for all fields or per field; None cuts nothing."""
        return self.fields.max_length

    def __call__(self, samples: Sequence[object]) -> Any:
        """Collate N >= 1 samples of one structure; see the class for what becomes of each field.

        Raises:
            LengthError: There is no sample, a declared length is not the real one, a sample is empty though
                `on_empty="error"`, a sample is longer than a row, or the samples take more than `rows` rows.
            TypeError: Samples differ in structure or dtype; or a field cannot travel from a worker.
            ValueError: Feature shapes differ, or an option names no field of these samples.
        """
        columns = self.fields.read(samples)
        documents = {name: column for name, column in columns.items() if isinstance(column, RaggedRows)}
        if type(self.capacity) is dict and self.capacity.keys() != documents.keys():
            raise ValueError(
                f"capacity is given for {sorted(self.capacity)}, the variable-length fields are {sorted(documents)}: "
                "name each of them"
            )
        order = self._order(documents, len(samples))
        batches: list[VarlenBatch] = []
        fields = {name: self._field(name, column, order, batches) for name, column in columns.items()}
        return fields if finish_reading(columns) else assemble(samples[0], fields)

    def _order(self, documents: Mapping[str, RaggedRows], size: int) -> DocumentOrder:
        """Put samples into rows, in which they are to fit in all of their fields."""
        if not documents:
            return np.arange(size), np.array([size])
        if self.capacity is None:
            return self.options.fill([0] * size, "samples")
        for name, rows in documents.items():
            self._check_longest(name, rows, option_of(self.capacity, name))
        sizes = [aligned_lengths(rows.lengths, self.options.align) for rows in documents.values()]
        capacities = [option_of(self.capacity, name) for name in documents]
        # Fields of equal lengths, such as tokens and labels, are one size.
        first = sizes[0]
        if all(steps == capacities[0] for steps in capacities) and all(np.array_equal(first, s) for s in sizes[1:]):
            return self.each[capacities[0]].fill(first.tolist(), titled(next(iter(documents))))
        return self.options.fill_fields(np.stack(sizes, axis=1), np.array(capacities))

    def _check_longest(self, name: str, rows: RaggedRows, capacity: int | None) -> None:
        # For the few integers of a batch, Python's own functions take a fifth of the time of NumPy's.
        longest = max(rows.lengths.tolist())
        for option, limit in (("capacity", capacity), ("max_seqlen", self.options.max_seqlen)):
            if limit is not None and longest > limit:
                raise LengthError(
                    f"{titled(name)}: sample {int(rows.lengths.argmax())} has {longest} steps, {option} is {limit}: "
                    f"cut with max_length, leave it out in the sampler, or raise {option}"
                )

    def _field(
        self, name: str, column: Any, order: DocumentOrder, batches: list[VarlenBatch]
    ) -> VarlenBatch | Tensor | list[Any]:
        indices, per_row = order
        if isinstance(column, UnreadStack):
            return column.stack(indices, len(indices))
        if isinstance(column, Tensor):
            return take_rows(column, indices)
        if not isinstance(column, RaggedRows):
            return [column[index] for index in indices.tolist()]
        value = self.fields.padding_value_of(name, column)
        options = self.each[option_of(self.capacity, name)]
        lengths = column.lengths if self.capacity is None else column.lengths[indices]
        # Fields of equal lengths share all that is made of them.
        for batch in batches:
            if options.capacity in {None, batch.spans.capacity} and np.array_equal(batch.host_lengths(), lengths):
                values = join_documents(column, batch.spans, value)
                return trusted_documents(VarlenBatch, values, batch.spans, batch.offsets, padding_value=value)
        spans = make_spans(lengths, per_row, indices, options)
        batches.append(trusted_documents(VarlenBatch, join_documents(column, spans, value), spans, padding_value=value))
        return batches[-1]
