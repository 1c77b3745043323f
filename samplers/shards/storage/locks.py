"""Locks on files: which the system takes back when a process ends, however it does."""

import os
from importlib import import_module
from typing import Any, BinaryIO, Final


def _load(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None


# One of them is there on every common system: fcntl on Linux and macOS, msvcrt on Windows.
_FCNTL: Final = _load("fcntl")
_MSVCRT: Final = _load("msvcrt")
# Windows locks bytes, and nobody else may then read or write them: one far behind what a file of this kind holds.
_FAR: Final = (1 << 31) - 2


def lock(stream: BinaryIO) -> bool | None:
    """Lock an open file for as long as it is open, without waiting.

    Returns:
        True if this process has the lock, False if another one has; None where the system or the file system knows no
        locks, so that nobody can tell.
    """
    if _FCNTL is not None:
        return _lock_file(stream)
    return None if _MSVCRT is None else _lock_byte(stream)


def _lock_file(stream: BinaryIO) -> bool | None:
    try:
        _FCNTL.flock(stream.fileno(), _FCNTL.LOCK_EX | _FCNTL.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _lock_byte(stream: BinaryIO) -> bool:
    descriptor = stream.fileno()
    before = os.lseek(descriptor, 0, os.SEEK_CUR)
    os.lseek(descriptor, _FAR, os.SEEK_SET)
    try:
        _MSVCRT.locking(descriptor, _MSVCRT.LK_NBLCK, 1)
    except OSError:
        return False
    finally:
        os.lseek(descriptor, before, os.SEEK_SET)
    return True
