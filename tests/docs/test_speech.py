"""The speech example learns from wav files, and its batches have the lengths and outputs of their samples."""

import io
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import webdataset as wds

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(*arguments: object) -> str:
    command = [sys.executable, str(EXAMPLES / "speech_digits.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses_of(out: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"loss ([\d.]+) nats per digit", out)]


@pytest.fixture(scope="module")
def whole() -> str:
    """What the program prints by default."""
    return run()


def test_it_tells_the_corpus_and_pads_far_less_than_random_batches(whole: str) -> None:
    assert re.search(r"1,500 samples, 1,\d{3} s of sound, 0.\d\d to 2.\d\d s each", whole)
    planned, random = map(float, re.search(r"padding ([\d.]+)%, in random batches ([\d.]+)%", whole).groups())
    assert planned < random / 5


def test_it_learns_to_read_strings_that_it_has_not_heard(whole: str) -> None:
    before, after = losses_of(whole)
    assert after < 0.2 < 2 < before
    shares = [float(share) for share in re.findall(r"([\d.]+)% of 150 held-out samples right", whole)]
    assert shares[0] < 5
    assert shares[1] > 85


def test_a_batch_equals_its_samples_and_has_the_lengths_of_their_files(whole: str) -> None:
    drift = float(re.search(r"8 held-out samples, .* largest difference ([\d.e-]+)", whole)[1])
    assert drift < 1e-4
    on_disk, in_batch = re.search(r"in their files (\[.+?\]), in the batch (\[.+?\])", whole).groups()
    assert on_disk == in_batch
    assert len(set(on_disk.split(","))) > 1


def test_it_reads_shards_that_are_given_with_a_class_for_each_sound(tmp_path: Path) -> None:
    write_classes(tmp_path, 8000)
    before, after = losses_of(run("--shards", tmp_path, "--steps", 15))
    assert after < before


def test_sound_of_another_rate_is_refused(tmp_path: Path) -> None:
    write_classes(tmp_path, 16_000)
    with pytest.raises(AssertionError, match=r"must be at 8000 Hz, got 16000.*\n.*classes.tar: group '0', field 'wav'"):
        run("--shards", tmp_path)


def write_classes(folder: Path, rate: int) -> None:
    """A shard of one digit a sound."""
    dial = runpy.run_path(str(EXAMPLES / "touch_tones.py"))["dial"]
    rng = np.random.default_rng(0)
    with wds.TarWriter(str(folder / "classes.tar")) as tar:
        for number in range(100):
            file = io.BytesIO()
            soundfile.write(file, dial([number % 10], rng), rate, format="WAV")
            tar.write({"__key__": str(number), "wav": file.getvalue(), "cls": number % 10})
