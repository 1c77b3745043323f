"""URLs of S3 objects that are signed once, and then asked for many ranges.

botocore signs each request and takes each answer apart, which takes 1.1 ms of processor. With a URL that carries its
signature (a "presigned" one), a range takes aiohttp 0.15 ms. The client of the user signs it, so that its credentials
and its endpoint are used. Where requests need more than a signature (further headers, certificates, proxies), or a
store refuses such URLs, the client sends every request itself.

Everything here runs on fsspec's own thread.
"""

from collections import OrderedDict
from contextvars import ContextVar
from dataclasses import dataclass, field
from time import monotonic, time
from typing import Any, Final
from urllib.request import getproxies

# Seconds for which a URL is good, and for which it is used: a request may take long. Credentials may end sooner.
_GOOD_FOR: Final = 3600
_USED_FOR: Final = 600
# A URL that is refused this soon, in seconds, was never good.
_NEW: Final = 60
# URLs that are kept for a client.
_MOST: Final = 4096
# So many new URLs may be refused for what the client itself is given, until no more are tried for some time.
_MOST_REFUSED: Final = 3
_NONE_FOR: Final = 600
# Options of a client that say where, and with which credentials.
_PLAIN: Final = frozenset(
    ["endpoint_url", "region_name", "use_ssl", "aws_access_key_id", "aws_secret_access_key", "aws_session_token"]
)
_PLAIN_CONFIG: Final = frozenset(
    ["signature_version", "region_name", "s3", "max_pool_connections", "connect_timeout", "read_timeout", "retries"]
)
# By the client's file system, all of which are kept alive.
_OF_SYSTEMS: Final[dict[int, "SignedUrls | None"]] = {}
# Whether the URL that is being signed is one of ours. The user's own are signed as ever.
_IS_OURS: Final[ContextVar[bool]] = ContextVar("_IS_OURS", default=False)


@dataclass(frozen=True)
class SignedUrl:
    """A URL, and when it was signed.

    Attributes:
        url: As aiohttp takes it.
        begin: Seconds of a clock that always goes on.
        date: Seconds of the clock that the signature has. Only one of the two goes on while a machine sleeps.
    """

    url: Any
    begin: float = field(default_factory=lambda: monotonic())
    date: float = field(default_factory=lambda: time())

    def is_younger(self, seconds: float) -> bool:
        """Whether it was signed less than some seconds ago."""
        return monotonic() - self.begin < seconds and 0 <= time() - self.date < seconds

    @property
    def is_new(self) -> bool:
        """Whether it was signed just now."""
        return self.is_younger(_NEW)


class SignedUrls:
    """Signed URLs of the objects that one client of s3fs reads.

    Args:
        system: The client.

    Attributes:
        http: The file system over HTTP that asks for them.
        have_worked: Whether the store has answered one of them.
    """

    def __init__(self, system: Any) -> None:
        # Installed, since s3fs needs aiohttp.
        from fsspec.implementations import http  # noqa: PLC0415

        self._system, self.have_worked = system, False
        # What is stored is read as it is: S3 compresses nothing on its own. The URLs are quoted already.
        make: Any = http.HTTPFileSystem
        options = {"encoded": True, "client_kwargs": {"auto_decompress": False}, "get_client": http.get_client}
        self.http: Any = make(**options, skip_instance_cache=True)
        # What the user has set for sites over HTTP, such as passwords, is not for the store.
        self.http.kwargs = {}
        self._urls: OrderedDict[str, SignedUrl] = OrderedDict()
        self._refused, self._none_until = 0, 0.0
        self._is_usable = _needs_only_a_signature(system)

    async def find(self, name: str) -> SignedUrl | None:
        """The signed URL of an object, for a GET. None if the client must send the request itself.

        Args:
            name: Bucket and key, as the client names it.

        Raises:
            Exception: The client has no credentials, or another error of its own.
        """
        if not self._is_usable or monotonic() < self._none_until:
            return None
        signed = self.known(name)
        if signed is None and (signed := await self._sign(name)) is not None:
            self._urls[name] = signed
            self._urls.move_to_end(name)
            while len(self._urls) > _MOST:
                self._urls.popitem(last=False)
        return signed

    def known(self, name: str) -> SignedUrl | None:
        """The signed URL of an object, if there is one that can be used."""
        signed = self._urls.get(name)
        if signed is None or not signed.is_younger(_USED_FOR) or monotonic() < self._none_until:
            return None
        # Those that were not used for longest go first.
        self._urls.move_to_end(name)
        return signed

    def note_success(self) -> None:
        """Note that the store has answered a URL."""
        self.have_worked, self._refused = True, 0

    def forget(self, name: str, url: SignedUrl) -> None:
        """Use a URL no more. Another request may have signed a new one already."""
        if self._urls.get(name) is url:
            del self._urls[name]

    def note_refusal(self) -> None:
        """Note that the store has refused a new URL for what it has then given to the client."""
        self._refused += 1
        if self._refused >= _MOST_REFUSED:
            self._refused, self._none_until = 0, monotonic() + _NONE_FOR

    async def _sign(self, name: str) -> SignedUrl | None:
        """A new URL. None if it cannot be used."""
        bucket, key, version = self._system.split_path(name)
        if version is not None:
            return None
        await self._system.set_session()
        client = await self._system.get_s3(bucket)
        is_encrypted = client.meta.endpoint_url.startswith("https:")
        if is_encrypted and self._system.session.get_config_variable("ca_bundle"):
            # Certificates of its own are for the client alone.
            self._is_usable = False
            return None
        for event, handler in {"before-parameter-build": _use_own_endpoint, "choose-signer": _sign_with_v4}.items():
            client.meta.events.register_first(f"{event}.s3.GetObject", handler, unique_id=f"lengthtrack-{event}")
        token = _IS_OURS.set(True)
        try:
            url: str = await client.generate_presigned_url(
                ClientMethod="get_object", Params={"Bucket": bucket, "Key": key}, ExpiresIn=_GOOD_FOR
            )
        finally:
            _IS_OURS.reset(token)
        return SignedUrl(self.http.encode_url(url))


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
        # Hosts without a proxy are no proxy.
        or set(getproxies()) - {"no"}
    )


def _use_own_endpoint(context: Any = None, **_: Any) -> None:
    """Sign for the host that the client itself asks: botocore would take the global one, which may be out of reach."""
    if _IS_OURS.get() and context is not None:
        context["use_global_endpoint"] = False


def _sign_with_v4(signature_version: Any = None, **_: Any) -> Any:
    """The version of a signature: in old regions botocore would take 2, which new buckets refuse."""
    return "s3v4-query" if _IS_OURS.get() and signature_version in {"v4-query", "s3v4-query"} else None
