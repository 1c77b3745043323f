"""Does the content of one document reach another? All probes of a batch of documents, and their report.

Lengths stay, so shapes and the order of every sum stay. What a document gives must therefore be the same bit for bit
when others change, in any dtype, and no tolerance hides a small leak. A loss over a row that is normalised by the
row's own mean leaks:

>>> import torch
>>> from collate import VarlenBatch
>>> from collate.training.checking.rerun import Runner, undisturbed
>>> batch = VarlenBatch.from_sequences([torch.randn(n, 4) for n in (3, 5, 2)])
>>> def step(batch):
...     return (batch.values - batch.values.mean()).square().sum(2)
>>> with undisturbed(None) as buffers:
...     report = report_of_documents(Runner(step, 0, buffers), VarlenCases(batch, 0), tolerance=1e-4, thorough=False)
>>> [finding.probe for finding in report.findings]
['other documents']
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from collate.errors import LengthError
from collate.training.checking.leaks import causes
from collate.training.checking.leaks.documents import DocumentCases, VarlenCases
from collate.training.checking.leaks.outcomes import Outcome
from collate.training.checking.leaks.probes import (
    NOISE_MARGIN,
    DocumentProbes,
    change_sets,
    leak_text,
    noise_between,
)
from collate.training.checking.leaks.runs import DocumentRuns, in_evaluation
from collate.training.checking.leaks.traces import BATCH_NORMS, meeting_of
from collate.training.checking.report import LIKELY, Finding, StepReport
from collate.training.checking.rerun import Runner

__all__ = ["VarlenCases", "report_of_documents"]

# Where one of these is found, documents that move when they are turned say nothing new.
_DECISIVE = ("other documents", "dead document", "meeting")
# Runs of the same batch beyond the second, where that one already differs.
_MORE_RUNS = 2


def report_of_documents(runner: Runner, cases: DocumentCases, *, tolerance: float, thorough: bool) -> StepReport:
    """Run all probes of documents.

    Args:
        runner: the step, its seed and buffers.
        cases: the batch.
        tolerance: relative difference of two runs of the same batch from which on a step does not repeat itself.
        thorough: separate every pair of documents, in 2 ceil(log2 N) runs instead of two.

    Raises:
        LengthError: Fewer than two documents have steps; or a result has a shape that says nothing of documents.
        TypeError: The step returned no tensor.
    """
    runs = DocumentRuns(runner, cases)
    if sum(length > 0 for length in cases.lengths.tolist()) < 2:
        raise LengthError(
            f"leaks are between documents, give a batch of two or more that have steps, got {cases.lengths.tolist()}"
        )
    with runner.buffers.of_all_that_run():
        base = runs.run(cases.whole)
    if finding := _unfit(base, runner):
        return StepReport(base.loss, (finding,))
    noise = noise_between(runs, base, cases.whole, _MORE_RUNS)
    if finding := _not_repeated(base, noise, tolerance):
        return StepReport(base.loss, (finding,))
    probes = DocumentProbes(runs, base, noise)
    skipped = _notes_of(base, noise)
    findings, meetings = _leaks(probes, thorough=thorough)
    if runner.buffers.are_of_trained_modules and not base.has_graph:
        findings.insert(0, _without_graph())
    findings += [finding for finding in (probes.dead_document(),) if finding]
    if not any(finding.probe in _DECISIVE for finding in findings):
        findings += [finding for finding in (probes.order(),) if finding]
    notes = [*skipped, *cases.notes, *runs.notes, *probes.notes, *meetings]
    return StepReport(base.loss, tuple(findings), tuple(dict.fromkeys(notes)))


def _leaks(probes: DocumentProbes, *, thorough: bool) -> tuple[list[Finding], list[str]]:
    """Leaks and meetings, and what could not be checked behind a meeting."""
    sets = change_sets(probes.documents, thorough=thorough)
    leak = probes.leak(sets)
    if leak is None:
        return [], []
    leak = probes.culprit(leak)
    difference = probes.where(leak)
    text = leak_text(leak, difference, probes.count)
    meeting = meeting_of(difference.module, difference.name) if difference else None
    if meeting is None:
        likely = causes.OTHER_DOCUMENTS if leak.in_forward or difference else causes.BACKWARD
        return [Finding("other documents", text, leak.drift, likely)], []
    finding = Finding(
        "meeting", f"documents meet on purpose, by {meeting}: {text}", leak.drift, causes.MEETING[meeting]
    )
    if meeting != "batch norm":
        return [finding], ["other documents, behind the experts: what they mix hides what comes after them"]
    return [finding, *_behind(probes, sets)], []


def _behind(probes: DocumentProbes, sets: Sequence[Sequence[int]]) -> list[Finding]:
    """Leaks that remain where all batch norms run as in evaluation."""
    norms: list[nn.Module] = [
        module for module in probes.runs.runner.buffers.modules if isinstance(module, BATCH_NORMS)
    ]
    with in_evaluation(norms):
        base = probes.runs.run(probes.cases.whole)
        again = DocumentProbes(probes.runs, base, noise_between(probes.runs, base, probes.cases.whole, _MORE_RUNS))
        leak = again.leak(sets)
        if leak is None:
            return []
        leak = again.culprit(leak)
        difference = again.where(leak)
        text = f"with batch norm as in evaluation, {leak_text(leak, difference, again.count)}"
        return [Finding("other documents", text, leak.drift, causes.OTHER_DOCUMENTS)]


def _unfit(base: Outcome, runner: Runner) -> Finding | None:
    """The finding that nothing can be compared: results are not finite, or nothing of documents is seen.

    Raises:
        LengthError: A scalar's gradients do not reach any step of a document.
    """
    if not base.is_finite:
        what = f"the loss is {base.loss:.6g}, and not all results and gradients of documents are finite"
        return Finding("finite", f"{what}: no other probe was made", float("inf"), LIKELY["finite"])
    if base.entries:
        return None
    if runner.buffers.are_of_trained_modules and not base.has_graph:
        return _without_graph()
    raise LengthError(
        "the step returns one number, and its gradients reach no field or embedding with an entry per step, so that "
        "nothing of single documents is seen: return losses per document [N], or per step"
    )


def _without_graph() -> Finding:
    """The finding that a loss trains nothing."""
    what = "the loss has no graph, so that no gradient flows to the weights of the modules that the step runs"
    return Finding("graph", what, 0.0, LIKELY["graph"])


def _not_repeated(base: Outcome, noise: dict[str, float], tolerance: float) -> Finding | None:
    """The finding that the same batch gives something else each time, by more than rounding."""
    sizes = {name: float(entry.abs().max()) if entry.numel() else 0.0 for name, entry in base.entries.items()}
    sizes |= {name: abs(number) for name, number in base.scalars.items()}
    for name, apart in noise.items():
        drift = apart / max(sizes[name], 1e-30)
        if drift > tolerance:
            what = f"the step remembers: the same batch with the same seed moves {name or 'the loss'} by {drift:.2%}"
            return Finding("repeat", f"{what}; no other probe was made", drift, LIKELY["repeat"])
    return None


def _notes_of(base: Outcome, noise: dict[str, float]) -> list[str]:
    """What the results do not show."""
    notes = []
    noisy: dict[str, Any] = {name: size for name, size in noise.items() if size}
    if noisy:
        most = ", ".join(f"{name or 'the loss'} by {size:.2g}" for name, size in noisy.items())
        notes.append(
            f"bits: two runs of the same batch differ ({most}); differences below {NOISE_MARGIN:g} times that are not "
            "seen"
        )
    if base.scalars:
        notes.append(
            "losses of documents: the step returns one number, so gradients at the steps of documents were compared; "
            "return losses [N] or per step to see more"
        )
    return notes
