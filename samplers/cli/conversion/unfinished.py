"""The mark of an unfinished conversion: what it converts, and how, so that only the same conversion resumes it.

While `convert` writes `PREFIX-000000.tar` and so on, `PREFIX.unfinished.json` stands next to them:

    {"inputs": {"corpus.jsonl": 81920}, "options": {"layout": "blocks", "tokenizer": "bytes_of:5f0c..."}}

It is removed when the last sample is written. Datasets and commands refuse a folder that has one, because its shards
hold a part of the samples.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from samplers.shards.indexing.find_index import MARK
from samplers.shards.storage.paths import expand_shards


def mark_of(folder: Path, prefix: str) -> Path:
    """The path of the mark."""
    return folder / f"{prefix}{MARK}"


def describe_conversion(inputs: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """What is converted, and how, as JSON: inputs with their sizes in bytes, and all options."""
    return {"inputs": {path: _size(path) for path in inputs}, "options": dict(options)}


def begin(mark: Path, conversion: Mapping[str, Any], *, resume: bool) -> bool:
    """Note that a conversion has begun.

    Args:
        mark: Path of the mark.
        conversion: Its description.
        resume: Whether an unfinished one is to be resumed.

    Returns:
        Whether there is one to resume.

    Raises:
        FileExistsError: There is one, and it is not to be resumed.
        ValueError: There is one of other inputs or options. The message says which differ.
    """
    if not mark.exists():
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.write_text(json.dumps(conversion, indent=1) + "\n", encoding="utf-8")
        return False
    if not resume:
        raise FileExistsError(
            f"{mark.parent} holds an unfinished conversion: give --resume and the same options to complete it, or "
            "delete the folder to start again"
        )
    earlier = _read(mark)
    for part in ("inputs", "options"):
        before, now = earlier.get(part, {}), json.loads(json.dumps(conversion[part]))
        differing = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
        if differing:
            name = differing[0]
            raise ValueError(
                f"{mark}: the unfinished conversion has {name} {before.get(name)!r}, now it is {now.get(name)!r}: "
                "resume with the same inputs and options, or delete the folder to start again"
            )
    return True


def _read(mark: Path) -> dict[str, Any]:
    """The description in a mark.

    Raises:
        ValueError: It is damaged.
    """
    try:
        content = json.loads(mark.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{mark}: damaged: delete the folder to start again")
    return content


def _size(path: str) -> int | None:
    """Bytes of an input, of all of its files. None for URLs."""
    if "://" in path:
        return None
    folder = Path(path)
    files = folder.rglob("*") if folder.is_dir() else map(Path, [path] if folder.exists() else expand_shards(path))
    return sum(file.stat().st_size for file in files if file.is_file())
