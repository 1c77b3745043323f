"""Context parallelism: which steps of each row a rank computes, by head-tail pairs of every document.

Under a causal mask a later step attends to more. A document in `2 * size` equal pieces, of which rank r takes number r
from the head and number r from the tail, gives every rank the same number of pairs. With 2 ranks and one document of 8
steps, rank 0 has steps 0, 1, 6 and 7:

>>> import numpy as np
>>> from collate.varlen.offsets import offset_table
>>> table = offset_table(np.array([8]), np.array([1]), capacity=8, align=4, slots=2)
>>> offsets = Offsets(torch.from_numpy(table), (1, 8))
>>> [ContextParallel.of(offsets, 4, rank, 2).index.tolist() for rank in (0, 1)]
[[[0, 1, 6, 7]], [[2, 3, 4, 5]]]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from collate.tensors.steps import gather_steps, scatter_steps
from collate.varlen.offsets import CU_SEQLENS_PADDED
from collate.varlen.spans import Offsets
from collate.widths import check_count


@dataclass(frozen=True, eq=False)
class ContextParallel:
    """The steps of one rank of a context-parallel group.

    Attributes:
        index: int64 `[R, C / size]` on the batch's device: the place, in `[0, R * C)`, of each step that the rank has.
        rank: which rank, from 0.
        size: ranks of the group.
        shape: R and C of the whole batch.
        cu_seqlens_padded: int32 `[slots + 1]`: bounds of each document's steps on this rank.
    """

    index: Tensor
    rank: int
    size: int
    shape: tuple[int, int]
    cu_seqlens_padded: Tensor

    @classmethod
    def of(cls, offsets: Offsets, align: int, rank: int, size: int) -> Self:
        """Find the steps of a rank, in closed form and on the offsets' own device, without waiting for it.

        Raises:
            TypeError: Rank or size is not an int.
            ValueError: There is no such rank, or `align` is no multiple of `2 * size`.
        """
        size = check_count("size", size, least=1, hint="give the number of ranks of the context-parallel group")
        rank = check_count("rank", rank, least=0, hint="ranks count from 0")
        if rank >= size:
            raise ValueError(f"rank must be below size={size}, got {rank}")
        if align % (2 * size):
            raise ValueError(
                f"align must be a multiple of 2 * size = {2 * size}, so that documents are cut into equal pieces, got "
                f"{align}: make the batch with align={2 * size}"
            )
        bounds = offsets.table[CU_SEQLENS_PADDED]
        local = (bounds // size).to(torch.int32)
        steps = torch.arange(offsets.shape[0] * offsets.shape[1] // size, device=bounds.device, dtype=torch.int32)
        slot = torch.searchsorted(local[1:].contiguous(), steps, right=True, out_int32=True)
        piece = ((bounds[1:] - bounds[:-1]) // (2 * size)).index_select(0, slot)
        within = steps - local.index_select(0, slot)
        # The head's piece begins after `rank` pieces, the tail's before `rank + 1` of them.
        shift = torch.where(within < piece, rank * piece, (2 * size - 2 - rank) * piece)
        index = (bounds.index_select(0, slot) + within + shift).to(torch.int64)
        return cls(index.view(offsets.shape[0], -1), rank, size, offsets.shape, local)

    def take(self, values: Tensor) -> Tensor:
        """The rank's steps of anything with one entry per step, `[R, C, *G]` -> `[R, C / size, *G]`; gradients flow.

        Raises:
            ValueError: It is not of the whole batch.
        """
        if tuple(values.shape[:2]) != self.shape:
            raise ValueError(f"values must be [{self.shape[0]}, {self.shape[1]}, ...], got {list(values.shape)}")
        return gather_steps(values, self.index.flatten()).view(*self.index.shape, *values.shape[2:])

    @staticmethod
    def join(parts: Sequence["ContextParallel"], values: Sequence[Tensor]) -> Tensor:
        """What all ranks have computed, as rows of the whole: `[R, C / size, *G]` of each -> `[R, C, *G]`.

        Raises:
            ValueError: They are not the parts of all ranks.
        """
        if sorted(part.rank for part in parts) != list(range(parts[0].size)) or len(parts) != len(values):
            raise ValueError(f"parts must be one of each of the {parts[0].size} ranks, with its values")
        index = torch.cat([part.index.flatten() for part in parts])
        return scatter_steps(torch.cat([steps.flatten(0, 1) for steps in values]), index, parts[0].shape)
