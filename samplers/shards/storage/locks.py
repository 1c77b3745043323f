"""Locks on files. The system releases a lock when its process ends, even by a kill."""

import os
from contextlib import suppress
from importlib import import_module
from typing import Any, BinaryIO, Final


def _import_or_none(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


# Every common system has one of them: fcntl on Linux and macOS, msvcrt on Windows.
_FCNTL: Final = _import_or_none("fcntl")
_MSVCRT: Final = _import_or_none("msvcrt")
# Windows locks bytes, and then refuses reads and writes of them by other processes. This byte lies at 2 GiB, behind
# the end of every file that is locked here.
_LOCKED_BYTE: Final = (1 << 31) - 2


def lock(stream: BinaryIO) -> bool | None:
    """Lock an open file for as long as it is open. Does not wait.

    Returns:
        True if this process now has the lock, False if another process has it, None if the system or the file system
        has no locks.
    """
    if _FCNTL is not None:
        return _lock_file(stream)
    return None if _MSVCRT is None else _lock_byte(stream)


def unlock(stream: BinaryIO) -> None:
    """Give up a lock before the file is closed.

    A process that was forked meanwhile has the file open too, and the lock with it, for as long as it lives.
    """
    if _FCNTL is not None:
        with suppress(OSError):
            _FCNTL.flock(stream.fileno(), _FCNTL.LOCK_UN)


def _lock_file(stream: BinaryIO) -> bool | None:
    """Lock with fcntl."""
    try:
        _FCNTL.flock(stream.fileno(), _FCNTL.LOCK_EX | _FCNTL.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        # For example a network file system without locks.
        return None
    return True


def _lock_byte(stream: BinaryIO) -> bool:
    """Lock with msvcrt, which locks from the current offset of the file."""
    descriptor = stream.fileno()
    offset = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
    try:
        _MSVCRT.locking(descriptor, _MSVCRT.LK_NBLCK, 1)
    except OSError:
        return False
    finally:
        os.lseek(descriptor, offset, os.SEEK_SET)
    return True
