"""A step that halves a batch which does not fit in memory, and remembers what fits.

A device that holds eight padded tokens. Six rows of two fail; halves of three fit, and so do the batches after them,
which are split before they are tried:

>>> def step(batch):
...     if batch.size > 8:
...         raise MemoryError
...     return batch.shape
>>> halving = HalvingStep(step, lambda samples: np.ones((len(samples), 2)), np.full(10, 2))
>>> [(samples, shape) for samples, batch, shape in halving.run([0, 1, 2, 3, 4, 5], np.ones((6, 2)))]
[([0, 1, 2], (3, 2)), ([3, 4, 5], (3, 2))]
>>> halving.limit, [samples for samples, *_ in halving.run([6, 7, 8, 9], np.ones((4, 2)))]
(6, [[6, 7], [8, 9]])
"""

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

import numpy as np

from collate.errors import is_out_of_memory
from samplers.planning.budget import Integers

_FAILED: Final = object()
# Characters of an error's text that a message repeats.
_SHOWN: Final = 200

_logger = logging.getLogger(__name__)


class HalvingStep:
    """Runs a step on batches, in pieces where one does not fit.

    Attributes:
        limit: Padded tokens of a batch at most, as far as is known; None until a batch did not fit.

    Args:
        step: The user's function, from a collated batch to its outputs.
        collate: Collates these samples.
        lengths: int64 `[N]` or `[N, K]`.
    """

    def __init__(self, step: Callable[[Any], Any], collate: Callable[[list[int]], Any], lengths: Integers) -> None:
        self._step, self._collate, self._lengths = step, collate, lengths
        self.limit: int | None = None

    def run(self, samples: list[int], batch: Any) -> Iterator[tuple[list[int], Any, Any]]:
        """Run the step on a batch, or on pieces of it, in order.

        Args:
            samples: Their indices, in the order in which they were collated.
            batch: Them, collated.

        Yields:
            The samples of a piece, their batch, and the step's result.

        Raises:
            MemoryError: One sample alone does not fit.
        """
        # Last piece first, so that `pop` gives them in order.
        pieces = [(samples, batch)]
        del batch
        while pieces:
            samples, piece = pieces.pop()
            result = _FAILED
            if not self._is_too_large(samples):
                piece = self._collate(samples) if piece is None else piece
                result = self._try(samples, piece)
            if result is _FAILED:
                middle = (len(samples) + 1) // 2
                pieces += [(samples[middle:], None), (samples[:middle], None)]
            else:
                yield samples, piece, result

    def _try(self, samples: list[int], batch: Any) -> Any:
        """The step's result, or `_FAILED` where memory ran out.

        Raises:
            MemoryError: It ran out for a single sample.
        """
        try:
            return self._step(batch)
        except Exception as error:
            if not is_out_of_memory(error):
                error.add_note(f"in run_in_order, on samples {samples[:8]}{' ...' * (len(samples) > 8)}")
                raise
            reason = f"{type(error).__name__}: {error}"[:_SHOWN]
        # Only now: the error held the frames of the step, and they its tensors.
        _free_memory()
        width = self._width(samples)
        if len(samples) == 1:
            raise MemoryError(
                f"sample {samples[0]}, of {width} steps, does not fit in memory alone: cut it in the collator "
                f"(max_length), use a smaller model, or leave it out of the dataset ({reason})"
            )
        self.limit = (len(samples) + 1) // 2 * width
        _logger.warning(
            "a batch of %d rows x %d steps did not fit in memory (%s): it is halved, and later ones have at most %d "
            "padded tokens; a lower max_tokens saves the attempt",
            len(samples),
            width,
            reason,
            self.limit,
        )
        return _FAILED

    def _is_too_large(self, samples: list[int]) -> bool:
        """Whether a batch exceeds what is known to fit."""
        return self.limit is not None and len(samples) > 1 and len(samples) * self._width(samples) > self.limit

    def _width(self, samples: list[int]) -> int:
        """Padded steps of a row, over all fields; a batch of empty rows is padded to one step."""
        return int(np.maximum(self._lengths[samples].max(0), 1).sum())


def _free_memory() -> None:
    """Return what a failed step has left behind."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
