"""Atomic files: a file appears complete or not at all, and two writers never mix their bytes.

>>> from pathlib import Path
>>> from tempfile import TemporaryDirectory
>>> with TemporaryDirectory() as folder:
...     with AtomicFile(Path(folder, "a.tar")) as file:
...         _ = file.stream.write(b"abc")
...         before = [path.name for path in Path(folder).iterdir()]
...     before, [path.name for path in Path(folder).iterdir()]
(['a.tar.tmp'], ['a.tar'])
"""

import io
import os
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

from samplers.shards.storage.locks import lock

# Suffix of a file that is being written.
TEMPORARY: Final = ".tmp"

# One letter before a colon is a Windows drive. `Path` shortens two slashes to one, so one slash is enough here.
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|.*://", re.DOTALL)
_LOCAL: Final = re.compile(r"(?:file|local)://", re.IGNORECASE)
# Another process may mistake a new file for a leftover, and remove it before it is locked. So try again: 20 x 10 ms.
_TRIES: Final = 20
_RETRY_SECONDS: Final = 0.01
# Flushes that run at once: sixteen take no less time for each file.
_FLUSHES: Final = 8


def local_path(path: str | os.PathLike[str], name: str) -> Path:
    """The local path of a file or folder that is to be written.

    Args:
        path: A path, or a `file://` URL.
        name: Name of the argument, for the message.

    Raises:
        ValueError: It is another URL, and `Path` would make a local folder of that name.
    """
    text = os.fspath(path)
    if (scheme := _LOCAL.match(text)) is not None:
        return Path(text[scheme.end() :])
    if _URL.match(text):
        raise ValueError(
            f"{name} must be a path on this machine, got {text!r}: write to a local path, and copy it there (./ before "
            "a local path that looks like a URL)"
        )
    return Path(path)


def is_url(path: object) -> bool:
    """Whether a path to be written is the URL of a remote file or folder."""
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else ""
    # With one slash it is a URL that `Path` has shortened, which is refused by `local_path`.
    return "://" in text and _LOCAL.match(text) is None and _URL.match(text) is not None


class AtomicFile:
    """A file that is written under a temporary name and gets its final name when it is complete.

    It is locked while it is written. So the leftover of a killed process (no lock) differs from a file that another
    process is writing (a lock). As a context it is committed at the end, or discarded if there was an error.

    Attributes:
        path: The final name.
        temporary: The name while it is written.
        stream: The open temporary file.
        committed: Whether it has its final name.
    """

    def __init__(self, path: Path, *, replace: bool = True) -> None:
        """Create the temporary file. The leftover of a killed process is replaced.

        Args:
            path: The final name.
            replace: Whether to replace a file of the final name.

        Raises:
            FileExistsError: Another process is writing the file, or there are no locks that could tell. Or the file
                exists and `replace` is False.
        """
        self.path = path
        self.temporary = path.with_name(path.name + TEMPORARY)
        self.committed = False
        self.stream = io.BufferedWriter(_create(self.temporary))
        # Only the holder of the lock may create the final name, so this check stays true until `commit`.
        if not replace and path.exists():
            self.discard()
            raise FileExistsError(f"{path} exists: another writer is at work in this folder: write to another one")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if error is None:
                self.commit()
        finally:
            self.discard()

    def commit(self) -> None:
        """Flush everything to the disk, then give the file its final name.

        Raises:
            PermissionError: The file of that name may not be replaced, as on Windows while a program has it open.
        """
        self.flush()
        self.rename()
        _sync_folder(self.path.parent)

    def flush(self) -> None:
        """Flush everything to the disk."""
        self.stream.flush()
        os.fsync(self.stream.fileno())

    def rename(self) -> None:
        """Give the file its final name, once everything is on the disk. The name itself is not on the disk yet.

        Raises:
            PermissionError: The file of that name may not be replaced.
        """
        # Windows renames no open file. Elsewhere the lock is held until the file has its final name: another process
        # would remove it as a leftover in between.
        if os.name == "nt":
            self.stream.close()
        try:
            self.temporary.replace(self.path)
        except PermissionError as error:
            self.discard()
            raise PermissionError(
                error.errno,
                "cannot be replaced: where the system replaces no open file, close the datasets, indexes and programs "
                "that use it, or write elsewhere",
                str(self.path),
            ) from error
        self.committed = True
        self.stream.close()

    def discard(self) -> None:
        """Remove the temporary file, unless it has its final name already."""
        if self.committed:
            return
        # On a full disk closing fails as well, because the buffer does not fit either.
        with suppress(OSError):
            self.stream.close()
        self.temporary.unlink(missing_ok=True)


def commit_in_stages(stages: Sequence[Sequence[AtomicFile]]) -> None:
    """Commit many files of one folder with far fewer flushes than `commit` needs for each.

    All are flushed before the first gets its name. The names of a stage are on the disk before those of the next one
    are given, as those of shards are before those of their indexes.

    Raises:
        OSError: A file could not be flushed or renamed. Files without their final name are removed.
    """
    files = [file for stage in stages for file in stage]
    try:
        # A disk answers many flushes at once in about the time of one.
        with ThreadPoolExecutor(min(_FLUSHES, len(files))) as pool:
            list(pool.map(AtomicFile.flush, files))
        for number, stage in enumerate(stages):
            for file in stage:
                if number:
                    # A new name changes the time of a file. Without this, an index would look older than its shard.
                    os.utime(file.temporary)
                file.rename()
            for folder in {file.path.parent for file in stage}:
                _sync_folder(folder)
    except BaseException:
        for file in files:
            file.discard()
        raise


def remove_leftover(temporary: Path) -> None:
    """Remove the temporary file of a killed process, if there is one.

    Without locks, a file that is being written looks like a leftover and is removed too.

    Raises:
        FileExistsError: The process that writes it is alive.
    """
    if not _remove(temporary, without_lock=True):
        raise FileExistsError(f"{temporary} is being written: wait for the other writer, or write elsewhere")


def _create(temporary: Path) -> "_NamedFile":
    """An empty file that this process has locked.

    Raises:
        FileExistsError: Another process has it, or there are no locks that could tell.
    """
    for _ in range(_TRIES):
        try:
            file = _NamedFile(temporary, "xb")
        except FileExistsError:
            if _remove(temporary, without_lock=False):
                continue
            break
        # Between creation and lock another process may have locked and removed the file as a leftover.
        if lock(file) is not False and is_still_at(file, temporary):
            return file
        file.close()
        time.sleep(_RETRY_SECONDS)
    raise FileExistsError(
        f"{temporary} exists: another writer is at work, or was killed: delete it, or write elsewhere"
    )


def _remove(temporary: Path, *, without_lock: bool) -> bool:
    """Remove a leftover. Returns whether the name is free now."""
    try:
        stream = temporary.open("r+b")
    except FileNotFoundError:
        return True
    with stream:
        locked = lock(stream)
        # Since it was opened, its writer may have finished or removed it, and another may have created a new one.
        if locked is False or (locked is None and not without_lock) or not is_still_at(stream, temporary):
            return False
        if os.name != "nt":
            temporary.unlink(missing_ok=True)
            return True
    # Windows cannot remove an open file.
    try:
        temporary.unlink(missing_ok=True)
    except PermissionError:
        return False
    return True


def is_still_at(stream: "BinaryIO | io.FileIO", path: Path) -> bool:
    """Whether the open file is still the one of that name: another process may have removed or replaced it."""
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    """Flush a folder: a crash could lose the new name otherwise."""
    # Windows cannot open folders, and writes names through by itself.
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _NamedFile(io.FileIO):
    """A file whose errors (a full disk) contain its name."""

    def write(self, data: Any) -> int:
        """Write bytes; how many were written.

        Raises:
            OSError: They could not be written; the error names the file.
        """
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.name)) from None
