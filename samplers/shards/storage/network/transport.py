"""Options of reads over a network."""

import math
from dataclasses import dataclass
from typing import Final

from collate.widths import check_count


@dataclass(frozen=True)
class Transport:
    """How remote shards and indexes are read: connections, patience and retries.

    One object instead of five arguments, because all that reads takes the same: `ShardDataset`, `ShardStream`,
    `LengthIndex` and the command line. Local files need none of it.

    A request is tried again after a timeout, a dropped connection, a body that ends too early, and the status 408, 425,
    429 or 5xx; not after 403, 404 and other refusals. Before try n + 1 it waits a random time between 0 and
    `backoff` * 2^(n - 1) seconds, at most 20, or as long as `Retry-After` says; the first try after a fault of the
    connection waits for nothing. A body that breaks off is continued at its offset. A request that takes much longer
    than others of its size is sent a second time, and the first answer counts.

    Attributes:
        connections: Requests at a time, of all threads of a process together.
        timeout: Seconds without a byte after which a request is given up. A client that does not tell of single bytes
            (all but HTTP) has a second more for each MiB asked for.
        retries: Tries after the first one, for each request.
        deadline: Seconds that a read may take, with all of its tries: of the ranges of a batch, or of a whole shard.
        backoff: Upper bound of the first wait, in seconds.
        patience: How many times the usual time (the median of the last requests of similar size, before there are 16 of
            them a bound from other sizes) a request may take before a second one is sent, at least 0.1 seconds. At most
            one in twenty is sent twice. 0 sends none twice.

    Raises:
        TypeError: A value is not a number, or a count not an int.
        ValueError: A count or time is out of its range.
    """

    connections: int = 32
    timeout: float = 30.0
    retries: int = 5
    deadline: float = 600.0
    backoff: float = 0.1
    patience: float = 4.0

    def __post_init__(self) -> None:
        check_count("connections", self.connections, least=1, hint="1 sends one request at a time")
        check_count("retries", self.retries, least=0, hint="0 tries once")
        for name in ("timeout", "deadline", "backoff", "patience"):
            value, unit = getattr(self, name), "times the usual time" if name == "patience" else "seconds"
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number of {unit}, got {value!r}")
            if not math.isfinite(value) or value < 0 or (value == 0 and name in {"timeout", "deadline"}):
                raise ValueError(f"{name} must be a positive number of {unit}, got {value!r}")


DEFAULT: Final = Transport()
# Bytes for which a client that does not tell of single bytes may take a second: 1 MiB.
_SLOWEST: Final = 1 << 20


def timeout_of(transport: Transport, size: int) -> float:
    """Seconds for a request of a client that does not tell of single bytes.

    Args:
        transport: Its `timeout` is for the first byte.
        size: Bytes of the request.

    >>> timeout_of(Transport(timeout=30), 2 << 20)
    32.0
    """
    return transport.timeout + size / _SLOWEST


def check_transport(transport: Transport | None) -> Transport:
    """The given options, or the default ones.

    Raises:
        TypeError: It is something else.
    """
    if transport is None:
        return DEFAULT
    if not isinstance(transport, Transport):
        raise TypeError(f"transport must be a Transport(retries=..., timeout=...), got {transport!r}")
    return transport
