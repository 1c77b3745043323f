"""Locks of bytes as Windows has them: from the current offset, held by an open file, against all other open files.

Those of Linux that open files own mean the same. What Windows refuses besides, to read or write locked bytes, is not
imitated: the packages lock a byte behind the end of a file.
"""

import fcntl
import os
import struct

LK_UNLCK, LK_LOCK, LK_NBLCK = 0, 1, 2
# The fields of C's `struct flock`: kind, whence, start, size, process.
_FLOCK = struct.Struct("hhqqi0q")


def locking(descriptor: int, mode: int, count: int) -> None:
    """Lock or unlock `count` bytes from the current offset; does not wait.

    Raises:
        PermissionError: Another open file has locked one of them.
        ValueError: It would have to wait.
    """
    if mode not in {LK_UNLCK, LK_NBLCK}:
        raise ValueError(f"only LK_UNLCK and LK_NBLCK are imitated, got {mode}")
    kind = fcntl.F_UNLCK if mode == LK_UNLCK else fcntl.F_WRLCK
    start = os.lseek(descriptor, 0, os.SEEK_CUR)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, start, count, 0))
    except BlockingIOError as error:
        raise PermissionError(13, "Permission denied") from error
