"""How long requests usually take, to find those that take too long.

One request in a few hundred stalls in a busy store, and a second one is answered at once.
"""

from collections import defaultdict, deque
from typing import Final

# The last requests that are remembered, and how many there must be.
_REMEMBERED: Final = 64
_LEAST: Final = 16
# Shorter waits are not worth a second request, in seconds.
_SHORTEST: Final = 0.1
# Second requests are at most this share of all, so that a slow server gets no more than a little more to do.
_MOST_SECOND: Final = 0.05


class UsualTimes:
    """The times that requests to one server took lately, by the size of their answers.

    >>> times = UsualTimes()
    >>> for _ in range(20):
    ...     times.note(1000, 0.05)
    >>> times.limit(900, 4), times.limit(1 << 16, 4), UsualTimes().limit(900, 4)
    (0.2, 0.8, None)
    """

    def __init__(self) -> None:
        # By powers of four of the size: 1 KiB, 4 KiB, 16 KiB, ...
        self._times: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        # A few may be sent before any are saved up.
        self._allowed = 1.0

    def note(self, size: int, seconds: float) -> None:
        """Note an answer."""
        self._times[_class_of(size)].append(seconds)
        self._allowed = min(self._allowed + _MOST_SECOND, 1 / _MOST_SECOND)

    def limit(self, size: int, factor: float) -> float | None:
        """Seconds after which to send a second request.

        Args:
            size: Bytes asked for, 0 if only for a header.
            factor: How many times the median.

        Returns:
            None if too little is known, or no second request is to be sent.
        """
        if not factor or self._allowed < 1:
            return None
        wanted = _class_of(size)
        usual = self._median(wanted)
        if usual is None:
            # The first large answers are judged by small ones: four times the bytes take at most four times as long.
            known = {each: median for each in self._times if (median := self._median(each)) is not None}
            usual = min((median * 4.0 ** max(0, wanted - each) for each, median in known.items()), default=None)
        return None if usual is None else max(_SHORTEST, factor * usual)

    def _median(self, size_class: int) -> float | None:
        """Seconds that an answer of this class usually takes. None if too few have come."""
        times = self._times.get(size_class, ())
        return sorted(times)[len(times) // 2] if len(times) >= _LEAST else None

    def take(self) -> bool:
        """Whether a second request may be sent now; it is counted."""
        if self._allowed < 1:
            return False
        self._allowed -= 1
        return True


def _class_of(size: int) -> int:
    """Sizes of one class take about the same time."""
    return max(size, 1 << 14).bit_length() // 2
