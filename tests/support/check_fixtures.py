"""The model and batch that the tests of `check_step` share, as fixtures to import."""

from typing import Any

import pytest
import torch
from pipelines import Net, batch_on

from collate.training.checking.report import StepReport


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def batch() -> dict[str, Any]:
    return batch_on("cpu")


def probes(report: StepReport) -> set[str]:
    return {finding.probe for finding in report.findings}
