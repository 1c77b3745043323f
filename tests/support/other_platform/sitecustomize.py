"""Makes Python what it is where there is no Unix: put this folder on PYTHONPATH, and all processes begin with it.

Modules and functions of Unix are absent, new processes are spawned, /proc does not exist, and a file that is open or
mapped can be neither replaced nor deleted. Locks are those of Windows; with OTHER_PLATFORM_LOCKS=none they are absent
too. The packages are told that `os.name` is "nt"; other modules are not, which would then look for Windows itself.
"""

import builtins
import io
import multiprocessing
import os

# It decides at its import whether this is Windows, by whether there is `msvcrt`.
import subprocess  # noqa: F401
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import byte_locks

MODULES = ("fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty")
# Not those that other packages import on every Unix, such as getuid.
FUNCTIONS = (
    *("fork", "forkpty", "pread", "preadv", "pwrite", "pwritev", "posix_fadvise", "sendfile"),
    *("killpg", "setsid", "mkfifo", "sched_getaffinity", "sched_setaffinity", "statvfs", "fstatvfs"),
)

OUR_PACKAGES = ("collate.", "lengthtrack.", "samplers.")

_listdir, _open, _import = os.listdir, io.open, builtins.__import__


def _refuse_open_file(path: Any) -> None:
    """Refuse what Windows refuses for a file that this process has open or mapped.

    Raises:
        PermissionError: It is such a file.
    """
    try:
        file = Path(os.fsdecode(path)).stat()
    except OSError:
        return
    for name in _listdir("/proc/self/fd"):
        try:
            opened = os.path.samestat(os.fstat(int(name)), file)
        except OSError:
            # The descriptor of the listing.
            continue
        if opened:
            raise PermissionError(13, "The file is open in this process", os.fspath(path))
    with _open("/proc/self/maps") as maps:
        if any(line.rstrip("\n").endswith(f" {os.path.realpath(path)}") for line in maps):
            raise PermissionError(13, "The file is mapped in this process", os.fspath(path))


def _without_open_files(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of `os` that refuses open files."""

    def checked(*paths: Any, **options: Any) -> Any:
        if not options:
            for path in paths:
                _refuse_open_file(path)
        return function(*paths, **options)

    return checked


def _without_proc(function: Callable[..., Any]) -> Callable[..., Any]:
    """`open` where there is no /proc."""

    def opened(file: Any, *rest: Any, **options: Any) -> Any:
        if isinstance(file, (str, os.PathLike)) and os.fspath(file).startswith("/proc"):
            raise FileNotFoundError(2, "No such file or directory", os.fspath(file))
        return function(file, *rest, **options)

    return opened


class _OsOfWindows(types.ModuleType):
    """`os` as the packages see it."""

    name = "nt"

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Any, *rest: Any, **options: Any) -> int:
        """`os.open`, which opens no folders on Windows.

        Raises:
            PermissionError: It is a folder.
        """
        if Path(os.fsdecode(path)).is_dir():
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return os.open(path, *rest, **options)


_OS_OF_WINDOWS = _OsOfWindows("os")


def _import_for_packages(name: str, globals: Any = None, *rest: Any, **options: Any) -> Any:  # noqa: A002
    """`import os` in one of the packages gives what they would have on Windows."""
    if name == "os" and globals and str(globals.get("__name__")).startswith(OUR_PACKAGES):
        return _OS_OF_WINDOWS
    return _import(name, globals, *rest, **options)


builtins.__import__ = _import_for_packages
if os.environ.get("OTHER_PLATFORM_LOCKS") != "none":
    sys.modules["msvcrt"] = byte_locks
for name in MODULES:
    # An entry of None makes an import raise ImportError.
    sys.modules[name] = None  # type: ignore[assignment]
for name in FUNCTIONS:
    if hasattr(os, name):
        delattr(os, name)
if hasattr(os, "process_cpu_count"):
    # From Python 3.13 on; it asks for the affinity, which Windows does not know.
    os.process_cpu_count = os.cpu_count
for name in ("replace", "rename", "remove", "unlink"):
    setattr(os, name, _without_open_files(getattr(os, name)))
builtins.open = io.open = _without_proc(io.open)
multiprocessing.set_start_method("spawn")
