"""The probes of documents: others change and one must stay, its own contents change and it must not, rows are turned.

With N documents, the odd ones change first, then the even ones. For four documents, thorough runs change {1, 3},
{0, 2}, {2, 3} and {0, 1}: each ordered pair is apart in one of them, as 0 changes and 1 stays in the second.

>>> change_sets([0, 1, 2, 3], thorough=False)
[[1, 3], [0, 2]]
>>> change_sets([0, 1, 2, 3], thorough=True)
[[1, 3], [0, 2], [2, 3], [0, 1]]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from collate.training.checking.leaks import causes
from collate.training.checking.leaks.documents import DocumentCases
from collate.training.checking.leaks.outcomes import Outcome, distances, sizes_of
from collate.training.checking.leaks.runs import DocumentRuns
from collate.training.checking.leaks.traces import Difference, Trace, first_difference
from collate.training.checking.report import Finding

# What repeats itself no better than this share is no measure.
NOISE_MARGIN: Final = 4.0
# Documents that were moved in their row differ by rounding; more than this share of what other contents do is more.
_MOVED: Final = 1e-2
# Steps whose gradients tell a scale with a shift from any other change.
_LEAST_NUMBERS: Final = 4
# Contents that a document gets before it is called dead.
_DRAWS: Final = 4


def change_sets(documents: Sequence[int], *, thorough: bool) -> list[list[int]]:
    """Which documents change in each run: odd ones, then even ones, or those with each bit set, then not set.

    Args:
        documents: those that have steps.
        thorough: separate every pair.
    """
    bits = max(len(documents) - 1, 1).bit_length() if thorough else 1
    sets: list[list[int]] = []
    for bit in range(bits):
        sets += [
            [document for index, document in enumerate(documents) if index >> bit & 1 == value] for value in (1, 0)
        ]
    return [changed for changed in sets if changed]


@dataclass(frozen=True)
class Leak:
    """A document that stays, and is moved by others.

    Attributes:
        changed: the documents that changed.
        moved: the documents that stayed, and moved.
        name: the result or the gradient that moved the most.
        drift: relative change of the one that moved the most.
        in_forward: whether a result moved, and not only a gradient.
    """

    changed: list[int]
    moved: list[int]
    name: str
    drift: float
    in_forward: bool


class DocumentProbes:
    """Probes of one batch.

    Attributes:
        base: what the step gives for the batch as it is.
        noise: how far apart runs of the same batch were, for each result and gradient.
        scale_notes: what is right under a condition.
    """

    def __init__(self, runs: DocumentRuns, base: Outcome, noise: dict[str, float]) -> None:
        self.runs, self.base, self.noise = runs, base, noise
        self.cases: DocumentCases = runs.cases
        self.count = self.cases.count
        self.documents = [index for index, length in enumerate(self.cases.lengths.tolist()) if length]
        self.sizes = sizes_of(base, self.count)
        self.own = {name: torch.zeros(self.count, dtype=torch.float64) for name in base.entries}
        self.scalar_effect = 0.0
        self.notes: list[str] = []

    def leak(self, sets: Sequence[Sequence[int]]) -> Leak | None:
        """Change documents in turn; a leak into one that stays. Remembers what each does to itself."""
        found: Leak | None = None
        for changed in sets:
            outcome = self.runs.run(self.cases.changed(changed))
            leak = self.leak_between(changed, outcome)
            self._remember(changed, outcome)
            # What results show says more than what gradients show, in which both directions look alike.
            if found is None or (leak is not None and leak.in_forward and not found.in_forward):
                found = leak
        return found

    def leak_between(self, changed: Sequence[int], outcome: Outcome) -> Leak | None:
        """What of the documents that stayed moved in a run; None where no bit did, or no more than noise."""
        staying = torch.ones(self.count, dtype=torch.bool)
        staying[list(changed)] = False
        apart = self._without_scale(distances(self.base, outcome, self.count), outcome, staying)
        best: tuple[float, str] | None = None
        moved = torch.zeros(self.count, dtype=torch.bool)
        in_forward = False
        for name, sizes in apart.items():
            beyond = staying & (sizes > NOISE_MARGIN * self.noise[name])
            if not bool(beyond.any()):
                continue
            moved |= beyond
            in_forward |= name not in self.base.gradients
            drift = float((sizes[beyond] / self.sizes[name][beyond].clamp(min=1e-30)).max())
            # A result says more than a gradient.
            rank = (name not in self.base.gradients, drift)
            if best is None or rank > (best[1] not in self.base.gradients, best[0]):
                best = drift, name
        if best is None:
            return None
        return Leak(list(changed), torch.nonzero(moved).flatten().tolist(), best[1], best[0], in_forward)

    def culprit(self, leak: Leak) -> Leak:
        """The same leak from as few documents as can be told, by halving those that changed."""
        while len(leak.changed) > 1:
            half = len(leak.changed) // 2
            for part in (leak.changed[:half], leak.changed[half:]):
                again = self.leak_between(part, self.runs.run(self.cases.changed(part)))
                # A gradient may say the opposite direction, so it does not stand for a result.
                if again is not None and again.in_forward >= leak.in_forward and set(again.moved) - set(leak.changed):
                    moved = [document for document in again.moved if document not in leak.changed]
                    leak = Leak(part, moved, again.name, again.drift, again.in_forward)
                    break
            else:
                return leak
        return leak

    def where(self, leak: Leak) -> Difference | None:
        """The module in which documents that stay begin to differ."""
        found = self._first_difference(leak.changed)
        # The gradient of a document moves where another one reads it as well as where it reads another one.
        return found if found or leak.in_forward else self._first_difference(leak.moved)

    def _first_difference(self, changed: Sequence[int]) -> Difference | None:
        """The module in which documents begin to differ when others change."""
        staying = torch.ones(self.count, dtype=torch.bool)
        staying[list(changed)] = False
        traces = []
        for batch in (self.cases.whole, self.cases.changed(changed)):
            with Trace(self.cases.layouts, staying).recording() as trace:
                self.runs.run(batch)
            traces.append(trace)
        return first_difference(*traces)

    def dead_document(self) -> Finding | None:
        """Documents whose own contents change nothing of theirs, whatever they are."""
        dead = self._dead()
        for draw in range(1, _DRAWS):
            if not dead:
                return None
            # In half precision two contents may give one number.
            outcome = self.runs.run(self.cases.redrawn(self.runs.runner.seed + draw).changed(dead))
            self._remember(dead, outcome)
            dead = self._dead()
        if not dead:
            return None
        what = f"other contents of {causes.name_documents(dead)} change nothing of what is returned for them"
        return Finding("dead document", what, 0.0, causes.DEAD_DOCUMENT)

    def _dead(self) -> list[int]:
        """Documents that have not changed so far, and should."""
        entries = {name: sizes for name, sizes in self.own.items() if name not in self.base.gradients}
        if not entries:
            entries = {name: self.own[name].maximum(self.sizes[name]) for name in self.base.gradients}
        if not entries:
            return []
        moved = torch.stack([sizes > 0 for sizes in entries.values()]).any(0)
        return [
            document
            for document in self.documents
            if self.cases.lengths[document] > 1 and not moved[document] and not self.cases.is_silent(document)
        ]

    def order(self) -> Finding | None:
        """Turn the documents of each row around: each must give what it gave, up to rounding."""
        made = self.cases.reversed()
        if isinstance(made, str):
            self.notes.append(f"order: {made}")
            return None
        batch, layouts, order = made
        outcome = self.runs.run(batch, layouts)
        moved = self._moved(outcome, torch.from_numpy(order))
        if moved is None:
            return None
        ratio, text = moved
        what = f"with the documents of each row in reverse, {text}"
        return Finding("order", what, ratio, causes.ORDER)

    def _moved(self, outcome: Outcome, order: Tensor) -> tuple[float, str] | None:
        """What rounding does not explain of results of documents that were moved: the drift, and in words."""
        for name, number in self.base.scalars.items():
            apart = abs(outcome.scalars[name] - number)
            if apart > _MOVED * self.scalar_effect and apart > 64 * 1.2e-7 * abs(number):
                drift = apart / max(abs(number), 1e-30)
                return drift, f"{f'term {name!r}' if name else 'the loss'} moves by {_share(drift)}"
        for name, entries in self.base.entries.items():
            if name in self.base.gradients or not entries.is_floating_point():
                continue
            back = _gathered(outcome, name, self.base, order)
            if back is None:
                continue
            sizes = distances(Outcome({name: entries}, {name: self.base.owners[name]}), back, self.count)[name]
            rounding = 64 * torch.finfo(entries.dtype).eps * self.sizes[name]
            wrong = (sizes > _MOVED * self.own[name]) & (sizes > rounding)
            if bool(wrong.any()):
                drift = float((sizes[wrong] / self.sizes[name][wrong].clamp(min=1e-30)).max())
                documents = causes.name_documents(torch.nonzero(wrong).flatten().tolist())
                return drift, f"{name} of {documents} moves by {_share(drift)}"
        return None

    def _remember(self, changed: Sequence[int], outcome: Outcome) -> None:
        """Keep what documents did to themselves when they changed."""
        apart = distances(self.base, outcome, self.count)
        mine = torch.zeros(self.count, dtype=torch.bool)
        mine[list(changed)] = True
        for name, sizes in apart.items():
            self.own[name] = torch.where(mine, self.own[name].maximum(sizes), self.own[name])
        for name, number in self.base.scalars.items():
            self.scalar_effect = max(self.scalar_effect, abs(outcome.scalars[name] - number))

    def _without_scale(self, apart: dict[str, Tensor], outcome: Outcome, staying: Tensor) -> dict[str, Tensor]:
        """Differences of gradients of a scalar, unless all of them are one factor: then the mean has another count."""
        if not self.base.scalars:
            return apart
        found = dict(apart)
        for name in self.base.gradients:
            owners = self.base.owners[name]
            stay = ((owners >= 0) & staying[owners]).to(self.base.entries[name].device)
            one, other = (run.entries[name][stay].double().flatten() for run in (self.base, outcome))
            # What counts nowhere, such as a step without a label, has no gradient before and after.
            used = (one != 0) | (other != 0)
            one, other = one[used], other[used]
            if not bool(one.any()) or torch.equal(one, other):
                continue
            # The gradient of a weight that a mean is divided by, one number per step, has a share of the mean as well.
            factor, shift = _scale_between(one, other, shifted=self.base.entries[name].dim() == 1)
            eps = torch.finfo(self.base.entries[name].dtype).eps
            rest = float((other - factor * one - shift).abs().max())
            moves = abs(factor - 1) > 64 * eps or abs(shift) > 64 * eps * float(one.abs().max())
            if moves and rest <= 16 * eps * float(torch.cat([one, other]).abs().max()):
                found[name] = torch.zeros_like(apart[name])
                added = f" and add {shift:.4g}" if shift else ""
                self._note(
                    f"the scale of {name}: other contents multiply the gradients of all other documents by "
                    f"{factor:.4g}{added}, which is right where the loss is divided by a count of contents"
                )
        return found

    def _note(self, text: str) -> None:
        """Add a note once for each thing that it is about."""
        if all(note.split(":")[0] != text.split(":")[0] for note in self.notes):
            self.notes.append(text)


def _scale_between(one: Tensor, other: Tensor, *, shifted: bool) -> tuple[float, float]:
    """The factor and the shift that turn one list of numbers best into another; no shift where that is not asked for.

    >>> numbers = torch.arange(100.0)
    >>> factor, shift = _scale_between(numbers, 2 * numbers + 1, shifted=True)
    >>> round(factor, 4), round(shift, 4)
    (2.0, 1.0)
    """
    # Two numbers can be turned into any other two.
    if not shifted or len(one) < _LEAST_NUMBERS or bool((one == one[0]).all()):
        return float(one @ other) / float(one @ one), 0.0
    apart, means = one - one.mean(), (one.mean(), other.mean())
    factor = float(apart @ (other - means[1])) / float(apart @ apart)
    return factor, float(means[1] - factor * means[0])


def _gathered(outcome: Outcome, name: str, base: Outcome, order: Tensor) -> Outcome | None:
    """The entries of documents that were moved, where they were before; None where they do not correspond."""
    entries, owners = outcome.entries[name], outcome.owners[name]
    before = base.owners[name]
    back: Tensor = base.entries[name].clone()
    for index, document in enumerate(order.tolist()):
        here, there = owners == index, before == document
        if int(here.sum()) != int(there.sum()):
            return None
        back[there.to(back.device)] = entries[here.to(entries.device)]
    return Outcome({name: back}, {name: before})


def _share(drift: float) -> str:
    """A relative change in words.

    >>> _share(0.1234), _share(3e-7)
    ('12.3%', '3e-07 of its size')
    """
    return f"{drift:.1%}" if drift >= 1e-3 else f"{drift:.2g} of its size"


def leak_text(leak: Leak, difference: Difference | None, count: int) -> str:
    """A leak in words, with its first module."""
    moved = causes.name_documents(leak.moved)
    what = (
        f"other contents of {causes.name_documents(leak.changed)} move {leak.name} of {moved} by {_share(leak.drift)}"
    )
    if len(leak.moved) > 1:
        what += f" ({len(leak.moved)} of {count - len(leak.changed)} documents that stayed)"
    where = "after the last module, in the step's own code" if leak.in_forward else "in the backward pass"
    return f"{what}; the first difference appears {difference or where}"


def noise_between(runs: DocumentRuns, base: Outcome, batch: Any, again: int) -> dict[str, float]:
    """How far apart runs of the same batch are: the largest difference of each result and gradient.

    Args:
        runs: of the step.
        base: the first run.
        batch: what the step takes.
        again: more runs, where the second one already differs.
    """
    noise = dict.fromkeys(base.entries, 0.0)
    for repeat in range(1 + again):
        other = runs.run(batch)
        for name, sizes in distances(base, other, runs.cases.count).items():
            noise[name] = max(noise[name], float(sizes.max()))
        for name, number in base.scalars.items():
            noise[name] = max(noise.get(name, 0.0), abs(other.scalars[name] - number))
        if repeat == 0 and not any(noise.values()):
            break
    return noise
