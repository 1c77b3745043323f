"""Why a request failed: whether another try may help, and what to tell the user.

Clients raise errors of many libraries. Their HTTP status is looked for first, along the chain of causes; then their
type decides.
"""

import asyncio
import re
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from time import time
from typing import Any, Final

# Status of answers that are worth another try, next to 5xx: timeout, too early, too many requests.
_PASSING: Final = frozenset([408, 425, 429])
# Server errors that another try does not change: not implemented, and an unknown version of HTTP.
_LASTING: Final = frozenset([501, 505])
_PERMANENT: Final = (
    *(FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError),
    *(ValueError, TypeError, AttributeError, NotImplementedError, ImportError, LookupError),
)
# Libraries whose errors without a status are those of a connection.
_CLIENTS: Final = frozenset(["aiohttp", "botocore", "aiobotocore", "urllib3", "requests", "http", "azure", "gcsfs"])
# Their errors for credentials or names that are no good, by name: these libraries may not be installed.
_CREDENTIALS: Final = re.compile("Credential|Authenti|TokenRetrieval|ProfileNotFound|SSO|UnauthorizedSSO")
_NAMES: Final = re.compile("InvalidURL|InvalidUrl|Certificate|NoRegion|ParamValidation|InvalidRegion")
_QUERY: Final = re.compile(r"(\w+://[^\s'\"?]*)\?[^\s'\")\]]*")
_USER: Final = re.compile(r"(\w+://)[^\s/@'\"]*@")
# All but line breaks and tabs, which messages have.
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class ShortBodyError(OSError):
    """A body ended before all of its bytes were there."""


def is_transient(error: BaseException) -> bool:
    """Whether another try may help.

    >>> is_transient(ConnectionResetError()), is_transient(PermissionError())
    (True, False)
    """
    status = status_of(error)
    if status is not None:
        return status in _PASSING or (status >= 500 and status not in _LASTING)
    cause = root_of(error)
    if isinstance(cause, (asyncio.TimeoutError, TimeoutError, ShortBodyError)):
        return True
    name = type(cause).__name__
    if isinstance(cause, _PERMANENT) or _CREDENTIALS.search(name) or _NAMES.search(name):
        return False
    return isinstance(cause, (OSError, EOFError)) or type(cause).__module__.split(".")[0] in _CLIENTS


def is_refusal(error: BaseException) -> bool:
    """Whether a server does not answer a request as it was sent: by its status, or by a certificate that is not known.

    >>> is_refusal(TimeoutError()), is_refusal(FileNotFoundError())
    (False, False)
    """
    status = status_of(error)
    if status is not None:
        return status < 500 and status not in _PASSING
    return "Certificate" in type(error).__name__ or "SSL" in type(error).__name__


def root_of(error: BaseException) -> BaseException:
    """The cause of an error."""
    # Over HTTP, fsspec raises FileNotFoundError for every failure.
    cause = error.__cause__
    return cause if isinstance(error, FileNotFoundError) and cause is not None else error


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an answer that a client raises. None without an answer."""
    for cause in _chain(error):
        response: Any = getattr(cause, "response", None)
        data = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
        for value in (getattr(cause, "status", None), getattr(cause, "status_code", None), data.get("HTTPStatusCode")):
            if isinstance(value, int) and not isinstance(value, bool) and 300 <= value < 600:
                return value
    return None


def retry_after(error: BaseException) -> float:
    """Seconds to wait that the answer asks for: a number, or a date. 0 if it says nothing."""
    headers: Any = getattr(error, "headers", None)
    value = (headers.get("Retry-After") if hasattr(headers, "get") else None) or "0"
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except ValueError:
        return 0.0


def failure(
    url: str, what: tuple[str, str], tries: int, error: BaseException, *, too_late: float | None = None
) -> Exception:
    """The error for a request that failed.

    Args:
        url: URL of the file.
        what: What was to be done (read, written), and the bytes asked for, as text.
        tries: How often it was asked for.
        error: The last cause.
        too_late: The deadline in seconds, if it has passed.
    """
    cause, status = root_of(error), status_of(error)
    if isinstance(cause, (ValueError, FileExistsError)) and status is None:
        # What the server sent is no good, or another writer is at work; the message says so.
        return cause
    verb, asked = what
    details = f"{asked}, {tries} {'try' if tries == 1 else 'tries'}"
    missing = isinstance(error, FileNotFoundError) and cause is error
    if status == 404 or (status is None and missing):
        return FileNotFoundError(f"{shown(url)}: there is no such file ({details})")
    late = "" if too_late is None else f", not done after {too_late:g} s"
    text = f"{shown(url)}: cannot be {verb}: {describe(cause)} ({details}{late}): {_remedy(cause, status, too_late)}"
    return PermissionError(text) if status in {401, 403} or isinstance(cause, PermissionError) else OSError(text)


def describe(error: BaseException) -> str:
    """An error as text, without headers, queries of URLs and passwords, which may be secrets."""
    status, message = getattr(error, "status", None), getattr(error, "message", None)
    # repr, and over HTTP str, contain what was sent.
    text = f"{status} {message}" if isinstance(status, int) and message is not None else str(error)
    return f"{type(error).__name__}: {shown(text)}".removesuffix(": ")


def shown(url: str) -> str:
    r"""A path or URL, or a text with URLs, for messages: a query may be a signature, and an index may name any path.

    >>> shown("https://me:secret@host/a.tar?signature=1")
    'https://...@host/a.tar?...'
    >>> print(shown("\x1b[2Ja.tar"))
    \x1b[2Ja.tar
    """
    # What a terminal would obey.
    text = url if url.isprintable() else _CONTROL.sub(lambda found: repr(found[0])[1:-1], url)
    return _USER.sub(r"\1...@", _QUERY.sub(r"\1?...", text)) if "://" in text else text


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes, at most ten.

    Yields:
        The error, its cause, and so on.
    """
    for _ in range(10):
        if error is None:
            return
        yield error
        error = error.__cause__


def _remedy(cause: BaseException, status: int | None, too_late: float | None) -> str:
    """The way out."""
    if status in {401, 403} or isinstance(cause, PermissionError) or _CREDENTIALS.search(type(cause).__name__):
        return "check the credentials of the client, and that they may use this file (docs/shards.md, object stores)"
    if status in {301, 307, 400}:
        return "check the region and the endpoint of the client, and its credentials (docs/shards.md, object stores)"
    if status == 416:
        return "the file is shorter than it was: index it again"
    if too_late is not None:
        return "raise Transport(deadline=), or find out why the server is slow"
    if is_transient(cause):
        return "check the server and the network, or raise Transport(retries=, timeout=)"
    return "check the URL and the options of its client"
