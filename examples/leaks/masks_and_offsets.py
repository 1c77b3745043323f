"""Leak 6, masks and offsets by hand: of the wrong polarity, shifted by one, or with one step that everybody sees.

python examples/leaks/masks_and_offsets.py
"""

import torch
from compare import Step, documents, losses_of, show
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from collate import VarlenBatch

torch.manual_seed(0)
EMBED, HEAD = nn.Embedding(24, 8).double(), nn.Linear(8, 24).double()


def step_with(mask: Step) -> Step:
    """Attention with a mask `[R, 1, C, C]`, True where a step may be seen."""

    def step(batch: VarlenBatch) -> Tensor:
        query = EMBED(batch.values)[:, None]
        hidden = scaled_dot_product_attention(query, query, query, attn_mask=mask(batch))
        return losses_of(HEAD(hidden[:, 0]), batch)

    return step


def of_ids(ids: Tensor) -> Tensor:
    """Earlier steps with the same number, `[R, C]`."""
    return (ids[:, :, None] == ids[:, None]).tril()[:, None]


def polarity(batch: VarlenBatch) -> Tensor:
    """True where a step may not be seen, as other attention modules of torch want it."""
    return ~of_ids(batch.document_ids) | torch.eye(batch.values.shape[1], dtype=torch.bool)


def with_sink(batch: VarlenBatch) -> Tensor:
    """The first step of the row is seen by all, as a sink."""
    mask = of_ids(batch.document_ids)
    mask[..., 0] = True
    return mask


def steps() -> dict[str, Step]:
    """Five masks."""
    return {
        "causal, without documents": step_with(lambda b: of_ids(torch.zeros_like(b.document_ids))),
        "wrong polarity": step_with(polarity),
        "offsets one step late": step_with(lambda b: of_ids(b.document_ids.roll(1, 1))),
        "a sink for the whole row": step_with(with_sink),
        "lengthtrack, attention_mask": step_with(lambda b: b.attention_mask()),
    }


def main() -> None:
    """Print what each mask does to documents."""
    show(steps(), documents())


if __name__ == "__main__":
    main()
