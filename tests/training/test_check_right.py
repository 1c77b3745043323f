"""check_step accuses no right training step: ours, well-known architectures, torch's tutorials and transformers."""

import known_idioms
import known_models
import pipelines
import pytest
import torch
import transformers_steps
from transformers import BatchEncoding

from collate import check_step

KNOWN = known_models.RIGHT | known_idioms.RIGHT | transformers_steps.RIGHT
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, CUDA])])
@pytest.mark.parametrize("name", pipelines.RIGHT)
def test_no_right_pipeline_is_accused(name: str, device: str) -> None:
    torch.manual_seed(0)
    net = pipelines.Net().to(device)
    report = check_step(lambda b: pipelines.RIGHT[name](net, b), pipelines.batch_on(device), module=net)
    assert report.ok, report
    report.raise_if_broken()


# What is right under a condition is said, and not accused.
NOTED = {
    "GPT-2, a prompt without loss": "right if targets are shifted by one",
    "Llama": "right if targets are shifted by one",
    "wav2vec 2.0 with CTC": "a stride leaves a remainder",
    "tutorial: nn.Transformer translation": "the step recognises it by its value 0",
    "scheduled sampling": "the step draws random numbers",
}


@pytest.mark.parametrize("name", KNOWN)
def test_no_known_model_is_accused(name: str) -> None:
    _, step, batch = KNOWN[name]()
    report = check_step(step, batch)
    assert report.ok, report
    assert NOTED.get(name, "") in str(report)


def test_the_encoding_of_a_tokenizer_is_taken() -> None:
    _, step, batch = KNOWN["BERT token classification"]()
    assert check_step(step, BatchEncoding(batch)).ok


def test_forty_right_steps_are_tried_and_half_exist_elsewhere() -> None:
    assert len(KNOWN) >= 20
    assert len(KNOWN) + len(pipelines.RIGHT) >= 40
