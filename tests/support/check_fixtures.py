"""The model and batch that the tests of `check_step` share, as fixtures to import."""

import pytest
import torch
from pipelines import Net, batch_on

from collate import LengthTrackedBatch
from collate.training.checking.report import StepReport


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batch() -> dict[str, LengthTrackedBatch]:
    return batch_on("cpu")


def probes(report: StepReport) -> set[str]:
    return {finding.probe for finding in report.findings}
