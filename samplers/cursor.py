"""Where an epoch stands: a few primitive values that any number of replicas can go on from, and what keeps them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Final, TypeAlias

from samplers.budget import check_count
from samplers.corpus import IndexedLengths, Lengths
from samplers.course import Course, Epoch
from samplers.layout import Layout

PositionDict: TypeAlias = dict[str, int | str]

VERSION: Final = 1
_PARTS: Final = ("lengths", "options", "seed")


@dataclass(frozen=True)
class Position:
    """A place in the sequence of an epoch's batches.

    Attributes:
        epoch: which one.
        replicas: for which the epoch was laid out; whoever goes on may be more or fewer.
        batches: of the sequence that are taken.
    """

    epoch: int
    replicas: int
    batches: int = 0

    def as_dict(self, fingerprint: str) -> PositionDict:
        """Fresh primitive values, for JSON and for `torch.load` at its defaults."""
        return {
            "version": VERSION,
            "epoch": self.epoch,
            "replicas": self.replicas,
            "batches": self.batches,
            "fingerprint": fingerprint,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], fingerprint: str) -> "Position":
        """Read a position of a plan with this fingerprint.

        Raises:
            TypeError: It is not a mapping, or a value has the wrong type.
            ValueError: A value is missing or out of its range, the version is another, or the fingerprint differs.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"a position must be a dict, as position() gives it, got {type(state).__name__}")
        missing = {"version", "epoch", "replicas", "batches", "fingerprint"} - set(state)
        if missing:
            raise ValueError(f"a position must have {sorted(missing)}, got only {sorted(map(str, state))}")
        if state["version"] != VERSION:
            raise ValueError(f"a position must be of version {VERSION}, got version {state['version']!r}: start anew")
        _compare(str(state["fingerprint"]), fingerprint)
        for name, least in (("epoch", 0), ("replicas", 1), ("batches", 0)):
            value = state[name]
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"a position's {name} must be an int, got {value!r}")
            if value < least:
                raise ValueError(f"a position's {name} must be at least {least}, got {value}")
        return cls(state["epoch"], state["replicas"], state["batches"])


def make_fingerprint(lengths: Lengths, layout: Layout) -> str:
    """What a position holds against the plan that it is given to: a short digest of each part that decides a plan."""
    known = lengths.fingerprint if isinstance(lengths, IndexedLengths) else layout.corpus.digest
    parts = (known, layout.digest, str(layout.options.seed))
    return "-".join(blake2b(part.encode(), digest_size=6).hexdigest() for part in parts)


class Cursor:
    """What a sampler's iterators share: which epoch comes, where a seek leads, and where the last iteration began.

    Args:
        layout: the batches of any epoch.
        num_replicas: how many take them together.
        fingerprint: called once, for the first position that is saved or read.
    """

    def __init__(self, layout: Layout, num_replicas: int, fingerprint: Callable[[], str]) -> None:
        self.epoch = 0
        self._layout = layout
        self._num_replicas = num_replicas
        self._find_fingerprint = fingerprint
        self._sought: Position | None = None
        self._began: Course | None = None

    @cached_property
    def fingerprint(self) -> str:
        """Short digests of the lengths, the options and the seed, which a position carries."""
        return self._find_fingerprint()

    @property
    def coming(self) -> Course:
        """What the next iterator will give."""
        return self._course(self._sought or Position(self.epoch, self._num_replicas))

    @property
    def present(self) -> Course:
        """What the last iterator that began gives, or if none has since a seek or another epoch, the next."""
        return self._began or self.coming

    def begin(self, course: Course | None) -> Course:
        """Note that an iterator begins a course, or the coming one, and that the next epoch comes after it."""
        self._began = course or self.coming
        self._sought = None
        self.epoch = self._began.epoch.epoch + 1
        return self._began

    def set_epoch(self, epoch: int) -> None:
        """Let another epoch come next, unless a seek leads into this one."""
        self.epoch = check_epoch(epoch)
        if self._sought is not None and self._sought.epoch != epoch:
            self._sought = None
        if self._began is not None and self._began.epoch.epoch != epoch:
            self._began = None

    def seek(self, state: Mapping[str, Any]) -> None:
        """Let the next iterator begin at a position."""
        course = self.read(state)
        self._sought = Position(course.epoch.epoch, course.epoch.replicas, course.taken)
        self.epoch = self._sought.epoch
        self._began = None

    def read(self, state: Mapping[str, Any]) -> Course:
        """The rest of an epoch from a saved position on; the errors are those of `Position` and `Course`."""
        return self._course(Position.from_dict(state, self.fingerprint))

    def save(self, course: Course, steps: int) -> PositionDict:
        """Where the epoch stands after so many steps of a course."""
        position = Position(course.epoch.epoch, course.epoch.replicas, course.taken_after(steps))
        return position.as_dict(self.fingerprint)

    def _course(self, position: Position) -> Course:
        epoch = Epoch(self._layout.of_epoch(position.epoch), position.epoch, position.replicas)
        return Course(epoch, position.batches, self._num_replicas)


def check_epoch(epoch: int) -> int:
    """Check the number of an epoch.

    Raises:
        TypeError: It is not an int.
        ValueError: It is negative.
    """
    return check_count("epoch", epoch, least=0, hint="count epochs from 0")


def _compare(saved: str, present: str) -> None:
    if saved == present:
        return
    pairs = zip(_PARTS, saved.split("-"), present.split("-"), strict=False)
    changed = [name for name, old, new in pairs if old != new] or ["fingerprint"]
    if "lengths" in changed and "options" in changed:
        # Other lengths cut the batches elsewhere, so that nothing can be said of the options.
        changed.remove("options")
    raise ValueError(
        f"a position must be of the same lengths, options and seed, got one whose {' and '.join(changed)} differ: "
        "build the sampler as it was when the position was saved"
    )
