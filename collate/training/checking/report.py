"""The report of a checked training step: findings, and the mistakes with the same symptom."""

import warnings
from dataclasses import dataclass

from collate.errors import LengthError

LAST_COLUMN = "the last column taken for each row's last step, as in output[:, -1]"
OWN_COUNT = "a custom denominator, neither rows nor steps: check the sum, or put the count in the batch as a field"

LIKELY = {
    "padding": (
        "a loss or mean that is not masked, or masked after it was reduced",
        "a length that is too large (padding run through the network as if it were real)",
        "a backward direction, a convolution, attention or a normalisation that reads padding",
        "a final state taken at the padded end instead of each row's last step",
        LAST_COLUMN,
        "a mask of the wrong polarity, or added where it should select",
    ),
    "width": (
        "a mean over the padded width, or over all B x T steps",
        "a final state taken at the padded end instead of each row's last step",
        LAST_COLUMN,
        "an output trimmed to the longest row next to a mask or target that is not",
    ),
    "order": (
        "rows sorted for packing and never put back, or put back by the wrong permutation",
        "targets that do not follow the order of the packed steps",
        "a recurrent module without batch_first, so that state flows from row to row",
        "a mean of means over groups of rows",
    ),
    "other rows": (
        "a recurrent module without batch_first, so that state flows from row to row",
        "a normalisation over the batch",
        "a mean of means over groups of rows, or a denominator that is not the number of real steps or rows",
        "two terms with different means in one loss: return them as a mapping, each is then checked alone",
        "an ignore_index that is a real class",
        "a squeeze() that also removes the axis of the rows",
    ),
    "dead step": (
        "a length that is too small (the last steps are never read)",
        "a row or a step that was dropped or trimmed away",
        "a mask of the wrong polarity, or guessed from values that can be real",
        LAST_COLUMN,
    ),
    "micro-batches": (
        "the mean of micro-batches' means: divide each one's sum by the tokens of the whole update",
        "the sum of micro-batches' means, which grows with their number: divide each one's sum by the update's tokens",
        "a normalisation over the batch",
        "a denominator of one micro-batch that is used for all",
    ),
    "repeat": (
        "a state, a cache or a counter carried from call to call: begin with a fresh one inside the step",
        "random numbers from a generator of its own: make it from a fixed seed inside the step",
        "buffers of a module that is used but never called: pass it as module=",
        "an optimizer that is called inside the step",
    ),
    "graph": (
        "a loss that was detached, or went through item(), a NumPy array, argmax or another function without gradients",
        "a step, or a call of check_step, under torch.no_grad() or torch.inference_mode()",
        "a metric returned instead of the loss",
    ),
    "finite": (
        "a row or a step whose attention scores are all masked, so that softmax divides zero by zero",
        "a mean over no step: an empty row, or a row whose targets are all ignored",
        "a log, a square root or a division in the padding that is masked only afterwards: gradients stay nan",
    ),
}

GUESSED = "lengths or a mask guessed from values, as by x != 0: take len() of each sample"

# Where rows are made by a collate function, it may be to blame as well.
COLLATED = {
    "order": (
        "a collate function that sorts one field and not the others (x, but not y or the lengths)",
        "lengths taken before the rows are sorted",
    ),
    "other rows": (
        "a collate function that sorts one field and not the others (x, but not y or the lengths)",
        "lengths of another order, of another field, or too large: padding is read as if it were real",
        "padding that is not masked in the step, or marked by a value that is a real class",
    ),
    "dead step": (
        "a collate function that cuts rows: to a fixed width, to the shortest row, or by one step",
        "lengths of another order, of another field, or too small",
    ),
}


class ProbeName(str):
    """Name of a probe; for one release it also equals the name that release 0.1 used.

    A set or a dict finds the new name only.
    """

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        # Two present names are compared as strings; only a plain string can be the former name.
        if type(other) is str and other == "company" and str.__eq__(self, "other rows"):
            message = 'the probe "company" is now "other rows", and the old name goes with the next release'
            warnings.warn(message, DeprecationWarning, stacklevel=2)
            return True
        return str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__


@dataclass(frozen=True)
class Finding:
    """One way in which a step does not respect the lengths.

    Attributes:
        probe: What was tried: `"padding"`, `"width"`, `"order"`, `"other rows"`, `"dead step"` or `"micro-batches"`;
            `"repeat"` for a step whose second run differs, `"finite"` for a loss or gradients that are nan or infinite,
            `"graph"` for a loss that no gradient flows from.
        what: What happened, with term, field, row and step where they are known.
        drift: Relative change of the loss or of the gradients, the larger; 0 for a dead step.
        likely: Mistakes with this symptom, the likeliest first.
    """

    probe: str
    what: str
    drift: float
    likely: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "probe", ProbeName(self.probe))

    def __str__(self) -> str:
        return "\n".join([f"{self.probe}: {self.what}", *(f"    perhaps {mistake}" for mistake in self.likely)])


@dataclass(frozen=True)
class StepReport:
    """What `check_step` found.

    Attributes:
        loss: The loss of the unchanged batch; with several terms, their sum.
        findings: The broken laws; empty for a step that respects the lengths.
        skipped: Probes that could not be made, and why; and observations that are right under a condition.
    """

    loss: float
    findings: tuple[Finding, ...]
    skipped: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing was found."""
        return not self.findings

    def raise_if_broken(self) -> None:
        """Raise an error if there is a finding; for tests.

        Raises:
            LengthError: With the whole report as its text.
        """
        if self.findings:
            raise LengthError(str(self))

    def __str__(self) -> str:
        head = "the step respects the lengths" if self.ok else f"the step breaks {len(self.findings)} law(s) of lengths"
        skipped = [f"not tried: {reason}" for reason in self.skipped]
        return "\n".join([f"{head} (loss {self.loss:.6g})", *map(str, self.findings), *skipped])
