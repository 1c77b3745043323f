"""What shards are called: braces and wildcards to paths and URLs, each of them once."""

import os
import re
from collections.abc import Iterable
from itertools import chain, pairwise
from pathlib import Path
from typing import Final

from samplers.shards.storage.reading import Shards, file_system

_NUMBERS: Final = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
_LETTERS: Final = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?")
_ALPHABET: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# Any character behind a backslash stands for itself.
_ESCAPED: Final = re.compile(r"\\(.)")
_SPECIAL: Final = re.compile(r"\\.|[{},]", re.DOTALL)
_WILD: Final = re.compile(r"[*?\[]")


def expand_shards(shards: Shards) -> list[str]:
    """The paths and URLs that are meant: braces are spelt out, wildcards looked up and sorted.

    A path that is there is taken as it stands, whatever braces and brackets it has. Braces mean what they mean to
    webdataset and the shell: `{a,b}`, `{00..17}`, `{9..0..3}`, one in another.

    Args:
        shards: a path, a URL, a folder of `.tar` files, a pattern such as `train-{000..017}.tar` or `train-*.tar`, or
            an iterable of these.

    Raises:
        FileNotFoundError: A wildcard matches nothing.
        ValueError: No shard is named, one is named twice, or braces do not match.

    >>> expand_shards("train-{08..10}.tar")
    ['train-08.tar', 'train-09.tar', 'train-10.tar']
    """
    patterns = [shards] if isinstance(shards, (str, os.PathLike)) else list(shards)
    named = [(path, os.fspath(pattern)) for pattern in patterns for path in _expand(os.fspath(pattern))]
    if not named:
        raise ValueError("shards must name at least one shard, got none")
    refuse_twice(named)
    return [path for path, _ in named]


def refuse_twice(named: Iterable[tuple[str, str]]) -> None:
    """Refuse a shard that comes twice, whose samples would then do so too.

    Args:
        named: paths or URLs, and by which pattern, index or whatever else each is named.

    Raises:
        ValueError: There is one.
    """
    found: dict[str, str] = {}
    for path, source in named:
        name = path if "://" in path else os.path.normpath(Path(path).absolute())
        if name in found:
            by = f"by {source!r}" if source == found[name] else f"by {found[name]!r} and by {source!r}"
            raise ValueError(f"{path} is named twice, {by}, and its samples would come twice: name each shard once")
        found[name] = source


def expand_braces(pattern: str) -> list[str]:
    r"""A pattern with its braces spelt out, in the order of bash and of the braceexpand package.

    A backslash takes the meaning from the character behind it (except on Windows, where it divides folders).

    Raises:
        ValueError: Braces do not match.

    >>> expand_braces("x-{a{1..2},b}.tar")
    ['x-a1.tar', 'x-a2.tar', 'x-b.tar']
    """
    found = _spell_out(pattern, pattern)
    return found if os.sep == "\\" else [_ESCAPED.sub(r"\1", text) for text in found]


def _expand(pattern: str) -> list[str]:
    """The paths of one pattern."""
    if "://" not in pattern and Path(pattern).exists():
        return _list_folder(pattern) if Path(pattern).is_dir() else [pattern]
    return list(chain.from_iterable(map(_look_up, expand_braces(pattern))))


def _look_up(pattern: str) -> list[str]:
    if "://" in pattern:
        if not _WILD.search(pattern):
            return [pattern]
        system, name = file_system(pattern)
        found = [system.unstrip_protocol(path) for path in system.glob(name)]
    elif Path(pattern).exists():
        return _list_folder(pattern) if Path(pattern).is_dir() else [pattern]
    elif not _WILD.search(pattern):
        return [pattern]
    else:
        found = _glob(Path(pattern))
    if not found:
        raise FileNotFoundError(f"no file matches {pattern}")
    return sorted(found)


def _list_folder(folder: str) -> list[str]:
    found = sorted(map(str, Path(folder).glob("*.tar")))
    if not found:
        raise FileNotFoundError(f"no file matches {Path(folder, '*.tar')}")
    return found


def _glob(pattern: Path) -> list[str]:
    # A folder that is there is itself, though its name has brackets.
    root, rest = Path(pattern.anchor), list(pattern.parts[1:] if pattern.anchor else pattern.parts)
    while rest and (root / rest[0]).is_dir():
        root /= rest.pop(0)
    return [str(path) for path in root.glob("/".join(rest))]


def _spell_out(text: str, pattern: str) -> list[str]:
    """All that a text with braces stands for; `pattern` is the whole of it, for messages."""
    found = _find_braces(text, pattern)
    if found is None:
        return [text]
    first, last, commas = found
    ends = [first, *commas, last]
    if commas:
        parts = [text[start + 1 : end] for start, end in pairwise(ends)]
        choices = [choice for part in parts for choice in _spell_out(part, pattern)]
    else:
        inside = text[first + 1 : last]
        # Braces around a single thing are no choice, and stay.
        choices = _count(inside) or [f"{{{choice}}}" for choice in _spell_out(inside, pattern)]
    rests = _spell_out(text[last + 1 :], pattern)
    return [f"{text[:first]}{choice}{rest}" for choice in choices for rest in rests]


def _find_braces(text: str, pattern: str) -> tuple[int, int, list[int]] | None:
    """Where the first outermost braces open and close, and the commas that divide what is between them.

    Raises:
        ValueError: They do not match.
    """
    depth, first = 0, 0
    commas: list[int] = []
    for mark in _SPECIAL.finditer(text):
        if mark[0] == "{":
            first = first if depth else mark.start()
            depth += 1
        elif mark[0] == "}":
            depth -= 1
            if depth < 0:
                break
            if depth == 0:
                return first, mark.start(), commas
        elif mark[0] == "," and depth == 1:
            commas.append(mark.start())
    if depth:
        raise ValueError(
            f"{pattern!r}: braces do not match: close each, or put a backslash before one that is no brace"
        )
    return None


def _count(text: str) -> list[str] | None:
    """What a range such as `08..11` or `a..e..2` stands for; None if it is none."""
    if (numbers := _NUMBERS.fullmatch(text)) is not None:
        padded = any(re.match("-?0.", number) for number in numbers.groups()[:2])
        width = max(len(numbers[1]), len(numbers[2])) if padded else 0
        return [f"{number:0{width}}" for number in _steps(int(numbers[1]), int(numbers[2]), numbers[3])]
    if (letters := _LETTERS.fullmatch(text)) is not None:
        places = _ALPHABET.index(letters[1]), _ALPHABET.index(letters[2])
        return [_ALPHABET[place] for place in _steps(*places, letters[3])]
    return None


def _steps(first: int, last: int, size: str | None) -> range:
    step = int(size or 1) or 1
    return range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
