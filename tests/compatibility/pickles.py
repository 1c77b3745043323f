"""Saved objects as text and loaded again; and pickles looked into: the modules and the folders that they name."""

import base64
import io
import pickle
import pickletools
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("collate", "samplers")
# Where paths of files begin, in place of a folder.
ANYWHERE = "CORPORA"


def names_in(data: bytes) -> list[str]:
    """The names of our own that a pickle, or a file of `torch.save`, asks for: `module.name`, sorted."""
    found: set[str] = set()
    texts: list[str] = []
    memo: list[str | None] = []
    previous_is_text = False
    for code, argument, _ in pickletools.genops(_pickle_of(data)):
        if code.name == "MEMOIZE":
            memo.append(texts[-1] if previous_is_text else None)
        elif code.name in {"BINGET", "LONG_BINGET"} and argument < len(memo):
            texts += [memo[argument]] if memo[argument] is not None else []
        elif code.name == "STACK_GLOBAL":
            found.add(f"{texts[-2]}.{texts[-1]}")
        elif code.name == "GLOBAL":
            found.add(argument.replace(" ", "."))
        previous_is_text = "UNICODE" in code.name
        texts += [argument] if previous_is_text else []
    return sorted(name for name in found if name.split(".")[0] in PACKAGES)


def move(data: bytes, old: str, new: str) -> bytes:
    """The same pickle, of files that lie in another folder: texts that begin with `old` begin with `new`."""
    parts = []
    ops = list(pickletools.genops(data))
    ends = [place for _, _, place in ops[1:]] + [len(data)]
    for (code, argument, place), end in zip(ops, ends, strict=True):
        if "BINUNICODE" in code.name and argument.startswith(old):
            text = (new + argument.removeprefix(old)).encode()
            parts.append(b"X" + struct.pack("<I", len(text)) + text)
        elif code.name != "FRAME":
            # Frames tell sizes that are others now, and may be left out.
            parts.append(data[place:end])
    return b"".join(parts)


def texts_in(data: bytes) -> list[str]:
    """All texts in a pickle, or in a file of `torch.save`."""
    return [argument for code, argument, _ in pickletools.genops(_pickle_of(data)) if "UNICODE" in code.name]


def load(form: str, data: bytes, shards: Path) -> Any:
    """Load what was saved, whose shards are in this folder now."""
    if form == "torch.save":
        return torch.load(io.BytesIO(data))
    return pickle.loads(move(data, ANYWHERE, str(shards)))


def torch_saved(value: Any) -> bytes:
    """What `torch.save` writes."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def encode(data: bytes) -> str:
    """Bytes as text: base64 of what zlib has made smaller."""
    return base64.b64encode(zlib.compress(data, 9)).decode()


def decode(text: str) -> bytes:
    """The bytes again."""
    return zlib.decompress(base64.b64decode(text))


def _pickle_of(data: bytes) -> bytes:
    if not zipfile.is_zipfile(io.BytesIO(data)):
        return data
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        (name,) = (name for name in file.namelist() if name.endswith("data.pkl"))
        return file.read(name)
