"""Send a file to a store, so that it appears there whole, and replaces no file that must be new.

A shard of 40 MiB goes in parts of 16, 16 and 8 MiB, which the store puts together at the end. Without an end, as after
a kill, nothing is visible. A new file is sent on the condition that there is none of its name (`If-None-Match: *`), so
that the second of two writers gets an error. The condition also fails for the second try of a file whose first try has
arrived without an answer: then the store has the same bytes.
"""

import asyncio
from inspect import signature
from pathlib import Path
from typing import Any, Final

from samplers.shards.storage.network.failures import shown, status_of
from samplers.shards.storage.network.fetched import PART
from samplers.shards.storage.network.remote import file_system, is_async
from samplers.shards.storage.network.requests import gate_of
from samplers.shards.storage.network.transport import Transport, timeout_of

# A client that has only half of a file under its name writes it under another one before.
_HALF: Final = ".tmp"
# Parts that S3 takes for one file.
_MOST_PARTS: Final = 10_000
# Stores that refuse the condition, by the id of their client.
_WITHOUT_CONDITIONS: Final[set[int]] = set()
_CONFLICT: Final = 409
_NOT_IMPLEMENTED: Final = 501


async def send_file(url: str, path: Path, transport: Transport, *, is_new: bool) -> None:
    """Send a file once.

    Args:
        url: Where it is to appear.
        path: The local file.
        transport: How long it may take.
        is_new: Refuse to replace another file, where the client can tell.

    Raises:
        ConnectionAbortedError: Another writer is at work in this moment; try again.
        FileExistsError: There is another file of that name.
        FileNotFoundError: There is no such bucket.
        OSError: An error of the connection.
    """
    system, name = file_system(url)
    if not is_async(system):
        async with gate_of(id(system), 1):
            await asyncio.to_thread(_put, system, path, name, is_new=is_new)
        return
    options = _options_of(system, path.stat().st_size, is_new=is_new)
    try:
        sending = system._put_file(str(path), name, **options)  # noqa: SLF001
        await asyncio.wait_for(sending, timeout_of(transport, path.stat().st_size))
    except (FileExistsError, FileNotFoundError) as error:
        # Parts that were put together, without an answer that says so, are no longer found either.
        if await _has_same_bytes(system, name, path):
            return
        if isinstance(error, FileExistsError):
            raise FileExistsError(_taken(url)) from None
        raise
    except Exception as error:
        if is_new and status_of(error) == _CONFLICT:
            # The next try tells who was first.
            raise ConnectionAbortedError(f"{shown(url)} is being written") from None
        if not is_new or status_of(error) != _NOT_IMPLEMENTED or id(system) in _WITHOUT_CONDITIONS:
            raise
        _WITHOUT_CONDITIONS.add(id(system))
        await send_file(url, path, transport, is_new=False)


def _options_of(system: Any, size: int, *, is_new: bool) -> dict[str, Any]:
    """What to tell a client: clients differ in their options."""
    known = signature(system._put_file).parameters  # noqa: SLF001
    options: dict[str, Any] = {}
    if "chunksize" in known and size <= PART * _MOST_PARTS:
        options["chunksize"] = PART
    is_new = is_new and id(system) not in _WITHOUT_CONDITIONS
    if "overwrite" in known:
        # Of adlfs.
        options["overwrite"] = not is_new
    elif "mode" in known:
        # Of s3fs and gcsfs.
        options["mode"] = "create" if is_new else "overwrite"
    return options


async def _has_same_bytes(system: Any, name: str, path: Path) -> bool:
    """Whether the store has this file already, from a try without an answer."""
    system.invalidate_cache(name.rpartition("/")[0])
    size = path.stat().st_size
    if not await system._exists(name) or (await system._info(name))["size"] != size:  # noqa: SLF001
        return False
    with path.open("rb") as file:
        for start in range(0, size, PART):
            piece = file.read(PART)
            if await system._cat_file(name, start=start, end=start + len(piece)) != piece:  # noqa: SLF001
                return False
    return True


def _put(system: Any, path: Path, name: str, *, is_new: bool) -> None:
    """Send a file with a client that may need the folder, and may show half of a file.

    Raises:
        FileExistsError: There is another file of that name.
    """
    system.makedirs(name.rpartition("/")[0], exist_ok=True)
    half = f"{name}{_HALF}"
    system.put_file(str(path), half)
    if is_new and system.exists(name):
        is_same = system.cat_file(name) == path.read_bytes()
        system.rm_file(half)
        if not is_same:
            raise FileExistsError(_taken(name))
        return
    system.mv(half, name)


def _taken(name: str) -> str:
    return (
        f"{shown(name)} was written by another writer, which is at work in this folder: write to another one, or wait "
        "until it has ended, and continue behind it with append=True"
    )
