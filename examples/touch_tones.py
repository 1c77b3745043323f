"""A corpus that every machine can make: strings of digits as touch-tones in noise, in wav files in shards.

The functions that read such files are here too.
"""

import io
from pathlib import Path

import numpy as np
import soundfile
import webdataset as wds

RATE = 8_000
LOW, HIGH = (697, 770, 852, 941), (1209, 1336, 1477)
# Low and high tone of each digit; 0 is in the middle of the last row.
TONES = {digit: (LOW[(digit - 1) // 3], HIGH[(digit - 1) % 3]) for digit in range(1, 10)} | {0: (LOW[3], HIGH[1])}


def dial(digits: list[int], rng: np.random.Generator) -> np.ndarray:
    """Touch-tones of 50 to 120 ms with pauses of 40 to 100 ms, in noise: float `[L]`, at 8 kHz."""
    parts = []
    for digit in digits:
        pause, tone = rng.integers((320, 400), (800, 960))
        time = np.arange(tone) / RATE
        waves = [np.sin(2 * np.pi * (hertz * time + rng.random())) for hertz in TONES[digit]]
        parts += [np.zeros(pause), sum(waves) * rng.uniform(0.05, 0.3)]
    clean = np.concatenate([*parts, np.zeros(rng.integers(320, 2000))])
    return clean + rng.normal(0, rng.uniform(0.01, 0.1), len(clean))


def write_dialled(folder: Path, count: int = 1_500) -> None:
    """Write strings of 1 to 12 digits to plain shards: KEY.wav, and KEY.txt with the digits."""
    rng = np.random.default_rng(0)
    for shard in range(3):
        with wds.TarWriter(str(folder / f"dialled-{shard}.tar")) as tar:
            for number in range(count // 3):
                digits = rng.integers(0, 10, rng.integers(1, 13)).tolist()
                file = io.BytesIO()
                soundfile.write(file, dial(digits, rng), RATE, format="WAV", subtype="PCM_16")
                tar.write({"__key__": f"{shard}-{number}", "wav": file.getvalue(), "txt": "".join(map(str, digits))})


def count_steps(field: str, data: bytes) -> int:
    """Number of samples in a wav file, from its header, for the index. The file must be at 8 kHz."""
    info = soundfile.info(io.BytesIO(data))
    if info.samplerate != RATE:
        raise ValueError(f"wav files must be at {RATE} Hz, got {info.samplerate}")
    return info.frames


def read_wav(data: bytes) -> np.ndarray:
    """The sound, float32 `[L]`."""
    return soundfile.read(io.BytesIO(data), dtype="float32")[0]


def read_digits(data: bytes) -> np.ndarray:
    """Digits as classes from 1, int64 `[D]`; 0 is CTC's blank."""
    return np.array([int(digit) + 1 for digit in data.decode()])
