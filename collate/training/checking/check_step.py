"""Does a training step respect the lengths? A checker for users' own code.

The step is run again on batches that must give the same loss (other values in the padding, more padding, rows in
another order, one row at a time) and on batches that must not (another value at a row's last real time step). A typical
mistake with padding changes the loss by 1 % and the gradients by 50 %, and nothing raises: only a comparison shows it.

The rows [1, 2, 3] and [4] are padded to 2 x 3. A mean over all 6 cells is 10/6; with 3 more columns of zeros it is
10/12, off by 50 %. One at a time, the rows give 6/3 = 2 and 4/1 = 4. The mean of these is 2.5 if it is weighted by real
time steps (3/4 and 1/4), and 3 if not; neither is 10/6. The right mean, over 4 real time steps, is 2.5 in every probe:

>>> from collate import LengthTrackedBatch
>>> batch = LengthTrackedBatch.from_sequences([torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0])])
>>> wrong = check_step(lambda b: b.padded.sum() / b.padded.numel(), batch)
>>> [(finding.probe, f"{finding.drift:.0%}") for finding in wrong.findings if finding.probe != "padding"]
[('width', '50%'), ('other rows', '20%')]
>>> check_step(lambda b: b.flat().sum() / b.num_tokens, batch).ok
True
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from collate.errors import LengthError
from collate.training.checking.leaks.check_documents import report_of_documents
from collate.training.checking.leaks.documents import PlainCases, VarlenCases, holds_documents
from collate.training.checking.micro_batches import MicroBatches
from collate.training.checking.probes import ROUNDING, BatchProbes, Probes
from collate.training.checking.report import GUESSED, LIKELY, Finding, StepReport
from collate.training.checking.rerun import RAISED, LossStep, Runner, copied, undisturbed
from collate.training.checking.samples import Collate, Guess, SampleVariants
from collate.training.checking.variants import BatchVariants, check_fields


def check_step(
    step: LossStep,
    batch: Any = None,
    *,
    samples: Sequence[Any] | None = None,
    collate: Collate | None = None,
    module: nn.Module | None = None,
    seed: int = 0,
    tolerance: float = 1e-4,
    fields: Mapping[str, Any] | Collection[str] | None = None,
    cu_seqlens: Any = None,
    thorough: bool = False,
    micro_batches: int | None = None,
) -> StepReport:
    """Run a training step on changed batches, of which some must give the same loss and others must not.

    A batch that holds a `VarlenBatch`, or plain tensors with `cu_seqlens`, is checked for leaks between documents: the
    contents of some documents change, all lengths stay, and what every other document gives must stay the same bit
    for bit. The step may then return losses per document `[N]`, in the order of the rows, or any tensor with an entry
    per step, or a scalar.

    Every run starts from the random states of `seed` (torch, Python and NumPy), from the weights and buffers that
    modules have before the check, and from its own copy of the batch's values. Random states, weights and buffers are
    restored afterwards. torch's dropout is off during the check. A step that still draws random numbers gets only the
    probes that keep the shapes of its batch. The gradients of all leaves that the loss depends on are compared.

    Args:
        step: Takes a batch and returns a scalar loss, or a mapping of such losses, each of which is checked; it must
            not call `backward` nor move an optimizer.
        batch: A `LengthTrackedBatch`, or a mapping, tuple or list with at least one in it; tensors, arrays, lists and
            tuples with an entry per row go with the rows. It should hold rows of different lengths, none of them empty.
        samples: Instead of a batch, B samples of different lengths, to be collated by `collate`.
        collate: Makes a batch of any kind from a list of samples; its mistakes are found together with those of the
            step.
        module: The module that the step trains. Weights and buffers of modules that the step calls are found without
            it; those of a module that is used but never called are restored only if it is given here.
        seed: Seed of the values tried, and of the step's own random numbers.
        tolerance: Relative change of loss or gradients that counts as a difference. Between documents none does; there
            it says how far apart two runs of the same batch may be.
        fields: Plain tensors `[steps, ...]` or `[R, C, ...]` with contents of documents, by name, of which the step
            takes the mapping; or, next to a batch that is a mapping, the names of such tensors in it. Positions and
            other tensors made from lengths are no contents.
        cu_seqlens: Offsets of the documents in these, `[N + 1]`.
        thorough: Separate every pair of documents, in 2 ceil(log2 N) runs; otherwise odd ones change, then even ones.
        micro_batches: Of a step that accumulates gradients, the batches of an update. It takes a list of batches, and
            returns the sum of the losses whose `backward` it would call; `samples` are those of an update. However they
            are divided among the batches, the sum must be the same.

    Returns:
        The report.

    Raises:
        LengthError: The batch holds no `LengthTrackedBatch`, or none with padding to try; samples are too few or all of
            one length; a loss is not a scalar, or gradients cannot be taken.
        TypeError: The step returns no tensor and no mapping of tensors; or neither a batch nor samples with their
            collate function are given, or both; or fields without `cu_seqlens`; or `micro_batches` without samples.
        ValueError: `micro_batches` is below 2, or above the number of samples.
    """
    if fields is not None or cu_seqlens is not None:
        batch, fields = _plain_fields(batch, fields, cu_seqlens)
    _check_arguments(batch, samples, collate)
    if micro_batches is not None and samples is None:
        raise TypeError("micro_batches needs samples= and collate=, which it divides among batches")
    owner = module if module is not None else getattr(step, "__self__", None)
    with undisturbed(owner if isinstance(owner, nn.Module) else None) as buffers:
        if fields is not None:
            plain = PlainCases(batch, fields, cu_seqlens, seed)
            return report_of_documents(Runner(step, seed, buffers), plain, tolerance=tolerance, thorough=thorough)
        if samples is None or collate is None:
            if holds_documents(batch):
                cases = VarlenCases(batch, seed)
                return report_of_documents(Runner(step, seed, buffers), cases, tolerance=tolerance, thorough=thorough)
            variants = BatchVariants(batch, torch.Generator().manual_seed(seed))
            check_fields(variants)
            return _report_of_batch(Runner(step, seed, buffers), variants, tolerance)
        if micro_batches is not None:
            runner = Runner(step, seed, buffers)
            return _report_of_update(runner, samples, collate, tolerance=tolerance, count=micro_batches)
        return _report_of_samples(Runner(step, seed, buffers), samples, collate, tolerance)


def _report_of_batch(runner: Runner, variants: BatchVariants, tolerance: float) -> StepReport:
    """All probes of a batch."""
    # The inputs are no leaves to compare: their gradients change shape with the batch.
    runner.begin(variants.whole, [field.padded for field in variants.fields.values()])
    if report := _unfit(runner, variants.whole, tolerance):
        return report
    probes = BatchProbes(runner, variants, tolerance)
    found = [_without_graph(runner, probes), probes.padding(), probes.dead_step()]
    if runner.is_random:
        probes.skipped.append(
            "width, order and other rows: the step draws random numbers, and a batch of another shape gets other ones"
        )
        # On a wider batch other random numbers may have changed the loss. If nothing changed, the step recognises
        # padding by its value.
        found += _of_marks(probes, confirmed=bool(probes.marked) and probes.width() is not None)
    else:
        others = [probes.width(), probes.order(), probes.other_rows()]
        found += [*_of_marks(probes, confirmed=any(others)), *map(_with_rows(variants), others)]
    return StepReport(_loss(runner), tuple(finding for finding in found if finding), tuple(probes.skipped))


def _report_of_samples(inner: Runner, samples: Sequence[Any], collate: Collate, tolerance: float) -> StepReport:
    """All probes of samples, then those of the batch that they make.

    Raises:
        LengthError: Samples are too few, or of one length.
    """
    generator = torch.Generator().manual_seed(inner.seed)
    variants = SampleVariants(samples, lambda chosen: collate(copied(chosen)), generator)
    if variants.rows < 2 or (variants.lengths and all(len(set(each)) < 2 for each in variants.lengths.values())):
        raise LengthError(
            f"samples must be two or more of different lengths, got {variants.rows} with the lengths {variants.lengths}"
        )
    runner = Runner(lambda chosen: inner.step(collate(chosen)), inner.seed, inner.buffers)
    runner.begin(variants.whole)
    if report := _unfit(runner, variants.whole, tolerance):
        return report
    probes = Probes(runner, variants, tolerance)
    if not variants.lengths:
        probes.note("dead step of samples: they have no field that is a tensor, an array or a list of numbers")
    if runner.is_random:
        probes.skipped.append(
            "order, other rows and dead step of samples: the step or its collate function draws random numbers"
        )
        found: list[Finding] = []
    else:
        tried = [probes.dead_step(), probes.order(), probes.other_rows()]
        found = _explained([finding for finding in tried if finding], variants)
        if not any(finding.probe == "dead step" for finding in found):
            found += _of_guesses(inner, probes, variants)
    if finding := _without_graph(runner, probes):
        found.insert(0, finding)
    # Then the batch as any other, if it has padding: the collate function may be right and the step wrong.
    made = variants.collate(variants.whole)
    batch = BatchVariants(made, generator)
    if holds_documents(made):
        report = report_of_documents(inner, VarlenCases(made, inner.seed), tolerance=tolerance, thorough=False)
    elif not batch.fields or not batch.has_padding:
        return StepReport(_loss(runner), tuple(found), tuple(probes.skipped))
    else:
        report = _report_of_batch(inner, batch, tolerance)
    names = {finding.probe for finding in found}
    others = tuple(finding for finding in report.findings if finding.probe not in names)
    return replace(report, findings=(*found, *others), skipped=tuple(dict.fromkeys((*probes.skipped, *report.skipped))))


def _report_of_update(
    inner: Runner, samples: Sequence[Any], collate: Collate, *, tolerance: float, count: int
) -> StepReport:
    """All probes of samples in a single batch, and that of several batches.

    Raises:
        TypeError: The count is not an int.
        ValueError: It is below 2, or there are fewer samples.
    """
    of_one = Runner(lambda batch: inner.step([batch]), inner.seed, inner.buffers)
    divided = MicroBatches(inner, samples, collate, count)
    report = _report_of_samples(of_one, samples, collate, tolerance)
    if any(finding.probe in ("finite", "repeat") for finding in report.findings):
        return report
    found = divided.probe(tolerance)
    if isinstance(found, Finding):
        return replace(report, findings=(*report.findings, found))
    return replace(report, skipped=(*report.skipped, found)) if found else report


def _unfit(runner: Runner, batch: Any, tolerance: float) -> StepReport | None:
    """The report of a step that cannot be compared: a result is not finite, or a second run differs; else None."""
    for name, term in runner.base.items():
        if not term.is_finite:
            bad = sum(not bool(gradient.isfinite().all()) for gradient in term.gradients)
            what = f"the {f'term {name!r}' if name else 'loss'} is {term.loss:.6g}"
            what += f", {bad} of {len(term.gradients)} gradients are not finite: no other probe was made"
            return StepReport(_loss(runner), (Finding("finite", what, float("inf"), LIKELY["finite"]),))
    drift = runner.drift(runner.run(batch))
    if drift.size <= tolerance:
        return None
    what = f"the step remembers: the same batch with the same seed moves {drift}; no other probe was made"
    return StepReport(_loss(runner), (Finding("repeat", what, drift.size, LIKELY["repeat"]),))


def _without_graph(runner: Runner, probes: Probes) -> Finding | None:
    """The finding that no gradient flows from the loss; for some terms of several, which may be constant, a note."""
    if runner.without_graph == runner.names:
        what = "the loss has no graph, so that no gradient flows to the weights of the modules that the step runs"
        return Finding("graph", what, 0.0, LIKELY["graph"])
    for name in runner.without_graph:
        probes.note(f"gradients of term {name!r}: it has no graph, which is right only for a constant")
    return None


def _of_marks(probes: BatchProbes, *, confirmed: bool) -> list[Finding]:
    """Findings in padding whose value no real step holds; only notes if no other probe confirms them."""
    if confirmed:
        return [finding for _, finding in probes.marked[:1]]
    for name, _ in probes.marked:
        value = probes.variants.fields[name].padding_value
        probes.skipped.append(
            f"padding of {name}: the step recognises it by its value {value}, which no real step of this batch holds: "
            "right only if none ever does"
        )
    return []


def _with_rows(variants: BatchVariants) -> Callable[[Finding | None], Finding | None]:
    """A function that adds to a finding which parts were reordered with the rows."""
    taken = ", ".join(variants.taken_along())

    def explained(finding: Finding | None) -> Finding | None:
        if finding is None or not taken or finding.probe not in ("order", "other rows"):
            return finding
        return replace(finding, what=f"{finding.what}; {taken} followed the rows ({variants.rows} entries)")

    return explained


def _explained(findings: list[Finding], variants: SampleVariants) -> list[Finding]:
    """The findings; the first one also says what the collate function did, if that can be seen."""
    try:
        seen = (variants.lost_step() or variants.disagreement()) if findings else None
    except RAISED:
        # A collate function may refuse values that it was not written for.
        seen = None
    if seen is None:
        return findings
    return [replace(findings[0], what=f"{findings[0].what}; {seen}"), *findings[1:]]


def _of_guesses(inner: Runner, probes: Probes, variants: SampleVariants) -> list[Finding]:
    """The finding that lengths are guessed from values; only a note if no sample holds padding's value."""
    try:
        guess = variants.guessed()
    except RAISED as error:
        # A collate function may refuse values that it was not written for.
        probes.note(
            f"lengths guessed from values: on a sample that ends like padding, the collate function raises {error}"
        )
        return []
    if guess is None or not _is_read(inner, guess):
        return []
    if guess.can_be_real:
        return [probes.finding("dead step", guess.what, 0.0, GUESSED)]
    probes.note(f"{guess.what}: right only if no sample ever holds that number")
    return []


def _is_read(inner: Runner, guess: Guess) -> bool:
    """Whether the loss changes if the guessed lengths are replaced by the true ones."""
    try:
        losses, others = inner.values(guess.batch), inner.values(guess.otherwise)
    except RAISED:
        return True
    return any(not abs(losses[name] - others[name]) <= ROUNDING * abs(loss) for name, loss in losses.items())


def _loss(runner: Runner) -> float:
    """The loss of the whole batch; with several terms, their sum."""
    return sum(term.loss for term in runner.base.values())


def _plain_fields(
    batch: Any, fields: Mapping[str, Any] | Collection[str] | None, cu_seqlens: Any
) -> tuple[Any, list[str]]:
    """What the step takes, and the names of its plain tensors with contents of documents.

    Raises:
        TypeError: Fields are given without offsets, or offsets without fields.
    """
    if fields is None or cu_seqlens is None or isinstance(fields, str):
        raise TypeError("fields and cu_seqlens go together: tensors with the contents of documents, and their offsets")
    if (batch is None) != isinstance(fields, Mapping):
        raise TypeError("give fields as a mapping of tensors, or a batch and the names of its fields, and not both")
    return fields if batch is None else batch, list(fields)


def _check_arguments(batch: Any, samples: Sequence[Any] | None, collate: Collate | None) -> None:
    """Check that either a batch or samples with their collate function are given.

    Raises:
        TypeError: They are not.
    """
    if (samples is None) != (collate is None):
        raise TypeError("samples and collate go together: the samples, and the function that makes a batch of them")
    if (batch is None) == (samples is None):
        raise TypeError("give a batch, or samples= and collate=, and not both")
