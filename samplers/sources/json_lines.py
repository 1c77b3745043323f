"""Files of JSON lines, plain or compressed: one object a line, and errors that name the line."""

import gzip
import json
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

JSON_LINES: Final = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
# A number in JSON that may be too large for a float64 (1e308): an exponent of three digits, or 300 digits.
_LARGE: Final = re.compile(r"\d[eE]\+?\d{3}|\d{300}")


def read_json_lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a file of JSON lines, one at a time.

    Yields:
        The origin of an object, for messages, and the object.

    Raises:
        ValueError: A line is no JSON object, or the file is damaged. The message has the line.
    """
    for number, data in enumerate(_read_lines(path), start=1):
        context = f"{path}, line {number}"
        if number == 1:
            # Programs on Windows put one at the start of a file.
            data = data.removeprefix(BOM_UTF8)
        if data.startswith(BOM_UTF8):
            raise ValueError(f"{context}: not JSON: a byte order mark, which only a file may begin with: take it out")
        # Many writers end a file with an empty line.
        if not data.strip():
            continue
        try:
            line = data.decode()
            # By default Python reads a number that is too large for a float as infinity.
            parse_float = _parse_float if _LARGE.search(line) else None
            row = json.loads(line, parse_float=parse_float, object_pairs_hook=_refuse_twice)
        except UnicodeDecodeError as error:
            raise ValueError(f"{context}: not UTF-8: {error}: convert the file to it") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{context}: not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{context}: must be an object, got {type(row).__name__}")
        yield context, row


def _read_lines(path: str) -> Iterator[bytes]:
    with Path(path).open("rb") as file:
        lines = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if path.endswith(".gz") else file
        number = 0
        # The damage of a gzip file shows when its lines are read.
        try:
            for line in lines:
                number += 1
                yield line
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: damaged or cut short behind line {number}: {error}") from None


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object without a repeated name. Python would take the last value in silence.

    Raises:
        ValueError: A name comes twice.
    """
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} comes twice in one object")
    return values


def _parse_float(text: str) -> float:
    number = float(text)
    if number in {float("inf"), float("-inf")}:
        raise ValueError(f"{text} is larger than any float64")
    return number
