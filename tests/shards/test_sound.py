"""Lengths of sound: from headers alone, equal to what a decoder gives, recorded in the index, or refused."""

import io
import json
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from collate.errors import LengthError
from samplers.cli.commands import main
from samplers.shards.dataset import ShardDataset
from samplers.shards.format.header_lengths import read_sound_header
from samplers.shards.format.tar import Member
from samplers.shards.indexing.index import LengthIndex

FORMATS = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
}
RATE = 16_000


class MemoryFile:
    """Bytes as a file of a shard, which counts what is read."""

    def __init__(self, content: bytes) -> None:
        self.path, self.size, self.content, self.read_bytes = "memory", len(content), content, 0

    def read(self, offset: int, size: int) -> bytes:
        data = self.content[offset : offset + size]
        self.read_bytes += len(data)
        return data

    def fill(self, arrays: Any, offsets: Any) -> None:
        raise NotImplementedError


def encode(frames: int, suffix: str = "wav", rate: int = RATE, channels: int = 1) -> bytes:
    noise = np.random.default_rng(frames).standard_normal((frames, channels)) * 0.1
    buffer = io.BytesIO()
    kind, subtype = FORMATS[suffix]
    soundfile.write(buffer, noise.astype("f4"), rate, format=kind, subtype=subtype)
    return buffer.getvalue()


def decode(data: bytes) -> np.ndarray[Any, np.dtype[np.float32]]:
    return soundfile.read(io.BytesIO(data), dtype="float32")[0]


def write_shard(path: Path, samples: Iterable[dict[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, members in enumerate(samples):
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"k{number}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def header_of(data: bytes) -> tuple[int, int]:
    return read_sound_header(MemoryFile(data), Member("a", b"", 0, len(data), data[:256]), "here")


def run(*arguments: object, status: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments], prog_name="lengthtrack")
    assert result.exit_code == status, result.output
    return result


@pytest.mark.parametrize("suffix", FORMATS)
@given(frames=st.integers(1, 60_000), channels=st.integers(1, 2))
@settings(max_examples=8, deadline=None)
def test_a_header_says_the_frames_that_a_decoder_gives(suffix: str, frames: int, channels: int) -> None:
    data = encode(frames, suffix, channels=channels)
    assert header_of(data) == (len(decode(data)), RATE)


@pytest.mark.parametrize(("suffix", "most"), [("wav", 100), ("flac", 10_000), ("mp3", 2_000)])
def test_only_the_header_of_a_long_file_is_read(suffix: str, most: int) -> None:
    data = encode(40 * RATE, suffix)
    file = MemoryFile(data)
    assert read_sound_header(file, Member("a", b"", 0, len(data), data[:256]), "here")[0] == 40 * RATE
    assert file.read_bytes <= most < len(data)


@given(frames=st.integers(1, 3000), missing=st.integers(1, 6000))
@settings(max_examples=20)
def test_a_wav_that_is_cut_off_is_refused(frames: int, missing: int) -> None:
    # Red before: libsndfile counts the frames that are there.
    whole = encode(frames)
    missing = min(missing, 2 * frames)
    with pytest.raises(ValueError, match=f"here: the file is cut off: its header says {missing:,} bytes more"):
        header_of(whole[:-missing])
    # What was written to a pipe announces the largest size, and has what is there.
    size_at = whole.index(b"data") + 4
    piped = whole[:size_at] + b"\xff\xff\xff\xff" + whole[size_at + 4 : len(whole) - 2 * ((missing - 1) // 2)]
    assert header_of(piped) == (len(decode(piped)), RATE)


def test_a_wav_with_endless_chunks_is_refused() -> None:
    # Red before: each of them was read.
    whole = encode(100)
    few, many = (whole[:12] + count * b"junk\0\0\0\0" + whole[12:] for count in (100, 2000))
    assert header_of(few) == (100, RATE)
    with pytest.raises(ValueError, match="here: more than 1,000 chunks stand before the values of this wav"):
        header_of(many)


class InterruptedFile(MemoryFile):
    """Ctrl-C comes at each read."""

    def read(self, offset: int, size: int) -> bytes:
        signal.raise_signal(signal.SIGINT)
        return super().read(offset, size)


def test_an_interrupt_while_a_header_is_read_is_no_damage() -> None:
    # Red before: it was lost within a callback, and a healthy file was blamed or had another length.
    data = encode(1000, "flac")
    with pytest.raises(KeyboardInterrupt):
        read_sound_header(InterruptedFile(data), Member("a", b"", 0, len(data), b""), "here")


def test_a_header_without_the_number_of_frames_is_refused() -> None:
    # libsndfile guesses 550,080 frames of this mp3, which has 161,280.
    mp3 = encode(160_000, "mp3")
    tagless = mp3[mp3.find(mp3[:2], 4) :]
    with pytest.raises(ValueError, match="the header of this MP3 does not say how many frames it holds: give a length"):
        header_of(tagless)
    tagged = b"ID3\x04\x00\x00" + bytes([0, 0, 1, 2]) + bytes(130) + mp3
    assert header_of(tagged) == (160_000, RATE)
    flac = bytearray(encode(1000, "flac"))
    # The number of samples: the last 36 bits of 8 bytes; 0 is unknown.
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    with pytest.raises(ValueError, match="the header of this FLAC does not say"):
        header_of(bytes(flac))
    with pytest.raises(ValueError, match=r"here: soundfile cannot read this member: .*--length MODULE:FUNCTION"):
        header_of(b"no sound" * 20)


@pytest.mark.parametrize("suffix", FORMATS)
def test_shards_of_sound_are_indexed_without_a_word(tmp_path: Path, suffix: str) -> None:
    # Red: "none of ['cls', 'wav'] is a .npy array with an axis".
    sounds = [encode(frames, suffix) for frames in (900, 5000, 1234)]
    write_shard(tmp_path / "a.tar", [{suffix: sound, "cls": b"1"} for sound in sounds])
    printed = run("index", tmp_path).output
    assert printed.endswith(f"3 samples in 1 shard, lengths of {suffix} (sound headers, 16,000 Hz)\n")
    index = LengthIndex.open(tmp_path / "corpus.ltx")
    assert (index.fields, index.rates, index.length_id) == ((suffix,), {suffix: (RATE,)}, "sound headers")
    assert index.lengths.tolist() == [len(decode(sound)) for sound in sounds]
    data = ShardDataset(tmp_path, decode={suffix: decode})
    assert [len(data[row][suffix]) for row in range(3)] == index.lengths.tolist()
    assert "all agree" in run("verify", tmp_path).output
    assert "unchanged" in run("index", tmp_path).output
    assert index.verify(decode={suffix: decode}) == ()


def test_verify_finds_a_length_that_is_not_that_of_the_header(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [{"wav": encode(900)}, {"wav": encode(800)}])
    index = LengthIndex.build(shard)
    tables = index._tables
    tables.lengths[1, 0] = 801
    with pytest.raises(LengthError, match="sample 'k1', field 'wav': the index says 801 steps, the shard 800"):
        index.verify()
    index.save(tmp_path / "corpus.ltx")
    assert "the index says 801 steps" in run("verify", tmp_path, status=1).output


def test_a_number_in_another_member_is_the_length(tmp_path: Path) -> None:
    samples = [
        {"wav": encode(n), "json": json.dumps({"meta": {"n": n}, "words": [1] * (n % 7)}).encode()} for n in (900, 64)
    ]
    shard = write_shard(tmp_path / "a.tar", samples)
    printed = run("index", tmp_path, "--length-field", "json.meta.n").output
    assert printed.endswith("lengths of wav (declared in json.meta.n)\n")
    index = LengthIndex.open(tmp_path / "corpus.ltx")
    assert index.lengths.tolist() == [900, 64]
    assert "all agree" in run("verify", tmp_path).output
    assert "unchanged" in run("index", tmp_path).output
    words = LengthIndex.build(shard, ["json"], length_field="json.words")
    assert words.lengths.tolist() == [900 % 7, 64 % 7]


@pytest.mark.parametrize(
    ("declared", "path", "error", "message"),
    [
        (b'{"n": 1.5}', "json.n", LengthError, "json.n must be a non-negative integer or a list, got 1.5"),
        (b'{"n": true}', "json.n", LengthError, "got True"),
        (b'{"n": -1}', "json.n", LengthError, "got -1"),
        (b'{"m": 1}', "json.n", ValueError, r"no 'n' of json.n in json, there is \['m'\]"),
        (b"[1]", "json.n", ValueError, "there is a list"),
        (b"{", "json.n", ValueError, "not json"),
        (b"{}", "meta.n", ValueError, r"no field has the length 'meta.n', there are \['json', 'wav'\]"),
    ],
)
def test_a_declared_length_that_is_none_is_refused(
    tmp_path: Path, declared: bytes, path: str, error: type[Exception], message: str
) -> None:
    shard = write_shard(tmp_path / "a.tar", [{"wav": encode(64), "json": declared}])
    with pytest.raises(error, match=message):
        LengthIndex.build(shard, length_field=path)


def test_a_declared_length_that_is_wrong_is_found_when_it_is_read(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [{"wav": encode(64), "json": b'{"n": 65}'}])
    data = ShardDataset(shard, LengthIndex.build(shard, length_field="json.n"), decode={"wav": decode})
    with pytest.raises(LengthError, match="the index says 65 steps, the shard 64"):
        data[0]


def test_two_things_that_measure_exclude_each_other(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [{"wav": encode(64), "json": b'{"n": 64}'}])
    with pytest.raises(ValueError, match="give one"):
        LengthIndex.build(shard, length=len, length_field="json.n")
    with pytest.raises(ValueError, match="choose another"):
        LengthIndex.build(shard, ["wav"], lambda field, data: 7, length_id="sound headers")
    two = write_shard(tmp_path / "b.tar", [{"a.wav": encode(64), "b.wav": encode(64), "json": b'{"n": 64}'}])
    with pytest.raises(ValueError, match="may be the length of a or b: name one"):
        LengthIndex.build(two, length_field="json.n")
    npy = io.BytesIO()
    np.save(npy, np.arange(3))
    arrays = write_shard(tmp_path / "c.tar", [{"x.npy": npy.getvalue(), "json": b'{"n": 3}'}])
    with pytest.raises(ValueError, match="would be the length of no field"):
        LengthIndex.build(arrays, ["x"], length_field="json.n")
    # An array has its own length; sound next to it does not count unless it is named.
    both = write_shard(tmp_path / "d.tar", [{"x.npy": npy.getvalue(), "wav": encode(64)}])
    assert LengthIndex.build(both).fields == ("x",)
    assert LengthIndex.build(both, ["x", "wav"]).lengths.tolist() == [[3, 64]]


def test_rates_that_differ_are_all_recorded(tmp_path: Path) -> None:
    first = write_shard(tmp_path / "a.tar", [{"wav": encode(64, rate=8000)}])
    second = write_shard(tmp_path / "b.tar", [{"wav": encode(64, rate=16000)}])
    index = LengthIndex.build([first, second])
    assert index.rates == {"wav": (8000, 16000)}
    index.save(tmp_path / "c.ltx")
    assert "8,000 and 16,000 Hz" in run("report", tmp_path / "c.ltx", "--max-tokens", 100).output
    assert " Hz; " not in run("report", tmp_path / "c.ltx", "--max-tokens", 100).output
    parts = [LengthIndex.build(shard) for shard in (first, second)]
    assert LengthIndex.concat(parts).rates == index.rates


def test_report_gives_durations_where_the_rate_is_known(tmp_path: Path) -> None:
    write_shard(tmp_path / "a.tar", [{"wav": encode(RATE * seconds)} for seconds in (1, 2, 3)])
    run("index", tmp_path)
    printed = run("report", tmp_path, "--max-tokens", 60_000).output
    assert "6.00 s at 16,000 Hz; 1.00 s to 3.00 s, median 2.00 s, mean 2.00 s" in printed
    figures = json.loads(run("report", tmp_path, "--max-tokens", 60_000, "--json", "-").output)
    assert figures["rate"] == RATE
    np.save(tmp_path / "lengths.npy", [100, 200])
    assert "3.00 s at 100 Hz" in run("report", tmp_path / "lengths.npy", "--max-tokens", 300, "--rate", 100).output


def test_show_prints_the_lengths_of_sound_and_not_of_its_bytes(tmp_path: Path) -> None:
    # Red: the number of bytes of each file was printed as its length.
    write_shard(tmp_path / "a.tar", [{"wav": encode(frames)} for frames in (900, 700)])
    run("index", tmp_path)
    printed = run("show", tmp_path, "--max-tokens", 2000).output
    assert "2 samples in 1 shard, lengths of wav (sound headers, 16,000 Hz)" in printed
    assert "wav             2 of bytes, 900 steps at most" in printed
    assert [line.split()[2] for line in printed.splitlines()[-2:]] == ["900", "700"]


def test_a_refresh_needs_the_function_that_measured(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [{"wav": encode(64)}])
    LengthIndex.build(shard, ["wav"], lambda field, data: len(data) // 2).save(tmp_path / "corpus.ltx")
    # Red: it was said that the field is no array.
    message = run("index", tmp_path, status=2).stderr
    assert "the lengths of wav were measured by <lambda>:" in message
    assert "give the function again" in message


def test_an_index_of_sound_resumes_and_refuses_another_measure(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [{"wav": encode(64), "json": b'{"n": 64}'}])
    first = LengthIndex.build(shard, resume=True)
    assert LengthIndex.build(shard, resume=True).rates == first.rates
    for options in ({"length_field": "json.n"}, {"length": lambda field, data: 7, "length_id": "seven"}):
        with pytest.raises(ValueError, match="were measured by 'sound headers', length= is now"):
            LengthIndex.build(shard, ["wav"], resume=True, **options)


def test_a_missing_soundfile_is_named_with_its_command(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar", [{"wav": encode(64)}])
    code = (
        "import sys; sys.modules['soundfile'] = None; from samplers import LengthIndex; "
        f"LengthIndex.build({str(shard)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "soundfile is not installed: pip install 'lengthtrack[speech]'" in done.stderr


@pytest.mark.parametrize("rates", [{"wav": []}, {"wav": [0]}, {"wav": ["8"]}, {"wav": 8000}])
def test_rates_that_no_writer_writes_are_refused(tmp_path: Path, rates: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_shard(tmp_path / "a.tar", [{"wav": encode(64)}])
    index = LengthIndex.build(shard)
    monkeypatch.setattr("samplers.shards.indexing.index_header.join_rates", lambda parts: list(rates.items()))
    index.save(tmp_path / "a.ltx")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="its header is not valid"):
        LengthIndex.open(tmp_path / "a.ltx")


def test_convert_sends_encoded_sound_to_index_and_not_to_text(tmp_path: Path) -> None:
    # Red: it advised to store the wav as text.
    write_shard(tmp_path / "a.tar", [{"wav": encode(900)}])
    message = run("convert", tmp_path / "a.tar", tmp_path / "out", "--fields", "wav", status=1).output
    assert "field 'wav': is bytes" in message
    assert "whose lengths `lengthtrack index` reads" in message
    assert "--text" not in message


def test_a_decoder_that_returns_the_rate_too_is_named_in_the_error(tmp_path: Path) -> None:
    # Red: the error advised to build the index again, and nothing else.
    write_shard(tmp_path / "a.tar", [{"wav": encode(900)}])
    run("index", tmp_path)
    with pytest.raises(LengthError, match="the index says 900 steps, the shard 2: decode= returned a tuple"):
        ShardDataset(tmp_path, decode={"wav": lambda data: soundfile.read(io.BytesIO(data))})[0]
    with pytest.raises(TypeError, match="decode must say for which field: give {'wav': decode}"):
        ShardDataset(tmp_path, decode=decode)  # type: ignore[arg-type]
