"""New files: they appear whole or not at all, on this machine, and never in the place of another writer's."""

import io
import os
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

from samplers.shards.storage.locks import lock

# Ends the name of a file that is being written.
TEMPORARY: Final = ".tmp"

# A drive is one letter, and `Path` makes one slash of two.
_URL: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/|.*://", re.DOTALL)
_LOCAL: Final = re.compile(r"(?:file|local)://", re.IGNORECASE)
# Tries to create a file that another process takes for a leftover, and seconds between them.
_TRIES: Final = 20
_PAUSE: Final = 0.01


def local_path(path: str | os.PathLike[str], name: str) -> Path:
    """A path on this machine that is to be written.

    Args:
        path: a path, or a `file://` URL.
        name: of the argument, for the message.

    Raises:
        ValueError: It is another URL: nothing is written there, and a folder of that name would be made here.
    """
    text = os.fspath(path)
    if (local := _LOCAL.match(text)) is not None:
        return Path(text[local.end() :])
    if _URL.match(text):
        raise ValueError(
            f"{name} must be a path on this machine, got {text!r}: URLs are read, and not written: write to a local "
            "folder, and copy it there (./ before a local path that looks like a URL)"
        )
    return Path(path)


class NewFile:
    """A file that is written beside its final name and appears under it complete, or not at all.

    While it is written it is locked, so that what a killed process left can be told from another's work.

    Attributes:
        path: the final name.
        temporary: the name while it is written.
        stream: what to write to.
    """

    def __init__(self, path: Path, *, replace: bool = True) -> None:
        """Create the temporary file, in the place of one that a killed process left.

        Args:
            path: the final name.
            replace: take the place of a file of that name.

        Raises:
            FileExistsError: Somebody else writes the file, or there are no locks to tell whether somebody does. Or the
                file itself exists and is not to be replaced.
        """
        self.path = path
        self.temporary = path.with_name(path.name + TEMPORARY)
        self.stream = io.BufferedWriter(_create(self.temporary))
        # Only who holds the temporary file gives the name away: from here on nobody else does.
        if not replace and path.exists():
            self.discard()
            raise FileExistsError(f"{path} exists: another writer is at work in this folder: write to another one")

    def commit(self) -> None:
        """Send everything to the disk, then give the file its final name."""
        self.stream.flush()
        os.fsync(self.stream.fileno())
        self.stream.close()
        self.temporary.replace(self.path)
        _sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove what has been written."""
        # What is still in the buffer does not fit a full disk either.
        with suppress(OSError):
            self.stream.close()
        self.temporary.unlink(missing_ok=True)


def remove_leftover(temporary: Path) -> None:
    """Remove the temporary file of a killed process; nothing happens if there is none.

    Where there are no locks, a file that is being written cannot be told from a leftover, and is removed too.

    Raises:
        FileExistsError: The process that writes it is alive.
    """
    if not _remove(temporary, without_lock=True):
        raise FileExistsError(f"{temporary} is being written: wait for the other writer, or write elsewhere")


def _create(temporary: Path) -> "_NamedFile":
    """An empty file that this process has locked.

    Raises:
        FileExistsError: Another process has it, or none can tell.
    """
    for _ in range(_TRIES):
        try:
            file = _NamedFile(temporary, "xb")
        except FileExistsError:
            if _remove(temporary, without_lock=False):
                continue
            break
        # Before it is locked, another process may take it for a leftover, lock it and remove it.
        if lock(file) is not False and _is_still(file, temporary):
            return file
        file.close()
        time.sleep(_PAUSE)
    raise FileExistsError(
        f"{temporary} exists: another writer is at work, or was killed: delete it, or write elsewhere"
    )


def _remove(temporary: Path, *, without_lock: bool) -> bool:
    """Remove a leftover; whether there is none now."""
    try:
        stream = temporary.open("r+b")
    except FileNotFoundError:
        return True
    with stream:
        held = lock(stream)
        # Meanwhile it may have been finished, or removed, and another begun under its name.
        if held is False or (held is None and not without_lock) or not _is_still(stream, temporary):
            return False
        if os.name != "nt":
            temporary.unlink(missing_ok=True)
            return True
    # Windows keeps what is open.
    try:
        temporary.unlink(missing_ok=True)
    except PermissionError:
        return False
    return True


def _is_still(stream: "BinaryIO | io.FileIO", path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(stream.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    # A name is safe only when its folder is. Windows opens no folders, and keeps names itself.
    if os.name != "nt":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class _NamedFile(io.FileIO):
    """A file that names itself when the disk is full."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.name)) from None
