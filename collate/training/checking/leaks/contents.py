"""Other contents for the time steps of documents: values that such steps could hold, and never the same."""

import torch
from torch import Tensor

from collate.training.checking.variants import drawn

# Below as many documents, a value that all of them begin with may be one by chance.
_LEAST_DOCUMENTS = 3


def other_contents(steps: Tensor, ids: Tensor, seed: int) -> Tensor:
    """Other values for all steps, of which some documents' steps are then taken.

    Negative whole numbers stay, since they mark steps without a label; so do values that all documents begin or end
    with, from which a model may find the borders, and booleans, which are masks.

    Args:
        steps: `[steps, *F]`.
        ids: int64 `[steps]` on the host, the document of each step, -1 in gaps.
        seed: of the values.
    """
    generator = torch.Generator().manual_seed(seed)
    on_device = ids.to(steps.device)
    real = steps[on_device >= 0].detach()
    if steps.dtype == torch.bool or not len(real):
        return steps
    if steps.is_floating_point() or steps.is_complex():
        return drawn(real, steps.detach(), generator, wild=False)
    fixed = steps < 0
    for value in _marks(steps, ids):
        fixed |= steps == value
    pool = steps[(on_device >= 0).view(-1, *[1] * (steps.dim() - 1)) & ~fixed]
    if not len(pool):
        return steps
    if bool((pool == pool[0]).all()):
        # Nothing else is known to be a token than this one and, nearly always, the one before it.
        return torch.where(fixed, steps, torch.where(steps > 0, steps - 1, 1))
    return torch.where(fixed, steps, drawn(pool, steps, generator, wild=False))


def are_positions(name: str, steps: Tensor, ids: Tensor) -> bool:
    """Whether a field counts the steps of each document and is named so: then it is made from lengths, no contents.

    Other numbers in it would move the borders that a model finds by positions.

    Args:
        name: of the field.
        steps: `[steps, *F]`.
        ids: as in `other_contents`.
    """
    if "pos" not in name.lower() or steps.dim() > 1 or steps.is_floating_point() or steps.is_complex():
        return False
    values, real = steps.detach().cpu().to(torch.int64), ids >= 0
    goes_on = real[1:] & (ids[1:] == ids[:-1])
    begins = real.clone()
    begins[1:] &= ~goes_on
    return not bool(values[begins].any()) and bool((values.diff()[goes_on] == 1).all())


def _marks(steps: Tensor, ids: Tensor) -> list[int]:
    """Values that all documents begin with, or end with."""
    counts = torch.bincount(ids[ids >= 0])
    found = counts[counts > 0]
    if steps.dim() > 1 or len(found) < _LEAST_DOCUMENTS or int(found.min()) < 2:
        return []
    values = steps.detach().cpu()
    new = torch.ones(len(ids), dtype=torch.bool)
    new[1:] = ids[1:] != ids[:-1]
    last = torch.ones_like(new)
    last[:-1] = new[1:]
    edges = [values[edge & (ids >= 0)] for edge in (new, last)]
    return [int(edge[0]) for edge in edges if bool((edge == edge[0]).all())]
