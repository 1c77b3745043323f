"""Small corpora on disk: in both layouts, foreign ones in every variant of tar and npy, and parts that were killed."""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from samplers import LengthIndex, ShardWriter

# Samples of the written corpora, in two shards, the first of two blocks.
WRITTEN = 6
# A crash in the third part, when the first two are finished.
KILLED_AT = 2
PARTS = [0, 1, 2]


def samples_from(first: int, count: int) -> list[dict[str, Any]]:
    """Samples of two sequences, a number and an array of one size; one of them is empty."""
    return [
        {
            "__key__": f"k{number}",
            "tokens": np.arange(number % 4, dtype=np.int32) + 100 * number,
            "frames": np.full((1 + number % 3, 2), number / 2, np.float32),
            "label": number,
            "place": np.array([number, -number], np.int16),
        }
        for number in range(first, first + count)
    ]


def part_of(part: int) -> Iterator[dict[str, Any]]:
    """The samples of a part."""
    for number in range(3):
        yield {"__key__": f"part{part}-{number}", "tokens": np.arange(part + number)}


def steps_in(field: str, data: bytes) -> int:
    """The length of a text: its words."""
    del field
    return len(data.split())


def write_corpora(folder: Path) -> None:
    """Write all of them."""
    for layout in ("blocks", "plain"):
        with ShardWriter(folder / layout, layout=layout, max_samples=4, block_size=3, stack=["place"]) as writer:
            for sample in samples_from(0, WRITTEN):
                writer.write(sample)
    write_foreign(folder / "foreign")
    LengthIndex.build(folder / "foreign", checksums=True).save(folder / "foreign" / "all.ltx")
    build_kept(folder / "foreign")
    write_killed(folder / "parts")


def foreign_in(folder: Path) -> tuple[list[Path], Path]:
    """The foreign shards, and their index."""
    return sorted((folder / "foreign").glob("*.tar")), folder / "foreign" / "all.ltx"


def write_foreign(folder: Path) -> None:
    """Shards of other programs: each variant of tar, each version of npy."""
    folder.mkdir(parents=True)
    variants = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
    for name, variant in variants.items():
        with tarfile.open(folder / f"{name}.tar", "w", format=variant) as shard:
            for version in ((1, 0), (2, 0), (3, 0)):
                content = io.BytesIO()
                np.lib.format.write_array(content, np.arange(version[0] + 1.0), version=version)
                _add(shard, f"{name}-v{version[0]}.audio.npy", content.getvalue())
                _add(shard, f"{name}-v{version[0]}.text.txt", b"so many words " * version[0])
                _add(shard, f"{name}-v{version[0]}.cls", b"%d" % version[0])


def build_kept(folder: Path) -> LengthIndex:
    """Index shards with an index of each kept beside it, of two fields, one of them measured by a function."""
    return LengthIndex.build(
        folder, ["audio", "text"], steps_in, resume=True, length_id="words of a text", checksums=True
    )


def write_killed(folder: Path) -> None:
    """Write parts of a corpus, of which one fails."""

    def fail_late(part: int) -> Iterator[dict[str, Any]]:
        for sample in part_of(part):
            if part == KILLED_AT and sample["__key__"].endswith("-2"):
                raise OSError("killed")
            yield sample

    try:
        ShardWriter.write_parts(folder, fail_late, PARTS, max_samples=2)
    except RuntimeError:
        return
    raise AssertionError("nothing has failed")


def _add(shard: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    shard.addfile(member, io.BytesIO(content))
