"""Find the index files of shards: the corpus file of a folder, or the files next to the shards."""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from samplers.shards.indexing.index_file import SUFFIX
from samplers.shards.storage.network.failures import shown
from samplers.shards.storage.network.transport import DEFAULT, Transport
from samplers.shards.storage.paths import expand_shards
from samplers.shards.storage.reading import Shards

# `lengthtrack convert` has this file next to its shards until the last sample is written.
MARK: Final = ".unfinished.json"


def find_corpora(folder: Path) -> list[Path]:
    """The index files of corpora in a folder. Those of single shards end in `.tar.ltx`, and are left out."""
    return sorted(file for file in folder.glob(f"*{SUFFIX}") if not file.name.endswith(f".tar{SUFFIX}"))


def find_corpus(folder: Path) -> Path | None:
    """The index file of the corpus in a folder. None if there is none.

    Raises:
        ValueError: The folder has several.
    """
    corpora = find_corpora(folder)
    if len(corpora) > 1:
        raise ValueError(f"{folder} holds several corpora: give one of {', '.join(map(str, corpora))}")
    return corpora[0] if corpora else None


def find_index_files(shards: Shards, transport: Transport = DEFAULT) -> list[str]:
    """The index files of shards: index files themselves, the one of a folder, or those next to the shards.

    Args:
        shards: A folder, an `.ltx` file or several, or shards: paths, brace patterns, wildcards or URLs.
        transport: How the folder of a URL with wildcards is listed.

    Raises:
        FileNotFoundError: A pattern matches no file, a path does not exist, or a folder of shards has no index.
        ValueError: A folder has several corpora, or a part of one, or index files and shards are mixed.
    """
    if isinstance(shards, (str, os.PathLike)):
        corpus = find_corpus(Path(shards))
        if corpus is not None:
            return [str(corpus)]
        _check_has_index(Path(shards))
        shards = [shards]
    sources = [os.fspath(source) for source in shards]
    indexes = [source for source in sources if source.endswith(SUFFIX)]
    if indexes and len(indexes) < len(sources):
        raise ValueError(f"{indexes[0]} is an index and {(set(sources) - set(indexes)).pop()} is not: give one kind")
    if indexes:
        return indexes
    found = expand_shards(sources, transport)
    refuse_unfinished(found)
    return [_index_next_to(shard) for shard in found]


def refuse_unfinished(shards: Sequence[str]) -> None:
    """Refuse shards next to the mark of an unfinished conversion.

    Raises:
        ValueError: One is.
    """
    for folder in sorted({Path(shard).parent for shard in shards if "://" not in shard}):
        for mark in sorted(folder.glob(f"*{MARK}")):
            prefix = mark.name.removesuffix(MARK)
            if any(Path(shard).parent == folder and Path(shard).name.startswith(f"{prefix}-") for shard in shards):
                raise ValueError(
                    f"{folder} holds an unfinished conversion, whose shards are a part of the samples: complete it "
                    f"with lengthtrack convert --resume, or delete {mark} to use that part"
                )


def _check_has_index(folder: Path) -> None:
    """Refuse a folder of shards none of which has an index. One that lacks only some is named when it is opened.

    Raises:
        FileNotFoundError: No shard of the folder has an index next to it.
    """
    if folder.is_dir() and any(folder.glob("*.tar")) and not any(folder.glob(f"*{SUFFIX}")):
        raise FileNotFoundError(
            f"no index in the folder {folder}: build it with `lengthtrack index {shlex.quote(str(folder))}`, or "
            f"LengthIndex.build({str(folder)!r}).save({str(folder / 'corpus.ltx')!r})"
        )


def _index_next_to(shard: str) -> str:
    """The path of the index of a shard, which may be gone.

    Raises:
        FileNotFoundError: There is neither.
    """
    index = f"{shard}{SUFFIX}"
    if "://" not in shard and not Path(shard).exists() and not Path(index).exists():
        raise FileNotFoundError(f"no file or folder {shown(shard)}")
    return index
