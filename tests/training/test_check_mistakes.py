"""check_step names mistakes: those in steps of ours, in well-known architectures, tutorials and transformers."""

from typing import Any

import known_idioms
import known_models
import pipelines
import pytest
import torch
import transformers_steps
from torch.nn import functional as F

from collate import LengthError, LengthTrackedBatch, PadCollator, apply_rnn, check_step

KNOWN = known_models.MISTAKES | known_idioms.MISTAKES | transformers_steps.MISTAKES
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LAST_COLUMN = "the last column taken for each row's last step"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, CUDA])])
@pytest.mark.parametrize("name", pipelines.MISTAKES)
def test_every_mistake_is_found(name: str, device: str) -> None:
    torch.manual_seed(0)
    net, (step, probes) = pipelines.Net().to(device), pipelines.MISTAKES[name]
    report = check_step(lambda b: step(net, b), pipelines.batch_on(device))
    assert {finding.probe for finding in report.findings} & probes, report
    with pytest.raises(LengthError, match="perhaps"):
        report.raise_if_broken()


@pytest.mark.parametrize("name", KNOWN)
def test_every_mistake_in_a_known_model_is_found(name: str) -> None:
    make, probes = KNOWN[name]
    module, step, batch = make()
    report = check_step(step, batch, module=module)
    assert {finding.probe for finding in report.findings} & probes, report


def test_forty_five_mistakes_are_tried_and_half_exist_elsewhere() -> None:
    assert len(KNOWN) >= 23
    assert len(KNOWN) + len(pipelines.MISTAKES) >= 45


@pytest.mark.parametrize("name", ["names: output[:, -1]"])
def test_the_last_column_is_the_likeliest_of_what_is_named(name: str) -> None:
    make, _ = KNOWN[name]
    _, step, batch = make()
    [dead] = [finding for finding in check_step(step, batch).findings if finding.probe == "dead step"]
    assert dead.likely[0].startswith(LAST_COLUMN)
    assert "all but the longest" in dead.what


def test_the_last_column_of_what_ran_over_padding_is_named() -> None:
    torch.manual_seed(0)
    net, (step, _) = pipelines.Net(), pipelines.MISTAKES["last column"]
    report = check_step(lambda b: step(net, b), pipelines.batch_on("cpu"))
    for finding in report.findings:
        if finding.probe in ("padding", "width"):
            assert any(LAST_COLUMN in mistake for mistake in finding.likely)


@pytest.mark.parametrize("rows", [3, 4, 5, 6])
@pytest.mark.parametrize("classes", [2, 6])
def test_rows_sorted_twice_are_found_for_every_seed(rows: int, classes: int) -> None:
    # An order that is its own inverse does not show it: with the flip and one random order it was missed in four of
    # eight seeds.
    torch.manual_seed(0)
    net, samples = pipelines.Net(), []
    samples.extend({"x": torch.randn(2 + index, 6), "label": index % classes} for index in range(rows))
    batch = PadCollator()(samples)

    def twice(b: dict[str, Any]) -> torch.Tensor:
        order = b["x"].lengths.argsort(descending=True, stable=True)
        state = apply_rnn(net.gru, LengthTrackedBatch(b["x"].padded[order], b["x"].lengths[order]))[1][-1]
        return F.cross_entropy(state[order], b["label"])

    for seed in range(8):
        report = check_step(twice, batch, seed=seed)
        assert "order" in {finding.probe for finding in report.findings}, (seed, report)
