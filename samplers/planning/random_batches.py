"""A plan beside what random batches of the same budget would cost."""

from typing import Final

import numpy as np

from collate.widths import padded_widths
from samplers.planning.budget import Budget
from samplers.planning.keyed_shuffle import derive_key, permute
from samplers.planning.plan import BatchPlan

# More than enough for three digits, and a second's work.
SIMULATED: Final = 100_000


def random_padding(plan: BatchPlan) -> float:
    """The share of padding if the plan's samples came in random order, and batches were filled up to its budget.

    Args:
        plan: whose samples, budget and widths to take; of a large corpus, a random hundred thousand samples.

    Returns:
        Share of padded tokens that are padding, 0 to 1.
    """
    corpus, options = plan.layout.corpus, plan.layout.options
    places = permute(np.arange(min(len(corpus), SIMULATED)), len(corpus), derive_key(options.seed))
    lengths = corpus.lengths_of(corpus.order[places])
    widths = padded_widths(lengths, options.allowed_widths)
    padded = _fill(widths.tolist(), lengths.sum(1).tolist(), options.budget)
    return 1 - int(lengths.sum()) / padded


def _fill(widths: list[list[int]], tokens: list[int], budget: Budget) -> int:
    """Padded tokens of batches that take samples as they come, each as long as its budget holds."""
    padded, rows, real = 0, 0, 0
    reach = [0] * len(widths[0])
    for width, length in zip(widths, tokens, strict=True):
        grown = [max(pair) for pair in zip(reach, width, strict=True)]
        if rows and not budget.fits(rows + 1, grown, real + length):
            padded += rows * sum(reach)
            rows, real, grown = 0, 0, width
        rows, real, reach = rows + 1, real + length, grown
    return padded + rows * sum(reach)
