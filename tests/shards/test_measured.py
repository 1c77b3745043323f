"""Lengths that a user's function measures: which function is recorded, and what nobody measured is not called right."""

import functools
import io
import json
import struct
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from command import run

from collate.errors import LengthError
from samplers.shards.indexing.index import LengthIndex
from samplers.shards.indexing.measuring import Measure, identify

HOP = 2


def halves(field: Any, data: Any) -> Any:
    return len(data) // HOP


def seven(field: Any, data: Any) -> Any:
    return 7


def read_bytes(data: Any) -> Any:
    return np.frombuffer(data, np.uint8)


def sounds(path: Path, lengths: Any, **others: Any) -> Any:
    """A plain shard of `wav` members of these sizes."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for number, length in enumerate(lengths):
            for suffix, data in ({"wav": bytes(length)} | others).items():
                info = tarfile.TarInfo(f"k{number}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def test_verify_says_which_lengths_it_has_not_measured(tmp_path: Path) -> None:
    shard = sounds(tmp_path / "a.tar", [5, 8])
    index = LengthIndex.build(shard, ["wav"], seven)
    # All lengths are wrong, and it was silent before.
    assert index.verify() == ("wav",)
    for options in ({"length": lambda field, data: len(data)}, {"decode": {"wav": read_bytes}}):
        with pytest.raises(LengthError, match=r"sample 'k0', field 'wav': the index says 7 steps, the shard 5"):
            index.verify(**options)
    right = LengthIndex.build(shard, ["wav"], lambda field, data: len(data), checksums=True)
    assert right.verify(checksums=True, decode={"wav": read_bytes}) == ()
    with pytest.raises(ValueError, match=r"decode names 'flac', and a function measures the lengths of \['wav'\]"):
        right.verify(decode={"flac": read_bytes})


def test_steps_that_a_decoder_masks_are_no_length(tmp_path: Path) -> None:
    # Red: they were counted as if they were there.
    shard = sounds(tmp_path / "a.tar", [4])
    with pytest.raises(TypeError, match=r"steps of field 'wav' must be known, .* masks 1 of 4 .*compressed"):
        LengthIndex.build(shard, ["wav"], halves).verify(
            decode={"wav": lambda data: np.ma.array([1, 2, 3, 4], mask=[0, 0, 0, 1])}
        )
    with pytest.raises(LengthError, match="length= must give a non-negative int, got masked"):
        LengthIndex.build(shard, ["wav"], lambda field, data: np.ma.array(3, mask=True))


def test_the_command_says_what_it_has_not_measured_and_measures_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sounds(tmp_path / "a.tar", [5, 8])
    (tmp_path / "my_sounds.py").write_text(
        "def steps(field, data):\n    return len(data)\n\ndef read(data):\n    return list(data)\n"
        "\ndef fails(data):\n    raise RuntimeError('no wav')\n"
    )
    output = run("index", "a.tar", "--output", "a.ltx", "--fields", "wav", "--length", "my_sounds:steps").output
    name = LengthIndex.open("a.ltx").length_id
    assert output == f"a.ltx: built, 2 samples in 1 shard, lengths of wav (measured by {name})\n"
    output = run("verify", "a.ltx", status=3).output
    assert output == (
        f"2 samples in 1 shard, lengths of wav (measured by {name}): headers read (no checksums to compare payloads "
        "with: lengthtrack index --checksums), the rest agrees, lengths of wav NOT measured (give --length "
        "MODULE:FUNCTION or --decode wav=MODULE:FUNCTION)\n"
    )
    assert "NOT measured" in run("verify", "a.ltx", "--quick", status=3).output
    assert "headers and lengths read" in run("verify", "a.ltx", "--length", "my_sounds:steps").output
    assert "all agree" in run("verify", "a.ltx", "--decode", "wav=my_sounds:read", "--workers", 2).output
    LengthIndex.build("a.tar", ["wav"], seven).save("a.ltx")
    assert (
        "the index says 7 steps, the shard 5" in run("verify", "a.ltx", "--length", "my_sounds:steps", status=1).output
    )
    assert "no wav" in run("verify", "a.ltx", "--decode", "wav=my_sounds:fails", status=1).output
    for option in ("my_sounds", "my_sounds:nothing", "no_such_module:steps", ":steps"):
        assert "--length" in run("verify", "a.ltx", "--length", option, status=2).stderr
    assert "choose one" in run("verify", "a.ltx", "--quick", "--length", "my_sounds:steps", status=2).stderr
    assert "--length MODULE:FUNCTION" in run("index", "a.tar", "--output", "b.ltx", "--fields", "wav", status=1).stderr


@pytest.mark.parametrize("place", ["beside", "folder"])
def test_a_build_goes_on_with_the_same_function_alone(tmp_path: Path, place: str) -> None:
    shard = sounds(tmp_path / "a.tar", [4, 8])
    resume = True if place == "beside" else tmp_path / "kept"
    first = LengthIndex.build(shard, ["wav"], halves, resume=resume)
    assert first.lengths.tolist() == [2, 4]
    assert first.length_id.startswith("halves:")
    again = LengthIndex.build(shard, ["wav"], halves, resume=resume)
    assert (again.lengths.tolist(), again.length_id) == ([2, 4], first.length_id)
    # The lengths of the first function came back in silence before.
    with pytest.raises(ValueError, match=r"lengths of wav were measured by 'halves:\w+', .* 'seven:\w+': delete it"):
        LengthIndex.build(shard, ["wav"], seven, resume=resume)
    # Without a function nothing is held against it, and a name may be one's own.
    assert LengthIndex.build(shard, resume=resume).lengths.tolist() == [2, 4]
    renamed = LengthIndex.build(shard, ["wav"], seven, resume=resume, length_id=first.length_id)
    assert renamed.lengths.tolist() == [2, 4]
    for name in ("", 7):
        with pytest.raises(TypeError, match="length_id must be a name"):
            LengthIndex.build(shard, ["wav"], seven, length_id=name)


def test_the_name_of_a_function_is_kept_in_the_file_and_by_every_index(tmp_path: Path) -> None:
    shards = [sounds(tmp_path / f"{name}.tar", [4]) for name in "ab"]
    one, other = (LengthIndex.build(shard, ["wav"], halves, length_id="frames") for shard in shards)
    LengthIndex.concat([one, other]).save(tmp_path / "c.ltx")
    index = LengthIndex.open(tmp_path / "c.ltx")
    assert (index.length_id, index.moved_to(shards).length_id) == ("frames", "frames")
    with pytest.raises(ValueError, match="were measured by two functions, 'frames' and 'samples'"):
        LengthIndex.concat([one, LengthIndex.build(shards[1], ["wav"], halves, length_id="samples")])
    # Arrays tell their own lengths.
    np.save(tmp_path / "x.npy", np.arange(3))
    data = (tmp_path / "x.npy").read_bytes()
    assert LengthIndex.build(sounds(tmp_path / "d.tar", [4], **{"x.npy": data}), ["x"], halves).length_id is None


def forget(path: Path) -> None:
    """Write an index as it was before functions were recorded."""
    content = path.read_bytes()
    size = int.from_bytes(content[12:16], "little")
    header, start = json.loads(content[24 : 24 + size]), -(-(24 + size) // 64) * 64
    del header["length_id"]
    text = json.dumps(header, separators=(",", ":")).encode()
    magic, version, _, _, crc = struct.unpack("<8sIIII", content[:24])
    new = struct.pack("<8sIIII", magic, version, len(text), crc32(text), crc) + text
    path.write_bytes(new + bytes(-len(new) % 64) + content[start:])


def test_an_index_without_the_record_opens_and_is_measured_anew(tmp_path: Path) -> None:
    shard = sounds(tmp_path / "a.tar", [4, 8])
    LengthIndex.build(shard, ["wav"], seven, resume=True)
    forget(tmp_path / "a.tar.ltx")
    old = LengthIndex.open(tmp_path / "a.tar.ltx")
    assert (old.length_id, old.lengths.tolist()) == (None, [7, 7])
    assert (
        LengthIndex.concat([old, LengthIndex.build(sounds(tmp_path / "b.tar", [4]), ["wav"], halves)]).length_id is None
    )
    assert LengthIndex.build(shard, ["wav"], halves, resume=True).lengths.tolist() == [2, 4]


def test_a_function_of_which_no_text_tells_needs_a_name_to_be_kept(tmp_path: Path) -> None:
    shard = sounds(tmp_path / "a.tar", [4])
    unclear = functools.partial(lambda model, field, data: len(data), object())
    assert LengthIndex.build(shard, ["wav"], unclear).length_id is None
    with pytest.raises(ValueError, match="give it a name with length_id="):
        LengthIndex.build(shard, ["wav"], unclear, resume=True)
    assert LengthIndex.build(shard, ["wav"], unclear, resume=True, length_id="v1").length_id == "v1"


SOURCE = """
HOP = 160
def helper(data):
    return len(data)
class Steps:
    def __init__(self, hop):
        self.hop = hop
    def __call__(self, field, data):
        return len(data) // self.hop
def make(hop):
    def steps(field, data):
        return helper(data) // hop
    return steps
def steps(field, data):
    # A comment.
    return helper(data) // HOP
{more}
"""
NAMES = ["steps", "make(3)", "Steps(3)", "Steps(3).__call__", "partial(steps, data=b'')", "lambda f, d: len(d) // HOP"]


def names_of(tmp_path: Path, source: Any, expressions: Any = NAMES) -> Any:
    """What functions of a module are called in a process of their own."""
    (tmp_path / "functions.py").write_text(
        "from functools import partial\n" + source + "".join(f"f{n} = {each}\n" for n, each in enumerate(expressions))
    )
    code = f"""
    import functions
    from samplers.shards.indexing.measuring import identify
    print(*[identify(getattr(functions, f"f{{n}}")) for n in range({len(expressions)})], sep="\\n")
    """
    command = [sys.executable, "-B", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    return done.stdout.splitlines()


def test_a_function_has_one_name_in_every_process_until_it_changes(tmp_path: Path) -> None:
    source = SOURCE.format(more="")
    before = names_of(tmp_path, source)
    assert len(set(before)) == len(NAMES)
    same = source.replace("# A comment.", "# Another.\n\n").replace("HOP = 160", "OTHER = 1\nHOP = 160")
    assert names_of(tmp_path, same) == before
    changed = {
        "HOP = 160": ("HOP = 80", {0, 4, 5}),
        "    return len(data)\n": ("    return len(data) + 1\n", {0, 1, 4}),
        "return len(data) // self.hop": ("return len(data) * self.hop", {2, 3}),
        "return helper(data) // hop": ("return helper(data) * hop", {1}),
    }
    for old, (new, places) in changed.items():
        after = names_of(tmp_path, source.replace(old, new))
        assert {place for place in range(len(NAMES)) if after[place] != before[place]} == places, old
    others = [
        "steps",
        "make(4)",
        "Steps(4)",
        "Steps(4).__call__",
        "partial(steps, data=b'x')",
        "lambda f, d: len(d) * HOP",
    ]
    after = names_of(tmp_path, source, others)
    assert [name for name, other in zip(before, after, strict=True) if name == other] == before[:1]


def test_functions_on_one_line_and_without_source_have_names_of_their_own() -> None:
    one, other = lambda f, d: len(d), lambda f, d: len(d) + 1
    assert len({identify(one), identify(other), None}) == 3
    typed = {}
    exec("def steps(f, d):\n    return 7\ndef others(f, d):\n    return 8", typed)
    assert len({identify(typed["steps"]), identify(typed["others"]), None}) == 3
    assert identify(len).startswith("len:")
    both = Measure(halves, {"wav": read_bytes})
    assert identify(both) == f"={identify(halves)} wav={identify(read_bytes)}"
