"""The five mistakes as programs: what torch lets pass, and that lengthtrack gives what each row alone gives."""

import runpy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "pitfalls"
PAGE = (ROOT / "docs" / "five-mistakes.md").read_text()
ZERO = 1e-9

KEY_LINES = {
    "wrong_lengths": [
        "pack_padded_sequence: no error",
        "from_sequences: LengthError: sequences: sample 1 has 3 steps, its declared length is 5 (inflated",
        "PadCollator: LengthError: field 'x': sample 0 has 5 steps, its declared length is 3 (deflated",
        "verify: LengthError: row 0 has 3 steps, but its padding at step 3 holds",
    ],
    "unmasked_loss": [
        "torch, all cells",
        "lengthtrack, sequence",
        "torch unpacks [3, 5, 6] times its mask: RuntimeError",
        "torch unpacks [3, 1, 6] times its mask: [3, 8, 6]",
    ],
    "padding_by_hand": ["ignore_index=0 counts 11 of 16", "by LengthBucketBatchSampler", "lengthtrack, unsort"],
    "what_packing_does": [
        "torch       packs [6, 1, 4, 7, 2, 5, 8, 3, 9], batch sizes [3, 3, 2, 1]",
        "lengthtrack LengthError: lengths must be one per row, [3], got shape [2]",
        "lengthtrack TypeError: lengths must be integers, got torch.float32",
        "unpacked to a width of 4 by torch, 6 by lengthtrack",
    ],
    "padding_and_state": ["h_n over chunks", "key_padding_mask 0  cu_seqlens 0  nested 0", "4 of 20 real steps"],
}

each_script = pytest.mark.parametrize("name", KEY_LINES)


@cache
def printed(name: str) -> str:
    command = [sys.executable, "-W", "error", str(FOLDER / f"{name}.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def load() -> Any:
    """A script's own names, without running its main."""
    return cache(lambda name: runpy.run_path(str(FOLDER / f"{name}.py")))


@each_script
def test_every_script_runs_as_a_program_and_says_what_it_found(name: str) -> None:
    for line in KEY_LINES[name]:
        assert line in printed(name)


@each_script
def test_every_script_prints_the_same_each_time_and_the_page_shows_it(name: str) -> None:
    assert f"```text\n{printed(name)}```\n" in PAGE


def test_every_script_is_short_and_stands_on_the_page() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == sorted(KEY_LINES)
    for name in KEY_LINES:
        assert len((FOLDER / f"{name}.py").read_text().splitlines()) < 60
        assert f"`examples/pitfalls/{name}.py`" in PAGE


@pytest.mark.parametrize("declared", ["INFLATED", "DEFLATED"])
def test_wrong_lengths_bend_state_and_gradient_more_than_the_loss_tells(load: Any, declared: str) -> None:
    script = load("wrong_lengths")
    state, loss, gradient = script["drifts"](script[declared])
    assert state > 0.1
    assert gradient > 0.1
    assert loss < 0.02


def test_true_lengths_give_what_one_sequence_at_a_time_gives(load: Any) -> None:
    script = load("wrong_lengths")
    assert max(script["drifts"](None) + script["drifts"](script["TRUE"])) < ZERO


def test_padding_in_the_mean_changes_gradients_and_a_tracked_loss_does_not(load: Any) -> None:
    script = load("unmasked_loss")
    drifts = {name: script["drifts"](*pair) for name, pair in script["losses"]().items()}
    loss, rnn, weight, bias = drifts.pop("torch, all cells")
    assert min(rnn, weight, bias) > 0.1 > loss
    assert len(drifts) == 3
    assert max(map(max, drifts.values())) < ZERO


def test_a_mask_on_a_loss_that_is_a_mean_already_changes_nothing(load: Any) -> None:
    script = load("unmasked_loss")
    mean = script["losses"]()["torch, all cells"][0]
    for mask in (script["X"].mask, ~script["X"].mask):
        torch.testing.assert_close((mean * mask).sum() / mask.sum(), mean)


def test_bucketed_batches_compute_a_third_of_the_cells_or_less(load: Any) -> None:
    corpus, batch, bucketed = (cells for [cells] in load("padding_by_hand")["cells_per_token"]().values())
    assert corpus > batch > 3 * bucketed


def test_a_class_as_padding_turns_the_sign_of_its_own_gradient(load: Any) -> None:
    alone, ignoring, tracked = load("padding_by_hand")["losses"]().values()
    assert alone[1] < 0 < ignoring[1]
    assert tracked == pytest.approx(alone, abs=ZERO)


def test_sorted_rows_come_back_by_the_inverse_order_alone(load: Any) -> None:
    left, twice, inverse, tracked = (drift for [drift] in load("padding_by_hand")["state_drifts"]().values())
    assert min(left, twice) > 0.1
    assert max(inverse, tracked) < ZERO


@pytest.mark.parametrize(
    ("name", "by_torch", "by_lengthtrack"),
    [
        ("right", "packs [6, 1, 4", "packs [6, 1, 4"),
        ("too few", "packs", "LengthError: "),
        ("too many", "IndexError: ", "LengthError: "),
        ("beyond T", "packs", "LengthError: "),
        ("inflated", "packs", "packs"),
        ("floats", "packs", "TypeError: "),
        ("bools", "packs", "TypeError: "),
        ("an empty row", "RuntimeError: ", "packs"),
    ],
)
def test_lengths_that_do_not_fit_pass_torch_and_are_refused_here(
    load: Any, name: str, by_torch: str, by_lengthtrack: str
) -> None:
    script = load("what_packing_does")
    assert script["answer"]("torch", script["LENGTHS"][name]).startswith(by_torch)
    assert script["answer"]("lengthtrack", script["LENGTHS"][name]).startswith(by_lengthtrack)


def test_the_last_real_output_is_the_final_state_forward_and_not_backward(load: Any) -> None:
    forward, backward = load("what_packing_does")["last_step_drifts"]()
    assert forward < ZERO
    assert backward > 0.1


def test_padding_bends_final_and_carried_states_and_tracked_ones_are_exact(load: Any) -> None:
    script = load("padding_and_state")
    forward, backward, chunks = (*map(script["final_states"], (0, 1)), script["carried_states"]())
    assert min(forward["torch"], chunks["torch"]) > 0.1
    assert backward["torch"] > 0.01
    assert max(states["lengthtrack"] for states in (forward, backward, chunks)) < ZERO


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_attention_sees_real_steps_only_in_each_of_the_three_forms(load: Any) -> None:
    drifts = load("padding_and_state")["attention"]()
    assert min(drifts.pop("no_mask"), drifts.pop("swapped")) > 0.1
    assert sorted(drifts) == ["cu_seqlens", "key_padding_mask", "nested"]
    assert max(drifts.values()) < ZERO
