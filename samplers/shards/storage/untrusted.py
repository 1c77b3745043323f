"""What an index or a server says, before it becomes a file system or the name of a file."""

import re
from typing import Any, Final

from fsspec.registry import known_implementations

from samplers.shards.storage.network.failures import shown

# fsspec has no type hints for it.
_KNOWN: Final[dict[str, dict[str, Any]]] = known_implementations
# Of fsspec's own file systems those that only fetch bytes. Others run templates that a file has (`reference`, in older
# versions without any limit), unpack archives, or ask other programs.
_FETCHING: Final = frozenset(
    [
        *("arrow_hdfs", "blockcache", "cached", "file", "filecache", "ftp", "hdfs", "http", "https", "local"),
        *("memory", "sftp", "simplecache", "smb", "ssh", "webhdfs"),
    ]
)
# Characters that lead elsewhere in the name of a file, or may not be in it, on some system.
_LEADING: Final = re.compile(r"[\\/:*?\"<>|\x00-\x1f]")


def refuse_file_system(path: str, index: str) -> None:
    """Refuse a path that an index names if to read it could do more than fetch bytes.

    A user may name any URL, but the index may come from somebody else. File systems of other packages (s3, gs, a user's
    own) are allowed: they were installed for this. So are those of the URL of the index.

    Args:
        path: Path or URL of a shard, as the index names it.
        index: Path or URL of the index.

    Raises:
        ValueError: A part of the URL is of such a file system.

    >>> refuse_file_system("https://host/a.tar", "corpus.ltx")
    >>> refuse_file_system("reference://a::https://host/list.json", "corpus.ltx")
    Traceback (most recent call last):
    ValueError: an index may not name files of 'reference://', got reference://a::https://host/list.json: copy the ...
    """
    if "://" not in path:
        return
    # In a chain, `zip` alone stands for `zip://`.
    allowed = {part.partition("://")[0] for part in index.split("::")} if "://" in index else set()
    for protocol in (part.partition("://")[0] for part in path.split("::")):
        is_of_fsspec = _KNOWN.get(protocol, {}).get("class", "").startswith("fsspec.")
        if is_of_fsspec and protocol not in _FETCHING and protocol not in allowed:
            raise ValueError(
                f"an index may not name files of '{protocol}://', got {shown(path)}: copy the shards to a folder or "
                "a store"
            )


def file_name_of(url: str) -> str:
    r"""The last part of a URL or path as the name of a local file, which leads nowhere else on any system.

    A query, which may be a signature, is left out.

    >>> file_name_of("https://host/a.tar?signature=1"), file_name_of(r"s3://bucket/..\..\a:b.tar")
    ('a.tar', '.._.._a_b.tar')
    """
    plain = url.partition("?")[0] if "://" in url else url
    return _LEADING.sub("_", plain.rpartition("/")[2])
