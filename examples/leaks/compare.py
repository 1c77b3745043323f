"""What the programs in this folder share: a step on a row of documents, compared with each document alone."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from collate import VarlenBatch, check_step, masked_mean

Step = Callable[[VarlenBatch], Tensor]


def documents() -> VarlenBatch:
    """Three documents of tokens in one row of 16 steps."""
    torch.manual_seed(0)
    return VarlenBatch.from_sequences([torch.randint(3, 24, (n,)) for n in (5, 7, 3)], capacity=16)


def losses_of(logits: Tensor, batch: VarlenBatch, labels: Tensor | None = None) -> Tensor:
    """The mean loss of each document: `[N]`, from logits `[R, C, V]` and labels `[R, C]`."""
    labels = batch.next_step_labels().values if labels is None else labels
    return masked_mean(batch.with_values(cross_entropy(logits.transpose(1, 2), labels, reduction="none")))


def drift(step: Step, batch: VarlenBatch) -> float:
    """The largest ||a - b|| / ||b|| of a document's loss, where b is of the document alone in a row."""
    together, tokens = step(batch).detach(), batch.sequences()
    alone = torch.cat([step(VarlenBatch.from_sequences([document])).detach() for document in tokens])
    return float(((together - alone).abs() / alone.abs()).max())


def verdict(step: Step, batch: VarlenBatch) -> str:
    """What `check_step` finds, and the module in which it appears."""
    findings = check_step(step, batch).findings
    texts = [f"{finding.probe} {finding.what.partition('difference appears ')[2]}".strip() for finding in findings]
    return "; ".join(texts) or "nothing found"


def show(steps: Mapping[str, Step], batch: VarlenBatch) -> None:
    """Print the drift of each step, and what the check says."""
    print(f"{'':34}{'drift':>8}  check_step")
    for name, step in steps.items():
        print(f"{name:34}{round(drift(step, batch), 12):8.3g}  {verdict(step, batch)}")
