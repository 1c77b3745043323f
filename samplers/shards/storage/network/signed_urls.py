"""URLs of S3 objects that are signed once, and then asked for many ranges.

botocore signs each request and takes each answer apart, which takes 1.1 ms of processor. With a URL that carries its
signature (a "presigned" one), a range takes aiohttp 0.15 ms. The client of the user signs it, so that its credentials
and its endpoint are used. Where requests need more than a signature (further headers, certificates, proxies), or a
store refuses such URLs, the client sends every request itself.

Everything here runs on fsspec's own thread.
"""

from collections import OrderedDict
from collections.abc import Callable
from time import monotonic
from typing import Any, Final
from urllib.request import getproxies

import fsspec

# fsspec has no type hints for it.
_make_system: Callable[..., Any] = fsspec.filesystem

# Seconds for which a URL is good, and for which it is used: a request may take long. Credentials may end sooner.
_GOOD_FOR: Final = 3600
_USED_FOR: Final = 600
# URLs that are kept for a client.
_MOST: Final = 4096
# So often a store may refuse a URL for what the client itself is then given, until no more are tried.
_MOST_REFUSED: Final = 3
# Options of a client that say where, and with which credentials.
_PLAIN: Final = frozenset(
    ["endpoint_url", "region_name", "use_ssl", "aws_access_key_id", "aws_secret_access_key", "aws_session_token"]
)
_PLAIN_CONFIG: Final = frozenset(
    ["signature_version", "region_name", "s3", "max_pool_connections", "connect_timeout", "read_timeout", "retries"]
)
# By the client's file system, all of which are kept alive.
_OF_SYSTEMS: Final[dict[int, "SignedUrls | None"]] = {}


class SignedUrls:
    """Signed URLs of the objects that one client of s3fs reads.

    Args:
        system: The client.

    Attributes:
        http: The file system over HTTP that asks for them.
    """

    def __init__(self, system: Any) -> None:
        self._system = system
        # What is stored is read as it is: S3 compresses nothing on its own. The URLs are quoted already.
        self.http: Any = _make_system("http", encoded=True, client_kwargs={"auto_decompress": False})
        self._urls: OrderedDict[str, tuple[Any, float]] = OrderedDict()
        self._refused, self._is_usable = 0, _needs_only_a_signature(system)

    async def find(self, name: str) -> Any:
        """The signed URL of an object, for a GET, as aiohttp takes it. None if the client must send the request itself.

        Args:
            name: Bucket and key, as the client names it.

        Raises:
            Exception: The client has no credentials, or another error of its own.
        """
        if not self._is_usable:
            return None
        url, end = self._urls.get(name, (None, 0.0))
        if url is None or end < monotonic():
            if (url := await self._sign(name)) is None:
                return None
            self._urls[name] = url, monotonic() + _USED_FOR
            while len(self._urls) > _MOST:
                self._urls.popitem(last=False)
        return url

    def note_refusal(self, name: str, *, is_readable: bool) -> None:
        """Note that the store has refused a URL.

        Args:
            name: Bucket and key.
            is_readable: Whether the client itself was given the object then.
        """
        # The credentials by which it was signed may have ended.
        self._urls.pop(name, None)
        self._refused += is_readable
        self._is_usable = self._refused < _MOST_REFUSED

    async def _sign(self, name: str) -> Any:
        """A new URL. None if it cannot be used."""
        bucket, key, version = self._system.split_path(name)
        await self._system.set_session()
        client = await self._system.get_s3(bucket)
        if version is not None:
            return None
        client.meta.events.register_first("choose-signer.s3.GetObject", _sign_with_v4, unique_id="lengthtrack")
        url: str = await client.generate_presigned_url(
            ClientMethod="get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=_GOOD_FOR
        )
        # Certificates of its own are for the client alone.
        has_own = url.startswith("https:") and self._system.session.get_config_variable("ca_bundle")
        return None if has_own else self.http.encode_url(url)


def signed_urls(system: Any) -> SignedUrls | None:
    """The signed URLs of a file system's client; None if it is not s3fs."""
    if id(system) not in _OF_SYSTEMS:
        # By name: its module may not be installed.
        is_s3 = f"{type(system).__module__}.{type(system).__name__}" == "s3fs.core.S3FileSystem"
        _OF_SYSTEMS[id(system)] = SignedUrls(system) if is_s3 else None
    return _OF_SYSTEMS[id(system)]


def _needs_only_a_signature(system: Any) -> bool:
    """Whether a client's requests have no options that a URL does not carry."""
    return not (
        system.req_kw
        or system.s3_additional_kwargs
        or system.version_aware
        or set(system.client_kwargs) - _PLAIN
        or set(system.config_kwargs) - _PLAIN_CONFIG
        or getproxies()
    )


def _sign_with_v4(signature_version: Any, **_: Any) -> Any:
    """What botocore asks for the version of a signature: in old regions it would take 2, which new ones refuse."""
    return "s3v4-query" if signature_version in {"v4-query", "s3v4-query"} else None
