"""check_step accuses no right training step: ours, well-known architectures, torch's tutorials and transformers."""

import known_idioms
import known_models
import pipelines
import pytest
import torch
import transformers_steps

from collate import check_step

KNOWN = known_models.RIGHT | known_idioms.RIGHT | transformers_steps.RIGHT
pytestmark = pytest.mark.usefixtures("one_thread")
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, CUDA])])
@pytest.mark.parametrize("name", pipelines.RIGHT)
def test_no_right_pipeline_is_accused(name, device):
    torch.manual_seed(0)
    net = pipelines.Net().to(device)
    report = check_step(lambda b: pipelines.RIGHT[name](net, b), pipelines.batch_on(device), module=net)
    assert report.ok, report
    report.raise_if_broken()


@pytest.mark.parametrize("name", KNOWN)
def test_no_known_model_is_accused(name):
    _, step, batch = KNOWN[name]()
    report = check_step(step, batch)
    assert report.ok, report


def test_forty_right_steps_are_tried_and_half_exist_elsewhere():
    assert len(KNOWN) >= 20
    assert len(KNOWN) + len(pipelines.RIGHT) >= 40


@pytest.mark.parametrize("name", ["GPT-2, a prompt without loss", "Llama"])
def test_shifted_targets_are_reported_and_not_accused(name):
    _, step, batch = KNOWN[name]()
    report = check_step(step, batch)
    assert report.ok
    assert any("right where targets are shifted by one" in reason for reason in report.skipped), report


def test_what_a_stride_leaves_over_is_reported_and_not_accused():
    _, step, batch = KNOWN["wav2vec 2.0 with CTC"]()
    report = check_step(step, batch)
    assert any("a stride leaves a rest over" in reason for reason in report.skipped), report


def test_a_token_for_padding_is_reported_and_not_accused():
    _, step, batch = KNOWN["tutorial: nn.Transformer translation"]()
    report = check_step(step, batch)
    assert any("the step knows it by its value 0" in reason for reason in report.skipped), report
