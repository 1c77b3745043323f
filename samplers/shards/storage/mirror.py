"""A folder of an object store that is written through a local folder.

Objects appear whole or not at all, and cannot be appended to or locked. So a file is written in the local folder,
checked there, and then sent (`upload`). What has been sent takes no room here: of `shard-000000.tar` of 3 MB a file
without content remains that has this size, which tells that the shard exists.
"""

import asyncio
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final
from weakref import finalize

from samplers.shards.storage.atomic import TEMPORARY, is_url, local_path
from samplers.shards.storage.network.failures import shown
from samplers.shards.storage.network.fetched import FetchedFile
from samplers.shards.storage.network.remote import RemoteFile, file_system, is_http
from samplers.shards.storage.network.requests import Request, send_all
from samplers.shards.storage.network.transport import DEFAULT, Transport
from samplers.shards.storage.network.upload import send_file
from samplers.shards.storage.process_pool import call_in_threads

_SHARD: Final = ".tar"
_INDEX: Final = ".ltx"


class Mirror:
    """A remote folder, and the local one through which it is written.

    A copy in another process uses the same local folder, which is removed when the first one is freed.

    Args:
        url: URL of the folder.
        transport: How files are sent.

    Attributes:
        url: URL of the folder, without a slash at its end.
        folder: The local folder.

    Raises:
        ValueError: Nothing can be written there.
    """

    def __init__(self, url: str, transport: Transport = DEFAULT) -> None:
        check_writable(url)
        self.url, self._transport = url.rstrip("/"), transport
        self.folder = Path(mkdtemp(prefix="lengthtrack-"))
        finalize(self, _remove, self.folder, os.getpid())

    def url_of(self, path: Path) -> str:
        """The URL of a file in the local folder."""
        return f"{self.url}/{path.name}"

    def pull(self, prefix: str) -> None:
        """Make the local folder look like the remote one, for the files of a prefix.

        Shards have their size, but no content, unless they have no index and must be read.

        Args:
            prefix: Of a corpus: `PREFIX-...` and `PREFIX.ltx` are its files.

        Raises:
            OSError: The folder cannot be listed, or a file not be read.
        """
        sizes = {name: size for name, size in self._list().items() if name.startswith((f"{prefix}-", f"{prefix}."))}
        whole = []
        for name, size in sizes.items():
            if name.endswith(_SHARD) and f"{name}{_INDEX}" in sizes:
                self._make_hole(self.folder / name, size)
            else:
                whole.append((name, size))
        for _ in call_in_threads(self._download, whole):
            pass

    def push(self, paths: Iterable[Path]) -> None:
        """Send files: first the shards, in their order, then all others side by side.

        Args:
            paths: Files of the local folder.

        Raises:
            FileExistsError: The store has another shard of that name: another writer is at work.
            OSError: A file could not be sent. The message has its URL, the number of tries and the last cause.
        """
        paths = list(paths)
        shards = [path for path in paths if path.name.endswith(_SHARD)]
        # One after the other: if this process is killed, no shard may be missing before an existing one, because the
        # samples that are written must be the first ones.
        for path in shards:
            send_all([self._upload(path)], self._transport)
        send_all([self._upload(path) for path in paths if path not in shards], self._transport)
        for path in shards:
            self._make_hole(path, path.stat().st_size)

    def remove(self, paths: Sequence[Path]) -> None:
        """Remove files here and there, if they exist.

        Raises:
            OSError: The store refuses it.
        """
        for path in paths:
            path.unlink(missing_ok=True)

        async def remove(url: str) -> None:
            system, name = file_system(url)
            with suppress(FileNotFoundError):
                # In a thread: its own call waits for this loop.
                await asyncio.to_thread(system.rm_file, name)

        urls = [self.url_of(path) for path in paths]
        send_all(
            [Request(url, "its removal", partial(partial, remove, url), verb="removed") for url in urls],
            self._transport,
        )

    def _list(self) -> dict[str, int]:
        """The sizes of the files in the remote folder, by name."""
        system, folder = file_system(self.url)

        def find() -> list[dict[str, Any]]:
            # Clients remember lists.
            system.invalidate_cache()
            try:
                return list(system.ls(folder, detail=True))
            except FileNotFoundError:
                return []

        request = Request(self.url, "the list of its files", lambda: partial(asyncio.to_thread, find))
        [entries] = send_all([request], self._transport)
        files = [entry for entry in entries if entry.get("type") == "file"]
        return {entry["name"].rpartition("/")[2]: int(entry["size"]) for entry in files}

    def _download(self, entry: tuple[str, int]) -> None:
        name, size = entry
        file = FetchedFile(RemoteFile(f"{self.url}/{name}", self._transport, {"size": size}))
        (self.folder / name).write_bytes(file.read(0, size))

    def _upload(self, path: Path) -> Request[None]:
        url, size = self.url_of(path), path.stat().st_size
        return Request(
            url,
            f"{size} bytes",
            partial(partial, send_file, url, path, self._transport, is_new=path.name.endswith(_SHARD)),
            verb="written",
            sent=size,
        )

    @staticmethod
    def _make_hole(path: Path, size: int) -> None:
        """Replace a file by one without content that has the same size."""
        hole = path.with_name(path.name + TEMPORARY)
        with hole.open("wb") as stream:
            stream.truncate(size)
        hole.replace(path)


def check_writable(url: str) -> None:
    """Refuse a URL under which nothing can be written.

    Raises:
        ValueError: It is one over HTTP, or a chain of URLs.
    """
    if "::" in url or is_http(file_system(url)[0]):
        raise ValueError(
            f"{shown(url)}: over HTTP and through caches files are read, and not written: give a local folder, or one "
            "in an object store, such as s3://BUCKET/FOLDER"
        )


def open_target(
    folder: "str | os.PathLike[str] | Mirror", prefix: str, transport: Transport = DEFAULT
) -> tuple[Path, Mirror | None]:
    """The local folder of a folder that is to be written, and its mirror, if it is remote.

    Args:
        folder: A path, the URL of a folder, or a mirror that is ready.
        prefix: Of the corpus.
        transport: How files are sent.

    Raises:
        OSError: The remote folder cannot be read.
        ValueError: Nothing can be written there.
    """
    if isinstance(folder, Mirror):
        return folder.folder, folder
    if not is_url(folder):
        return local_path(folder, "folder"), None
    mirror = Mirror(os.fspath(folder), transport)
    mirror.pull(prefix)
    return mirror.folder, mirror


def _remove(folder: Path, process: int) -> None:
    # A forked worker frees its copy too.
    if os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)
