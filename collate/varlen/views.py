"""What a varlen batch shows of its documents: offsets, masks, ids, and what losses and recurrent modules read."""

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from collate.packing import PackingMap
from collate.tensors.graphs import outside_graphs
from collate.tensors.numpy_view import Int64Array
from collate.tensors.steps import flat_index, gather_steps
from collate.tensors.to_device import refuse_capture, to_device
from collate.varlen.offsets import CU_SEQLENS, CU_SEQLENS_PADDED, CU_SEQLENS_REAL, DOCUMENT, document_slots
from collate.varlen.segment_sums import sum_segments
from collate.varlen.spans import DocumentSpans, Offsets


class DocumentViews:
    """Read-only views of a `VarlenBatch`."""

    values: Tensor
    spans: DocumentSpans
    offsets: Offsets
    ignore_index: int | None
    is_varlen: ClassVar[bool] = True

    def __len__(self) -> int:
        return self.spans.tensor("lengths").shape[0]

    @property
    def device(self) -> torch.device:
        """Where the values are; lengths, documents per row and permutation are on the host."""
        return self.values.device

    @property
    def lengths(self) -> Tensor:
        """Real steps of each document, int64 `[N]` on the host, in row order."""
        return self.spans.tensor("lengths")

    @property
    def documents_per_row(self) -> Tensor:
        """How many documents each row has, int64 `[R]` on the host."""
        return self.spans.tensor("documents_per_row")

    @property
    def permutation(self) -> Tensor:
        """The sample that each document was, int64 `[N]` on the host."""
        return self.spans.tensor("permutation")

    @property
    def align(self) -> int:
        """Documents start at multiples of it."""
        return self.spans.align

    @property
    def max_documents(self) -> int | None:
        """Documents that a row may have; None where slots are as many as this batch needs."""
        return self.spans.max_documents

    @property
    def mask(self) -> Tensor:
        """Real steps: bool `[R, C]` on the values' device."""
        return self.offsets.spread()[0]

    @property
    def document_ids(self) -> Tensor:
        """The document of each step, counted through all rows, -1 in gaps: int32 `[R, C]` on the values' device."""
        return self.offsets.spread()[1]

    @property
    def position_ids(self) -> Tensor:
        """Each step's position in its document, 0 in gaps: int64 `[R, C]` on the values' device."""
        return self.offsets.spread()[2]

    @property
    def cu_seqlens(self) -> Tensor:
        """Bounds of all segments, documents and gaps, over `[0, R * C]`: int32 `[slots + 1]` on the values' device."""
        return self.offsets.cu_seqlens()

    @property
    def cu_seqlens_padded(self) -> Tensor:
        """Bounds of documents with the gap that alignment leaves, and of the ends of rows: int32 `[slots + 1]`.

        Together with `cu_seqlens_real`, the form of kernels that take padded offsets apart from real ones.
        """
        return self.offsets.cu_seqlens(CU_SEQLENS_PADDED)

    @property
    def cu_seqlens_real(self) -> Tensor:
        """Real steps before each segment of `cu_seqlens_padded`: int32 `[slots + 1]`."""
        return self.offsets.cu_seqlens(CU_SEQLENS_REAL)

    @property
    def max_seqlen(self) -> int:
        """A bound of all lengths, a host integer that stays the same for a run."""
        return self.spans.capacity if self.spans.max_seqlen is None else self.spans.max_seqlen

    @property
    @outside_graphs
    def longest(self) -> int:
        """Steps of the longest document, a host integer that differs from batch to batch."""
        return int(self.host_lengths().max(initial=0))

    @property
    @outside_graphs
    def num_tokens(self) -> int:
        """Real steps of all documents, a host integer."""
        return int(self.host_lengths().sum())

    @property
    @outside_graphs
    def padding_fraction(self) -> float:
        """Share of the R x C steps that are gaps."""
        return 1 - self.num_tokens / (self.offsets.shape[0] * self.offsets.shape[1])

    @outside_graphs
    def sequences(self) -> list[Tensor]:
        """The documents in row order: N views `[L_i, *F]`."""
        steps, lengths = self.values.flatten(0, 1), self.host_lengths().tolist()
        return [steps[start : start + n] for start, n in zip(self.spans.starts().tolist(), lengths, strict=True)]

    @outside_graphs
    def flat(self) -> Tensor:
        """The real steps of all documents, without gaps: `[M, *F]`; gradients flow back to those steps only."""
        return gather_steps(self.values, self.real_step_index())

    # --- what losses, means and recurrent modules read of both kinds of batch

    @property
    def step_values(self) -> Tensor:
        """The values, `[R, C, *F]`."""
        return self.values

    @property
    def first_step(self) -> int:
        """Steps of documents that came before these rows, the most of any: 0, but in later chunks of `split_steps`."""
        return 0 if not self.spans.has_first_steps else int(self.spans.array("first_steps").max(initial=0))

    def host_lengths(self) -> Int64Array:
        """The lengths that the batch was made with: int64 `[N]`, not to be written to.

        Raises:
            LengthError: They, or mask or offsets, were written to since.
        """
        self.offsets.check_unwritten()
        return self.spans.array("lengths")

    def check_unwritten(self) -> None:
        """Check that integers, mask and offsets are those that the batch was made with, except in compiled code.

        Raises:
            LengthError: They were written to.
        """
        if not torch.compiler.is_compiling() and type(self.lengths) is Tensor:
            self.offsets.check_unwritten()
            for name in ("lengths", "documents_per_row", "permutation"):
                self.spans.array(name)

    def real_step_index(self) -> Tensor:
        """Positions of the real steps in `[0, R * C)`, document after document: int64 `[M]` on the values' device."""
        return flat_index(self.host_lengths(), self.spans.capacity, self.device, firsts=self.spans.starts())

    def packing_map(self, device: torch.device) -> PackingMap:
        """How the documents lie in a `PackedSequence`.

        Raises:
            LengthError: All of them are empty.
        """
        refuse_capture(device)
        shape = self.offsets.shape
        return PackingMap.of(self.host_lengths(), shape[1], device, firsts=self.spans.starts(), num_rows=shape[0])

    def sum_sequences(self, steps: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Sums over each segment of something that has one entry per step: `[R, C, *G]` -> `[slots, *G]`.

        The number of launches does not depend on the number of documents, and no document's sum on another's values.
        """
        return sum_segments(steps.flatten(0, 1).to(dtype or steps.dtype), self.cu_seqlens)

    def step_counts(self) -> Tensor:
        """Real steps of each segment, 0 for a gap: int32 `[slots]`."""
        table = self.offsets.table
        return torch.where(table[DOCUMENT, :-1] >= 0, table[CU_SEQLENS].diff(), 0)

    @outside_graphs
    def pick_sequences(self, sums: Tensor) -> Tensor:
        """The documents' own entries of `[slots, *G]`: `[N, *G]`, in row order."""
        slots = document_slots(self.spans.make_table())
        return sums.index_select(0, to_device(slots, sums.device))

    def spread_weights(self, weights: Tensor) -> Tensor | None:
        """Weights of documents `[N]` as weights of their steps `[R, C]`, 0 in gaps; None where they are not `[N]`."""
        if weights.shape != (len(self),):
            return None
        ids = self.document_ids
        padded = torch.cat([weights, weights.new_zeros(1)])
        return padded.index_select(0, torch.where(ids < 0, len(self), ids).flatten()).view(ids.shape)

    @outside_graphs
    def last_values(self) -> tuple[Tensor, Tensor]:
        """Each document's value at its last step, `[N, *F]`, and whether it has one, bool `[N]`."""
        lengths = self.host_lengths()
        last = np.maximum(self.spans.starts() + lengths - 1, 0)
        index, filled = to_device(np.stack([last, lengths]), self.device)
        return gather_last(self.values, index), filled > 0

    def difference(self, other: "DocumentViews") -> str | None:
        """What keeps another batch from being of the same steps of the same documents; None where nothing does."""
        for name in ("lengths", "documents_per_row", "permutation", "first_steps"):
            mine, theirs = self.spans.array(name), other.spans.array(name)
            if not np.array_equal(mine, theirs):
                return (
                    f"output has {name} {mine.tolist()}, target has {theirs.tolist()}: they must be of the same steps "
                    "of the same documents; collate both fields together"
                )
        for name in ("capacity", "align"):
            options = getattr(self.spans, name), getattr(other.spans, name)
            if options[0] != options[1]:
                return f"output has {name}={options[0]}, target has {name}={options[1]}: make both alike"
        return None


def gather_last(values: Tensor, index: Tensor) -> Tensor:
    """Steps of rows `[R, C, *F]` by flat indices that may occur twice: `[N, *F]`."""
    return values.flatten(0, 1).index_select(0, index)
