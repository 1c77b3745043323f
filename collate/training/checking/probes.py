"""The probes of `check_step`: changes of a batch that must not affect the loss, and changes that must."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from collate.batch import LengthTrackedBatch
from collate.training.checking.report import COLLATED, LAST_COLUMN, LIKELY, OWN_COUNT, Finding
from collate.training.checking.rerun import RAISED, Drift, Runner, Term, Terms, combined
from collate.training.checking.variants import BatchVariants, Variants, mapped, shares_of, trimmed, widened

# How many rows have their last step tried, and how often: first with values of other real steps, then with wild values.
# With fewer tries a step that is read could look dead, because of a dead ReLU or a maximum at another step.
ROWS, TRIES = 8, 3
# If the loss still has not changed, all values of the field and the random numbers are drawn again this many times: the
# maximum may have been at another step, or a random mask may have hidden this one.
REDRAWN, REDRAWN_AT_RANDOM = 3, 12
# Another value at a real time step must change the loss by more than this fraction, the rounding error of one sum.
ROUNDING = 1e-9
# Above this many gradient entries (80 MB in float64) the weights of the rows are not solved for.
MANY = 10_000_000


class Probes:
    """Probes of rows: those of a batch, or samples that are collated first.

    Attributes:
        skipped: probes that could not be made, and why.
    """

    def __init__(self, runner: Runner, variants: Variants, tolerance: float) -> None:
        self.runner, self.variants, self.tolerance = runner, variants, tolerance
        self.skipped: list[str] = []
        self.collated = variants.kind == "sample"

    # --- changes that must not affect the loss

    def order(self) -> Finding | None:
        """The same rows in other orders."""
        try:
            drift = self.largest(self.runner.run(self.variants.chosen(order)) for order in self.orders())
        except RAISED as error:
            # Not a mistake by itself: packing may rely on rows that are longest first.
            self.skipped.append(f"order: on {self.variants.kind}s in another order the step raises {error}")
            return None
        return self.found("order", f"another order of the {self.variants.kind}s", drift)

    def orders(self) -> list[list[int]]:
        """Orders to try: reversed, all rows rotated by one, the first three rotated, and a random one.

        A reversed order is its own inverse, so that it hides rows that are sorted twice instead of being put back; the
        rotations show that.
        """
        rows = list(range(self.variants.rows))
        generator = torch.Generator().manual_seed(self.runner.seed)
        random = torch.randperm(len(rows), generator=generator, device="cpu").tolist()
        orders = [rows[::-1], rows[1:] + rows[:1], [*rows[1:3], *rows[:1], *rows[3:]], random]
        return [list(order) for order in dict.fromkeys(map(tuple, orders))]

    def other_rows(self) -> Finding | None:
        """One row at a time: the rows' losses must combine to the batch's, as a sum or as a mean over rows or steps."""
        alone: list[Terms] = []
        full = [row for row in range(self.variants.rows) if all(each[row] for each in self.variants.lengths.values())]
        for row in full:
            try:
                alone.append(self.runner.run(self.variants.alone(row)))
            except RAISED as error:
                what = f"{self.variants.kind} {row} alone makes the step raise {error}"
                return self.finding("other rows", what, math.inf)
        rows = self.variants.rows
        shares = [[1.0] * len(full), [1 / max(len(full), 1)] * len(full), [1 / rows] * len(full)]
        shares += shares_of([[each[row] for each in self.variants.lengths.values()] for row in full])
        shares += shares_of([self.variants.counts(row) for row in full])
        # Each term may have a mean of its own.
        drifts = {name: self.apart(name, alone, shares) for name in self.runner.base}
        name = max(drifts, key=drifts.__getitem__)
        if drifts[name] <= self.tolerance:
            return None
        what = (
            f"{self.variants.kind}s run one at a time give another {f'term {name!r}' if name else 'loss'} or gradient, "
            f"as a sum and as any mean{f', off by {drifts[name]:.2%}' if math.isfinite(drifts[name]) else ''}"
        )
        if strange := [row for row, outcome in zip(full, alone, strict=True) if not outcome[name].is_finite]:
            what += f"; {self.variants.kind} {strange[0]} alone gives {alone[full.index(strange[0])][name].loss:.6g}"
        own_count = self.fits_other_shares([outcome[name] for outcome in alone], self.runner.base[name])
        return self.finding("other rows", what, drifts[name], OWN_COUNT if own_count else None)

    def apart(self, name: str, alone: Sequence[Terms], shares: Sequence[Sequence[float]]) -> float:
        """The smallest distance between a term of the batch and a weighted sum of the rows' terms."""
        terms, whole = [outcome[name] for outcome in alone], {name: self.runner.base[name]}
        # Losses, one number each, narrow the weights down first; gradients have many entries.
        losses = [{name: Term(combined(terms, share, gradients=False).loss, whole[name].gradients)} for share in shares]
        apart = [self.runner.drift(loss, whole).size for loss in losses]
        able = [index for index, size in enumerate(apart) if size <= max(self.tolerance, min(apart))]
        return min(self.runner.drift({name: combined(terms, shares[at])}, whole).size for at in able)

    def fits_other_shares(self, alone: Sequence[Term], whole: Term) -> bool:
        """Whether some other weights of the rows give the batch's gradients: then rows do not influence each other."""
        numbers = len(alone) * sum(gradient.numel() for gradient in whole.gradients)
        if not 0 < numbers < MANY or not all(term.is_finite for term in alone):
            return False
        rows = torch.stack([torch.cat([part.double().flatten() for part in term.gradients]) for term in alone], 1)
        target = torch.cat([part.double().flatten() for part in whole.gradients])
        weights = torch.linalg.lstsq(rows.cpu(), target.cpu()[:, None]).solution
        apart = (rows.cpu() @ weights)[:, 0] - target.cpu()
        return bool(apart.norm() <= max(self.tolerance, 1e-3) * target.cpu().norm()) and bool((weights > 0).all())

    # --- a change that must affect it

    def dead_step(self) -> Finding | None:
        """Another value at a row's last real step must move the loss."""
        unread, names = [], list(self.variants.lengths)
        for name in names:
            rows = self.rows_to_try(name)
            # Two cases are no findings: a field that is not read at all, and a model that reads the first step only,
            # such as a class token.
            if rows and not self.moves(self.variants, name, None, slice(None), tries=TRIES):
                unread.append(name)
                continue
            dead = self.dead(name, rows)
            if (
                dead
                and not (dead == rows and self.reads_first_only(name, rows))
                and not self.is_meant(name, rows, dead)
            ):
                return self.dead_finding(name, rows, dead)
        if names and unread == names:
            return self.finding("dead step", f"no value of {', '.join(names)} moves the loss: nothing is read", 0.0)
        return None

    def rows_to_try(self, name: str) -> list[int]:
        """Up to `ROWS` rows of a field that are not empty; none if there is no other value to try."""
        if self.variants.is_alike(name):
            self.note(f"dead step: {name} holds the same number everywhere")
            return []
        return [row for row, length in enumerate(self.variants.lengths[name]) if length][:ROWS]

    def dead(self, name: str, rows: Sequence[int]) -> list[int]:
        """The rows whose last step does not count."""
        return [row for row in rows if not self.matters(name, row, self.variants.lengths[name][row] - 1)]

    def dead_finding(self, name: str, rows: Sequence[int], dead: Sequence[int]) -> Finding:
        """The finding for rows whose last step does not count."""
        lengths, row, kind = self.variants.lengths[name], dead[0], self.variants.kind
        what = f"step {lengths[row] - 1} of {kind} {row} of {name}, its last, never counts"
        longest = max(lengths)
        only_longest = all((lengths[row] < longest) == (row in dead) for row in rows)
        what += f" ({len(dead)} of {len(rows)} {kind}s tried{', all but the longest' if only_longest else ''})"
        return self.finding("dead step", what, 0.0, LAST_COLUMN if only_longest else None)

    def matters(self, name: str, row: int, step: int) -> bool:
        """Whether another value at one step moves the loss."""
        return self.counts(self.variants, name, row, slice(step, step + 1))

    def counts(self, variants: Variants, name: str, row: int, steps: slice) -> bool:
        """Whether other values at these steps change the loss, for some values of the other steps and some seed."""
        if self.moves(variants, name, row, steps, tries=TRIES):
            return True
        for attempt in range(REDRAWN_AT_RANDOM if self.runner.is_random else REDRAWN):
            redrawn = variants.of(variants.changed(name, None, slice(None), wild=False))
            if self.moves(redrawn, name, row, steps, seed=self.runner.seed + attempt):
                return True
        return False

    def moves(
        self, variants: Variants, name: str, row: int | None, steps: slice, *, tries: int = 1, seed: int | None = None
    ) -> bool:
        """Whether other values at these steps change the loss; an error of the step counts as a change."""
        try:
            base = self.runner.values(variants.whole, seed)
            for attempt in range(2 * tries if all(map(math.isfinite, base.values())) else 0):
                values = self.runner.values(variants.changed(name, row, steps, wild=attempt >= tries), seed)
                if not all(abs(values[term] - loss) <= ROUNDING * abs(loss) for term, loss in base.items()):
                    return True
        except RAISED as error:
            self.note(f"dead step of {name}: with other values the step raises {error}")
            return True
        return False

    # --- last steps that rightly do not count

    def reads_first_only(self, name: str, rows: Sequence[int]) -> bool:
        """Whether the first step of each row counts and the second does not."""
        long = [row for row in rows if self.variants.lengths[name][row] > 1]
        first = all(self.matters(name, row, 0) for row in long)
        return bool(long) and first and not any(self.matters(name, row, 1) for row in long)

    def is_meant(self, name: str, rows: Sequence[int], dead: Sequence[int]) -> bool:
        """Whether last steps do not count because targets are shifted, or because of a stride; the report notes it."""
        if other := self.shifted_against(name, rows, dead):
            self.skipped.append(
                f"dead step: the last step of {name} counts in no row, nor does the first of {other}: right if targets "
                "are shifted by one"
                if len(dead) == len(rows)
                else f"dead step: rows of one step of {name} never count: right if targets are shifted by one"
            )
            return True
        if self.is_stride(name, rows, dead):
            self.skipped.append(
                f"dead step: whether the last steps of {name} count depends on a row's length: right if a convolution "
                "or pooling with a stride leaves a remainder"
            )
            return True
        return False

    def shifted_against(self, name: str, rows: Sequence[int], dead: Sequence[int]) -> str | None:
        """The field that this one is shifted against: inputs without the last step, targets without the first."""
        lengths = self.variants.lengths[name]
        long = [row for row in rows if lengths[row] > 1]
        others = [other for other, found in self.variants.lengths.items() if found == lengths and other != name]
        for other in others if long else ():
            if set(long) <= set(dead):
                inputs, targets = name, other
            elif not set(long) & set(dead):
                inputs, targets = other, name
            else:
                continue
            # Each input predicts the next step's target: the last input never counts, nor does the first target.
            read = [(inputs, row, lengths[row] - 2) for row in long] + [
                (targets, row, lengths[row] - 1) for row in long
            ]
            left = [(inputs, row, lengths[row] - 1) for row in long] if inputs == other else []
            left += [(targets, row, 0) for row in long]
            if all(self.matters(*step) for step in read) and not any(self.matters(*step) for step in left):
                return other
        return None

    def is_stride(self, name: str, rows: Sequence[int], dead: Sequence[int]) -> bool:
        """Whether rows end in a remainder that a stride leaves over; tested on shortened rows.

        With stride 2 and a kernel of 2, a row of 5 leaves the remainder 1: cut to 4 it gives the same loss, cut to 3 it
        leaves a remainder again. Lengths that are too small by one fail the first test; a step that cuts all rows to a
        fixed width fails the second. If the step draws random numbers, losses of a shortened row cannot be compared;
        then remainders must differ from row to row.
        """
        lengths = self.variants.lengths[name]
        row = max(dead, key=lengths.__getitem__)
        remainder = self.remainder(name, row)
        last = lengths[row] - remainder - 2
        if last < 0:
            return False
        try:
            fewer = self.variants.cut(name, row, remainder + 1)
            if self.counts(fewer, name, row, slice(last, last + 1)):
                return False
            if self.runner.is_random:
                return len({self.remainder(name, other) if other in dead else 0 for other in rows}) > 1
            values = self.runner.values(self.variants.cut(name, row, remainder).whole)
        except RAISED:
            return False
        base = {term: outcome.loss for term, outcome in self.runner.base.items()}
        return all(abs(values[term] - loss) <= self.tolerance * abs(loss) for term, loss in base.items())

    def remainder(self, name: str, row: int) -> int:
        """The number of steps at the end of a row that do not count, found by bisection."""
        length = self.variants.lengths[name][row]
        dead, alive = 1, length
        while alive - dead > 1:
            middle = (dead + alive) // 2
            if self.counts(self.variants, name, row, slice(length - middle, length)):
                alive = middle
            else:
                dead = middle
        return dead

    # --- shared by the probes

    def note(self, reason: str) -> None:
        """Add to `skipped`, once."""
        self.skipped += [reason] if reason not in self.skipped else []

    def largest(self, outcomes: Iterator[Terms]) -> Drift:
        """The largest drift of some runs."""
        return max((self.runner.drift(outcome) for outcome in outcomes), key=lambda drift: drift.size)

    def found(self, probe: str, changed: str, drift: Drift) -> Finding | None:
        """A finding if the drift is above the tolerance."""
        if drift.size <= self.tolerance:
            return None
        return self.finding(probe, f"{changed} moves {drift}", drift.size)

    def finding(self, probe: str, what: str, drift: float, likeliest: str | None = None) -> Finding:
        """A finding with the mistakes that look like it, the likeliest first."""
        likely = (*(COLLATED.get(probe, ()) if self.collated else ()), *LIKELY[probe])
        if likeliest:
            likely = (likeliest, *(mistake for mistake in likely if mistake != likeliest))
        return Finding(probe, what, drift, likely)


class BatchProbes(Probes):
    """Probes of a batch, including its padding."""

    variants: BatchVariants

    def __init__(self, runner: Runner, variants: BatchVariants, tolerance: float) -> None:
        super().__init__(runner, variants, tolerance)
        self.marked: list[tuple[str, Finding]] = []

    def padding(self) -> Finding | None:
        """Other values in the padding, one field at a time.

        A step may recognise padding by a value that no real step holds: such findings go to `marked`.
        """
        for name, field in self.variants.fields.items():
            if bool(field.mask.all()) or _is_marked(field):
                continue
            found = self.padding_of(name, ~field.mask)
            if found and _may_be_marked(field):
                self.marked.append((name, found))
            elif found:
                return found
        return None

    def padding_of(self, name: str, mask: Tensor) -> Finding | None:
        """Other values in this padding: first those of real steps, then wild ones."""
        changed = f"the padding of {name}"
        found = self.compare("padding", self.variants.with_values(name, mask, wild=False), changed)
        if found:
            return found
        try:
            outcome = self.runner.run(self.variants.with_values(name, mask, wild=True))
        except RAISED:
            # The step may refuse values that no real step could hold, such as a probability of 7.
            return None
        if not all(term.is_finite for term in outcome.values()):
            return None
        return self.found("padding", changed, self.runner.drift(outcome))

    def width(self) -> Finding | None:
        """A few more steps of padding on every field."""
        try:
            outcome = self.runner.run(mapped(self.variants.whole, widened))
        except RAISED:
            return self.width_of_a_row()
        return self.found("width", "a wider batch", self.runner.drift(outcome))

    def width_of_a_row(self) -> Finding | None:
        """One row at the batch's width, compared with the same row without padding.

        This replaces the wider batch where the step refuses one: its table of positions may be exactly as long as the
        batch is wide.
        """
        name = next(name for name, field in self.variants.fields.items() if not bool(field.mask.all()))
        row = min(range(self.variants.rows), key=self.variants.lengths[name].__getitem__)
        wide = self.variants.chosen([row])
        try:
            narrow = self.runner.run(mapped(wide, trimmed))
        except RAISED as error:
            self.skipped.append(f"width: on a wider batch, and on one row, the step raises {error}")
            return None
        try:
            drift = self.runner.drift(self.runner.run(wide), narrow)
        except RAISED as error:
            return self.finding("width", f"a batch wider than its rows makes the step raise {error}", math.inf)
        return self.found("width", f"row {row} with padding", drift)

    def compare(self, probe: str, batch: Any, changed: str) -> Finding | None:
        """A finding if a batch that must give the same loss gives another one, or makes the step raise."""
        try:
            drift = self.runner.drift(self.runner.run(batch))
        except RAISED as error:
            return self.finding(probe, f"{changed} makes the step raise {error}", math.inf)
        return self.found(probe, changed, drift)


def _is_marked(field: LengthTrackedBatch) -> bool:
    """Whether padding is a negative whole number that means "no target", such as -100; real steps may hold it too."""
    value, real = field.padding_value, field.flat()
    if real.is_floating_point() or real.is_complex() or value is None or value >= 0:
        return False
    return bool(((real >= 0) | (real == value)).all()) and bool((real != value).any())


def _may_be_marked(field: LengthTrackedBatch) -> bool:
    """Whether padding is a whole number that no real step of this batch holds, such as a padding token."""
    if field.padded.is_floating_point() or field.padded.is_complex() or field.padding_value is None:
        return False
    return not bool((field.flat() == field.padding_value).any())
