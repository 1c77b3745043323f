"""Names of shards: from patterns with braces and wildcards to a list of paths and URLs, each once."""

import os
import re
from collections.abc import Iterable
from itertools import chain, pairwise
from pathlib import Path
from typing import Final

from samplers.shards.storage.network.failures import shown
from samplers.shards.storage.network.remote import find_matches
from samplers.shards.storage.network.transport import DEFAULT, Transport
from samplers.shards.storage.reading import Shards

_NUMBER_RANGE: Final = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.-?(\d+))?")
_LETTER_RANGE: Final = re.compile(r"([A-Za-z])\.\.([A-Za-z])(?:\.\.-?(\d+))?")
_ALPHABET: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
# A backslash escapes any character.
_ESCAPED: Final = re.compile(r"\\(.)")
# On Windows a backslash separates folders, and escapes nothing.
_HAS_ESCAPES: Final = os.sep != "\\"
_SPECIAL: Final = re.compile(r"\\.|[{},]" if _HAS_ESCAPES else "[{},]", re.DOTALL)
_WILD: Final = re.compile(r"[*?\[]")


def expand_shards(shards: Shards, transport: Transport = DEFAULT) -> list[str]:
    """The paths and URLs that patterns stand for. Braces are expanded in order, matches of wildcards are sorted.

    A path that exists stands for itself, even with braces or brackets in it. Braces work as in webdataset and the
    shell: `{a,b}`, `{00..17}`, `{9..0..3}`, also nested.

    Args:
        shards: A path, a URL, a folder of `.tar` files, a pattern such as `train-{000..017}.tar` or `train-*.tar`, or
            an iterable of these.
        transport: How the folder of a URL with wildcards is listed.

    Raises:
        FileNotFoundError: A wildcard matches nothing.
        ValueError: There is no shard, a shard comes twice, or braces do not match.

    >>> expand_shards("train-{08..10}.tar")
    ['train-08.tar', 'train-09.tar', 'train-10.tar']
    """
    patterns = [shards] if isinstance(shards, (str, os.PathLike)) else list(shards)
    named = [(path, os.fspath(pattern)) for pattern in patterns for path in _expand(os.fspath(pattern), transport)]
    if not named:
        raise ValueError("shards must name at least one shard, got none")
    refuse_twice(named)
    return [path for path, _ in named]


def refuse_twice(named: Iterable[tuple[str, str]]) -> None:
    """Refuse a shard that comes twice, because its samples would come twice.

    Args:
        named: Pairs: a path or URL, and the pattern or index that names it.

    Raises:
        ValueError: A shard comes twice.
    """
    sources: dict[str, str] = {}
    for path, source in named:
        name = path if "://" in path else os.path.normcase(os.path.normpath(Path(path).absolute()))
        if name in sources:
            by = " and by ".join(repr(shown(each)) for each in dict.fromkeys([sources[name], source]))
            raise ValueError(
                f"{shown(path)} is named twice, by {by}, and its samples would come twice: name each shard once"
            )
        sources[name] = source


def expand_braces(pattern: str) -> list[str]:
    r"""Expand the braces of a pattern, in the order of bash and of the braceexpand package.

    A backslash escapes the next character, except on Windows, where it separates folders.

    Raises:
        ValueError: Braces do not match.

    >>> expand_braces("x-{a{1..2},b}.tar")
    ['x-a1.tar', 'x-a2.tar', 'x-b.tar']
    """
    texts = _spell_out(pattern, pattern)
    return [_ESCAPED.sub(r"\1", text) for text in texts] if _HAS_ESCAPES else texts


def _expand(pattern: str, transport: Transport) -> list[str]:
    """The paths of one pattern."""
    if "://" not in pattern and Path(pattern).exists():
        return _list_folder(pattern) if Path(pattern).is_dir() else [pattern]
    return list(chain.from_iterable(_look_up(each, transport) for each in expand_braces(pattern)))


def _look_up(pattern: str, transport: Transport) -> list[str]:
    """The paths of a pattern whose braces are expanded.

    Raises:
        FileNotFoundError: A wildcard matches nothing.
    """
    if "://" in pattern:
        # Over HTTP a question mark begins a query, such as a signature.
        plain = pattern.partition("?")[0] if pattern.lower().startswith(("http://", "https://")) else pattern
        if not _WILD.search(plain):
            return [pattern]
        paths = find_matches(pattern, transport)
    elif Path(pattern).exists():
        return _list_folder(pattern) if Path(pattern).is_dir() else [pattern]
    elif not _WILD.search(pattern):
        return [pattern]
    else:
        paths = _glob(Path(pattern))
    if not paths:
        raise FileNotFoundError(f"no file matches {shown(pattern)}")
    return sorted(paths)


def _list_folder(folder: str) -> list[str]:
    """The shards in a folder.

    Raises:
        FileNotFoundError: There are none.
    """
    paths = sorted(map(str, Path(folder).glob("*.tar")))
    if not paths:
        raise FileNotFoundError(f"no file matches {Path(folder, '*.tar')}{_what_is_there(Path(folder))}")
    return paths


def _what_is_there(folder: Path) -> str:
    """A hint at what a folder without shards holds: a dataset, or folders with shards."""
    if any((folder / name).exists() for name in ("dataset_info.json", "dataset_dict.json")):
        return (
            ": it holds a dataset of Hugging Face, which `lengthtrack report` and lengths_of read as it is, and "
            "`lengthtrack convert` makes shards of"
        )
    nested = min((path.parent for path in folder.glob("*/*.tar")), default=None)
    return "" if nested is None else f": there are shards in {nested}, name that folder"


def _glob(pattern: Path) -> list[str]:
    """The files that match a local pattern."""
    # A folder that exists stands for itself, even if its name has brackets, which `glob` would interpret.
    root, parts = Path(pattern.anchor), list(pattern.parts[1:] if pattern.anchor else pattern.parts)
    while parts and (root / parts[0]).is_dir():
        root /= parts.pop(0)
    return [str(path) for path in root.glob("/".join(parts))]


def _spell_out(text: str, pattern: str) -> list[str]:
    """The texts that a text with braces stands for. `pattern` is the whole pattern, for messages."""
    braces = _find_braces(text, pattern)
    if braces is None:
        return [text]
    first, last, commas = braces
    ends = [first, *commas, last]
    if commas:
        parts = [text[start + 1 : end] for start, end in pairwise(ends)]
        choices = [choice for part in parts for choice in _spell_out(part, pattern)]
    else:
        inside = text[first + 1 : last]
        # Braces around a single item stay, as in the shell: `{a}` is `{a}`.
        choices = _count(inside) or [f"{{{choice}}}" for choice in _spell_out(inside, pattern)]
    tails = _spell_out(text[last + 1 :], pattern)
    return [f"{text[:first]}{choice}{tail}" for choice in choices for tail in tails]


def _find_braces(text: str, pattern: str) -> tuple[int, int, list[int]] | None:
    """Offsets of the first outermost pair of braces, and of the commas directly in it. None without braces.

    >>> _find_braces("x{a,{b,c}}", "")
    (1, 9, [3])

    Raises:
        ValueError: Braces do not match.
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
            f"{shown(pattern)!r}: braces do not match: close each, or put a backslash before one that is no brace"
        )
    return None


def _count(text: str) -> list[str] | None:
    """Expand a range such as `08..11` or `a..e..2`. None if the text is not a range."""
    if (numbers := _NUMBER_RANGE.fullmatch(text)) is not None:
        # A leading zero in one end pads all numbers: `08..11` is 08, 09, 10, 11.
        padded = any(re.match("-?0.", number) for number in numbers.groups()[:2])
        width = max(len(numbers[1]), len(numbers[2])) if padded else 0
        return [f"{number:0{width}}" for number in _range(int(numbers[1]), int(numbers[2]), numbers[3])]
    if (letters := _LETTER_RANGE.fullmatch(text)) is not None:
        ends = _ALPHABET.index(letters[1]), _ALPHABET.index(letters[2])
        return [_ALPHABET[index] for index in _range(*ends, letters[3])]
    return None


def _range(first: int, last: int, size: str | None) -> range:
    """Integers from first to last inclusive, up or down. `size` is the text of the step."""
    step = int(size or 1) or 1
    return range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
