"""The probe of a step that accumulates gradients: however samples are divided, the update is the same."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeAlias

from collate.training.checking.report import LIKELY, Finding
from collate.training.checking.rerun import RAISED, Runner, Terms, combined
from collate.training.checking.samples import Collate
from collate.widths import check_count

Samples: TypeAlias = Sequence[Any]


class MicroBatches:
    """The updates of one list of samples, divided in several ways.

    Args:
        inner: Runs the user's step, which takes a list of batches.
        samples: All samples of the update.
        collate: Makes a batch of some of them.
        count: Batches of an update.

    Raises:
        TypeError: The count is not an int.
        ValueError: It is below 2, or there are fewer samples.
    """

    def __init__(self, inner: Runner, samples: Samples, collate: Collate, count: int) -> None:
        check_count("micro_batches", count, least=2, hint="one batch is the step without accumulation: give None")
        if count > len(samples):
            raise ValueError(
                f"micro_batches must be at most the {len(samples)} samples, got {count}: give more samples"
            )
        self.samples, self.count = samples, count
        self.runner = Runner(
            lambda parts: inner.step([collate(list(part)) for part in parts]), inner.seed, inner.buffers
        )

    def probe(self, tolerance: float) -> Finding | str | None:
        """Run the update with several divisions of its samples.

        Args:
            tolerance: Relative change of a loss or of gradients that counts as a difference.

        Returns:
            A finding; or a text that says what was not tried, and why; or None.
        """
        self.runner.begin([self.samples])
        if self.runner.is_random:
            return "micro-batches: the step draws random numbers, and other batches get other ones"
        raised = None
        for parts in self._divisions():
            try:
                terms = self.runner.run(parts)
            except RAISED as error:
                # A step may refuse a batch of one sample only.
                raised = f"micro-batches: the step raises {type(error).__name__} on several: {error}"
                continue
            drift = self.runner.drift(terms)
            if drift.size > tolerance:
                sizes = ", ".join(str(len(part)) for part in parts)
                what = f"dividing the {len(self.samples)} samples among micro-batches of {sizes} moves {drift}"
                return Finding("micro-batches", what, drift.size, self._likely(parts, terms, tolerance))
        return raised

    def _divisions(self) -> list[list[Samples]]:
        """One sample apart from the others, from either end; and as even as can be."""
        samples, rest = self.samples, self.count - 1
        first = [samples[index : index + 1] for index in range(rest)]
        last = [samples[len(samples) - index - 1 :][:1] for index in range(rest)]
        cuts = [len(samples) * index // self.count for index in range(self.count + 1)]
        even = [samples[start:stop] for start, stop in pairwise(cuts)]
        return [[*first, samples[rest:]], [samples[: len(samples) - rest], *last], even]

    def _likely(self, parts: list[Samples], found: Terms, tolerance: float) -> tuple[str, ...]:
        """The mistakes with this symptom; the one that gives just this result comes first."""
        try:
            alone = [self.runner.run([part]) for part in parts]
        except RAISED:
            return LIKELY["micro-batches"]
        mean_of_means, sum_of_means, *others = LIKELY["micro-batches"]
        for mistake, share in ((mean_of_means, 1 / len(parts)), (sum_of_means, 1.0)):
            shares = [share] * len(parts)
            guess = {name: combined([each[name] for each in alone], shares) for name in found}
            if self.runner.drift(found, guess).size <= tolerance:
                return mistake, *(other for other in (mean_of_means, sum_of_means) if other != mistake), *others
        return LIKELY["micro-batches"]
