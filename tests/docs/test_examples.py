"""The examples are programs, and run: small, whole, interrupted, and resumed."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def start(name: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "error::UserWarning:collate", str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(name: str, *arguments: object) -> str:
    process = start(name, *arguments)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    return out


def checksum(out: str) -> str:
    return re.search(r"checksum of the sample ids so far: (\w{8})", out)[1]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus") / "stdlib"


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What an uninterrupted run prints; the first run writes the corpus."""
    return run("train_language_model.py", *settings(corpus, tmp_path_factory.mktemp("whole") / "run.pt"))


def settings(corpus: Path, checkpoint: Path, steps: int = 40) -> list[object]:
    small = ["--functions", 1500, "--max-tokens", 4096, "--steps", steps, "--save-every", 3, "--device", "cpu"]
    return [*small, "--data", corpus, "--checkpoint", checkpoint]


def test_the_five_minute_way_in_learns_and_is_short() -> None:
    out = run("five_minutes.py")
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert losses[-1] < 0.1 < losses[0]
    assert len((EXAMPLES / "five_minutes.py").read_text().splitlines()) < 40


def test_the_tests_of_a_step_run_as_users_run_them_and_as_the_page_says() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(EXAMPLES / "test_my_step.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed" in done.stdout
    page = (ROOT / "docs" / "check-step.md").read_text()
    assert f"```python\n{(EXAMPLES / 'test_my_step.py').read_text()}```\n" in page


def test_closed_shapes_are_few_cost_padding_and_still_learn() -> None:
    out = run("fixed_shapes.py", "--eager")
    planned = re.search(r"^4 widths: \d+ batches, shapes (.*)$", out, re.MULTILINE)[1]
    seen = re.findall(r"^shape (\(\d+, \d+\)):", out, re.MULTILINE)
    assert set(seen) <= {f"({rows}, {width})" for rows, width in re.findall(r"\((\d+), \((\d+),\)\)", planned)}
    assert len(seen) <= 6
    open_widths, *closed = [float(share) for share in re.findall(r"padding ([\d.]+)%", out)]
    assert open_widths < min(closed)
    assert max(closed) < 25
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", out)]
    assert losses[-1] < losses[0]
    assert len((EXAMPLES / "fixed_shapes.py").read_text().splitlines()) < 100


def test_a_cost_is_fitted_to_timed_steps_and_planned_by() -> None:
    """How well it predicts depends on what else the machine does: nothing is asked of that here."""
    out = run("fit_cost.py", "--seconds", 1)
    assert len(re.findall(r"FittedCost\(ms: .*; error [\d.]+% on held-out shapes of \d+", out)) == 2
    limits = [float(limit) for limit in re.findall(r"^  (\d+) ms ", out, re.MULTILINE)]
    slowest = [float(time) for time in re.findall(r"^  \d+ ms .* slowest +([\d.]+) ms", out, re.MULTILINE)]
    assert all(time <= limit + 1 for time, limit in zip(slowest, limits, strict=True))


def test_packed_documents_have_the_losses_of_padded_ones_and_less_padding() -> None:
    out = run("finetune_packed.py", "--functions", 40)
    padding = dict(re.findall(r"^(\w+) .* padding +([\d.]+)%$", out, re.MULTILINE))
    assert float(padding["packed"]) < float(padding["random"])
    assert float(re.search(r"differ by ([\d.e+-]+) at most", out)[1]) < 1e-4
    assert len((EXAMPLES / "finetune_packed.py").read_text().splitlines()) < 130


def test_a_mixture_has_its_shares_before_and_after_they_change() -> None:
    out = run("mixture.py", "--files", 60)
    shares = re.findall(r"^(?:code|text|sums) .* ([\d.]+)% +([\d.]+)%$", out, re.MULTILINE)
    assert [float(wanted) for _, wanted in shares] == [50, 40, 10, 20, 70, 10]
    assert max(abs(float(share) - float(wanted)) for share, wanted in shares) < 2
    assert "the resumed process has the same batches: True" in out
    assert float(re.search(r"documents of ([\d.]+) corpora share a row", out)[1]) > 1
    assert len((EXAMPLES / "mixture.py").read_text().splitlines()) < 130


def test_the_main_job_writes_plans_trains_and_proves(whole: str) -> None:
    assert "wrote 1,500 functions" in whole
    assert "trained 40 steps" in whole
    held_out, by_frequency = map(float, re.search(r"held-out loss: ([\d.]+) .* alone: ([\d.]+)", whole).groups())
    assert held_out < by_frequency - 0.1
    assert whole.count("equal to rounding") == 3
    assert "source order  restored" in whole
    assert "the step respects the lengths" in whole
    padding = float(re.search(r"^padding +([\d.]+)%", whole, re.MULTILINE)[1])
    random = float(re.search(r"same budget the padding is ([\d.]+)%", whole)[1])
    assert padding < random / 2


def test_a_second_start_checks_the_shards_instead_of_writing_them(whole: str, corpus: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.iterdir()}
    out = run("train_language_model.py", *settings(corpus, tmp_path / "run.pt"), "--workers", 0)
    assert "found 1,500 functions" in out
    assert {path: path.stat().st_mtime_ns for path in corpus.iterdir()} == before
    assert checksum(out) == checksum(whole)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)], ids=["kill", "ctrl-c"])
def test_an_interrupted_run_resumes_with_exactly_the_remaining_batches(
    sent: Any, code: int, whole: str, corpus: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "run.pt"
    process = start("train_language_model.py", *settings(corpus, checkpoint))
    for _ in range(6000):
        if checkpoint.exists() or process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(sent)
    out, err = process.communicate(timeout=120)
    assert process.returncode == code, out + err
    out = run("train_language_model.py", *settings(corpus, checkpoint), "--resume", "--workers", 0)
    assert checksum(out) == checksum(whole)


def test_resuming_without_a_checkpoint_says_so(corpus: Path, tmp_path: Path) -> None:
    process = start("train_language_model.py", *settings(corpus, tmp_path / "none.pt"), "--resume")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "there is no checkpoint at" in err


def test_the_same_shards_stream_through_webdataset(whole: str, corpus: Path) -> None:
    out = run("stream_webdataset.py", "--data", corpus)
    shares = [float(share) for share in re.findall(r"([\d.]+) ?%", out)]
    assert len(shares) >= 2
    assert min(shares) < max(shares) / 2


@pytest.mark.parametrize("name", ["train_language_model.py", "stream_webdataset.py"])
def test_help_explains_every_option(name: str) -> None:
    out = run(name, "--help")
    assert "--data" in out
    assert len(out.splitlines()) > 12
