"""The examples of frameworks are programs, and run: on as many processes as each case needs."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "frameworks"
PAGE = (ROOT / "docs" / "frameworks.md").read_text()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
FRAMEWORKS = ("lightning", "accelerate", "transformers", "datasets", "ray")

SAMPLES = 1200
# Seconds after which a test gives an example up.
PATIENCE = 300
TALLY = re.compile(
    r"^(?P<title>.+): (?P<batches>\d+) batches, (?P<samples>\d+) samples, (?P<held>.+), "
    r"padding (?P<padding>[\d.]+)%, loss (?P<loss>[\d.]+)$",
    re.MULTILINE,
)


@dataclass
class Epoch:
    """What an example says of an epoch; padding in percent."""

    title: str
    batches: int
    samples: int
    held: str
    padding: float
    loss: float


def needs(package: str) -> Any:
    return pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed")


def run(processes: int, name: str, *arguments: object) -> str:
    """Run an example, under torchrun if it takes several processes; what it wrote on its standard output."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    launcher = [sys.executable, *(torchrun if processes > 1 or name == "ddp_torchrun.py" else [])]
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "HF_HUB_OFFLINE": "1"}
    command = [*launcher, str(EXAMPLES / name), *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **settings}
    )
    try:
        out, err = process.communicate(timeout=PATIENCE)
    finally:
        # torchrun and Ray end their processes when they are asked to, and leave them when they are killed.
        process.terminate()
        process.wait(timeout=30)
    assert process.returncode == 0, out + err
    return out


def epochs_of(out: str) -> list[Epoch]:
    found = [match.groupdict() for match in TALLY.finditer(out)]
    kinds = Epoch.__annotations__
    return [Epoch(**{name: kinds[name](value) for name, value in facts.items()}) for facts in found]


def check_epochs(epochs: list[Epoch], count: int, processes: int = 1) -> None:
    """Each sample once, as many batches on every process, little padding, and a loss that falls by half."""
    assert len(epochs) == count
    for epoch in epochs:
        assert (epoch.samples, epoch.held) == (SAMPLES, "each once"), epoch
        assert epoch.batches % processes == 0
        assert epoch.padding < 8
    assert epochs[-1].loss < epochs[0].loss / 2


CASES = [
    pytest.param("stateful_dataloader.py", 1, 3, id="stateful-dataloader"),
    pytest.param("torchdata_nodes.py", 1, 2, id="torchdata-nodes"),
    pytest.param("accelerate_loop.py", 1, 3, id="accelerate", marks=needs("accelerate")),
    pytest.param("accelerate_loop.py", 2, 3, id="accelerate-2", marks=needs("accelerate")),
    pytest.param("lightning_module.py", 1, 3, id="lightning", marks=needs("lightning")),
    pytest.param("lightning_module.py", 2, 3, id="lightning-2", marks=needs("lightning")),
    pytest.param("lightning_packed.py", 1, 3, id="lightning-packed", marks=needs("lightning")),
    pytest.param("lightning_packed.py", 2, 3, id="lightning-packed-2", marks=needs("lightning")),
]


@pytest.mark.parametrize(("name", "processes", "count"), CASES)
def test_every_epoch_holds_each_sample_once_and_the_loss_falls(name: str, processes: int, count: int) -> None:
    check_epochs(epochs_of(run(processes, name)), count, processes)


@needs("transformers")
@needs("accelerate")
@pytest.mark.parametrize("processes", [1, 2])
def test_the_trainer_that_resumes_amid_an_epoch_holds_each_sample_once(processes: int, tmp_path: Path) -> None:
    out = run(processes, "huggingface_trainer.py", tmp_path)
    check_epochs(epochs_of(out), 3, processes)
    # In the middle and at the end: what `compute_metrics` gets and what `predict` returns.
    assert "predictions in order: True" in out


@needs("transformers")
@needs("accelerate")
@pytest.mark.parametrize("processes", [1, 2])
def test_the_trainer_takes_packed_rows_and_holds_each_sample_once(processes: int, tmp_path: Path) -> None:
    epochs = epochs_of(run(processes, "huggingface_packed.py", tmp_path))
    assert [epoch.held for epoch in epochs] == ["each once"] * 3
    assert max(epoch.padding for epoch in epochs) < 8
    assert epochs[0].loss > epochs[2].loss


def facts_of(program: str, *arguments: object) -> dict:
    """What one of the programs beside this test prints as JSON, in its last line."""
    command = [sys.executable, str(ROOT / "tests" / "support" / program), *map(str, arguments)]
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **settings}, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@needs("transformers")
@needs("accelerate")
def test_predictions_of_a_trainer_are_in_dataset_order_without_sorting(tmp_path: Path) -> None:
    predictions = facts_of("trainer_predict.py", tmp_path)
    of_rows = [place * (1 + place * 7 % 5) for place in range(24)]
    assert predictions["False"] == of_rows
    # What the page warns of.
    assert predictions["None"] != of_rows
    assert sorted(predictions["None"]) == sorted(of_rows)
    planned = predictions["planned"]
    # Red without `restore`: both were in the order of the lengths.
    assert planned["predictions"] == planned["seen"] == of_rows
    assert planned["labels"] == list(range(24))
    # Longest first, in batches of five.
    lengths = sorted((1 + place * 7 % 5 for place in range(24)), reverse=True)
    assert planned["widths"] == lengths[::5]
    # 71 steps make five rows of 16: with `max_steps`, the Trainer counts the mean of 24 samples in five updates.
    assert sum(lengths) == 71
    assert planned["per_update"] == 5


@needs("lightning")
@pytest.mark.parametrize(("way", "workers"), [("loader", 0), ("loader", 1), ("module", 1)])
def test_lightning_resumes_exactly_from_what_was_saved_during_fit(way: str, workers: int, tmp_path: Path) -> None:
    """With a loader of torchdata, as the page says; with our DataModule also from what was saved after it."""
    exact = facts_of("lightning_resume.py", tmp_path, workers, way)
    during = {"steps": True, "last": True, "edge": True, "after edge": True}
    assert exact == {**during, "epochs": way == "module", "after": way == "module"}


def test_ddp_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    file = tmp_path / "run.pt"
    first = epochs_of(run(2, "ddp_torchrun.py", file, 50))
    rest = epochs_of(run(1, "ddp_torchrun.py", file))
    assert [epoch.title for epoch in first + rest] == [
        "epoch 0, the last 32 steps by 2",
        "epoch 1, the last 27 steps by 1",
        "epoch 2, the last 63 steps by 1",
    ]
    check_epochs(first + rest, 3)


@needs("datasets")
def test_datasets_gives_the_lengths_of_its_rows_without_loading_them() -> None:
    out = run(1, "huggingface_datasets.py")
    check_epochs(epochs_of(out), 2)
    offsets, column = re.search(r"offsets \[(.+?)\] from the column \[(.+?)\]", out).groups()
    assert offsets == column


def test_webdataset_pads_less_when_the_stream_is_bucketed() -> None:
    bucketed, arrival = epochs_of(run(1, "webdataset_pipeline.py"))
    assert bucketed.held == arrival.held == "each once"
    assert bucketed.padding < arrival.padding / 5


@needs("ray")
@needs("moto")
def test_ray_nodes_index_a_corpus_in_a_store_and_train_on_it() -> None:
    out = run(1, "ray_data.py")
    assert "LengthIndex(1200 samples, 4 shards, fields=('bits',)), indexed by 2 nodes" in out
    epochs = epochs_of(out)
    assert [epoch.title for epoch in epochs] == ["streamed, 19 rows", "planned", "planned again"]
    assert [epoch.held for epoch in epochs] == ["each once"] * 3
    assert all(epoch.batches % 2 == 0 for epoch in epochs)
    assert max(epoch.padding for epoch in epochs[1:]) < epochs[0].padding / 5
    assert epochs[2].loss < epochs[0].loss / 2


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_to_run_it(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 90
    if "__main__" in text:
        assert f"examples/frameworks/{path.name}" in ast.get_docstring(ast.parse(text))


def blocks_of_the_page() -> list[tuple[str, str]]:
    """Each block of code that is no doctest, with the example that was named last before it."""
    found, example = [], ""
    for name, block in re.findall(r"`examples/frameworks/(\w+\.py)`|```python\n(.*?)```", PAGE, re.DOTALL):
        example = name or example
        if block and ">>>" not in block:
            found.append((example, block))
    return found


@pytest.mark.parametrize(("example", "block"), blocks_of_the_page())
def test_the_code_of_the_page_stands_in_its_example(example: str, block: str) -> None:
    lines = {line.strip() for line in (EXAMPLES / example).read_text().splitlines()}
    assert [line for line in block.splitlines() if line.strip() not in lines] == []


def test_the_page_names_every_example() -> None:
    shared = {"parity.py", "tally.py"}
    assert {path.name for path in EXAMPLES.glob("*.py")} - shared <= set(re.findall(r"frameworks/(\w+\.py)", PAGE))


def test_each_framework_is_an_extra_that_is_pinned() -> None:
    pinned = {line.split("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()}
    for name in FRAMEWORKS:
        assert name in pinned
        assert set(EXTRAS[name]) <= set(EXTRAS["frameworks"])


def test_the_core_imports_no_framework() -> None:
    code = f"import collate, samplers, sys; print(sorted(set(sys.modules) & {set(FRAMEWORKS)}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
