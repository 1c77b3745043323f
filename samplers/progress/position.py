"""Where an epoch stands: a few primitive values that any number of replicas can go on from, and what keeps them."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Final, TypeAlias

from collate.widths import check_count
from samplers.planning.clipping import warn_of_longer
from samplers.planning.schedule import Course, Epoch
from samplers.planning.sorting import IndexedLengths, Lengths
from samplers.planning.tables.batch_table import Layout

PositionDict: TypeAlias = dict[str, int | str]

VERSION: Final = 2
# What the first release wrote; its plans were others.
_FIRST_VERSION: Final = 1
_PARTS: Final = ("lengths", "options", "seed")
# Numbers of epochs and replicas are kept where a loader's workers share them.
_MOST: Final = 2**31 - 1

_logger = logging.getLogger(__name__)


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
    def from_dict(cls, state: Mapping[str, Any], fingerprint: str, batches: int) -> "Position":
        """Read a position of a plan with this fingerprint and so many batches.

        Raises:
            TypeError: It is not a mapping, or a value has the wrong type.
            ValueError: A value is missing or out of its range, the version is another, or the fingerprint differs.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"a position must be a dict, as position() gives it, got {type(state).__name__}")
        missing = {"version", "epoch", "replicas", "batches", "fingerprint"} - set(state)
        if missing:
            raise ValueError(f"a position must have {sorted(missing)}, got only {sorted(map(str, state))}")
        version = _read_number(state, "version", least=1)
        if version not in {_FIRST_VERSION, VERSION}:
            raise ValueError(
                f"a position must be of version {VERSION}, got version {version}: go on with the release that saved "
                "it, or start the epoch again with set_epoch"
            )
        position = cls(
            _read_number(state, "epoch", least=0),
            _read_number(state, "replicas", least=1),
            _read_number(state, "batches", least=0),
        )
        if version == _FIRST_VERSION:
            _refuse_first_version(position, str(state["fingerprint"]), fingerprint, batches)
        else:
            _compare(str(state["fingerprint"]), fingerprint)
        return position


def make_fingerprint(lengths: Lengths, layout: Layout) -> str:
    """What a position holds against the plan that it is given to: a short digest of each part that decides a plan."""
    known = lengths.fingerprint if isinstance(lengths, IndexedLengths) else layout.corpus.digest
    parts = (known, layout.digest, str(layout.options.seed))
    return "-".join(blake2b(part.encode(), digest_size=6).hexdigest() for part in parts)


@dataclass(eq=False)
class Pass:
    """One iteration over a course, or over the rest of one.

    Attributes:
        course: what it gives.
        sought: whether it goes on from a position that was sought or loaded.
        taken: steps that its iterator has given so far.
    """

    course: Course
    sought: bool
    taken: int = 0


class Cursor:
    """What a sampler's iterators share: which epoch comes, where a seek leads, and where the last iteration began.

    Args:
        layout: the batches of any epoch.
        num_replicas: how many take them together.
        fingerprint: called once, for the first position that is saved or read.
    """

    def __init__(self, layout: Layout, num_replicas: int, fingerprint: Callable[[], str]) -> None:
        self.epoch = 0
        self.num_replicas = num_replicas
        self._layout = layout
        self._find_fingerprint = fingerprint
        self._sought: Position | None = None
        self._began: Course | None = None
        self._last: Pass | None = None
        self._knows_who_cuts = layout.options.max_length is None

    @cached_property
    def fingerprint(self) -> str:
        """Short digests of the lengths, the options and the seed, which a position carries."""
        return self._find_fingerprint()

    @property
    def coming(self) -> Course:
        """What the next iterator will give."""
        return self._course(Position(self.epoch, self.num_replicas) if self._sought is None else self._sought)

    @property
    def present(self) -> Course:
        """What the last iterator that began gives, or if none has since a seek or another epoch, the next."""
        return self.coming if self._began is None else self._began

    def begin(self, loaded: Pass | None) -> Pass:
        """Note that an iterator begins what was loaded, or what comes, and that the next epoch comes after it."""
        begun = Pass(self.coming, self._sought is not None) if loaded is None else loaded
        if not self._knows_who_cuts:
            warn_of_longer(self._layout.corpus)
            self._knows_who_cuts = True
        last = self._last
        if last is not None and last.sought and not begun.sought:
            warn_of_drop(last.course.epoch.epoch, last.taken, last.course.steps)
        self._last, self._began = begun, begun.course
        self._sought = None
        self.epoch = begun.course.epoch.epoch + 1
        return begun

    def acknowledge_max_length(self) -> None:
        """Log no warning of samples that are planned as cut."""
        self._knows_who_cuts = True

    def set_epoch(self, epoch: int) -> None:
        """Let another epoch come next, unless a seek leads into this one."""
        self.epoch = check_epoch(epoch)
        if self._sought is not None and self._sought.epoch != epoch:
            self._sought = None
        if self._began is not None and self._began.epoch.epoch != epoch:
            self._began = None

    def seek(self, state: Mapping[str, Any]) -> None:
        """Let the next iterator begin at a position."""
        refuse_iterator_state(state)
        course = self.read(state)
        self._sought = Position(course.epoch.epoch, course.epoch.replicas, course.taken)
        self.epoch = self._sought.epoch
        self._began = None

    def read(self, state: Mapping[str, Any]) -> Course:
        """The rest of an epoch from a saved position on; the errors are those of `Position` and `Course`."""
        return self._course(Position.from_dict(state, self.fingerprint, len(self._layout)))

    def save(self, course: Course, steps: int) -> PositionDict:
        """Where the epoch stands after so many steps of a course."""
        position = Position(course.epoch.epoch, course.epoch.replicas, course.taken_after(steps))
        return position.as_dict(self.fingerprint)

    def _course(self, position: Position) -> Course:
        epoch = Epoch(self._layout.of_epoch(position.epoch, position.replicas), position.epoch, position.replicas)
        return Course(epoch, position.batches, self.num_replicas)


def warn_of_drop(epoch: int, taken: int, steps: int) -> None:
    """Log that an iteration which went on from a position was dropped, if it was."""
    if taken < steps:
        _logger.warning(
            "an iteration that went on from a saved position was dropped after %d of %d batches, and epoch %d comes "
            "next: to have the others, seek the position again before the loop that shall take them, and take no batch "
            "of it before",
            taken,
            steps,
            epoch + 1,
        )


def check_epoch(epoch: int) -> int:
    """Check the number of an epoch.

    Raises:
        TypeError: It is not an int.
        ValueError: It is negative, or above 2**31 - 1.
    """
    epoch = check_count("epoch", epoch, least=0, hint="count epochs from 0")
    if epoch > _MOST:
        raise ValueError(f"epoch must be at most {_MOST}, got {epoch}: count epochs from 0")
    return epoch


def _read_number(state: Mapping[str, Any], name: str, *, least: int) -> int:
    value = state[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"a position's {name} must be an int, got {value!r}")
    if not least <= value <= _MOST:
        bound = f"at least {least}" if value < least else f"at most {_MOST}"
        raise ValueError(f"a position's {name} must be {bound}, got {value}")
    return value


def refuse_iterator_state(state: Mapping[str, Any]) -> None:
    """Refuse what an iterator has saved and no position is.

    Raises:
        ValueError: It is one.
    """
    # Each tells of a part only, and the rest of it would be overlooked.
    parts = {"dealt", "taken"} & set(state) if isinstance(state, Mapping) else ()
    if parts:
        names = ", ".join(map(repr, sorted(parts)))
        raise ValueError(
            f"a position must be what position() gives, got an iterator's state with {names}: give it to "
            "load_state_dict of an iterator as the one that saved it"
        )


def _refuse_first_version(position: Position, saved: str, present: str, batches: int) -> None:
    """Refuse a position of another plan, unless nothing of its epoch is left.

    Raises:
        ValueError: Something is left.
    """
    changed = _changed_parts(saved, present)
    if position.batches != batches or not {"lengths", "seed"}.isdisjoint(changed):
        raise ValueError(
            f"a position must be of version {VERSION}, got version {_FIRST_VERSION}, after batch {position.batches} of "
            f"epoch {position.epoch}: epochs have other batches since. Finish the epoch with the release that saved "
            f"it, or start it again with set_epoch({position.epoch})"
        )


def _changed_parts(saved: str, present: str) -> list[str]:
    pairs = zip(_PARTS, saved.split("-"), present.split("-"), strict=False)
    return [name for name, old, new in pairs if old != new]


def _compare(saved: str, present: str) -> None:
    if saved == present:
        return
    changed = _changed_parts(saved, present) or ["fingerprint"]
    if "lengths" in changed and "options" in changed:
        # Other lengths cut the batches elsewhere, so that nothing can be said of the options.
        changed.remove("options")
    raise ValueError(
        f"a position must be of the same lengths, options and seed, got one whose {' and '.join(changed)} differ: "
        "build the sampler as it was when the position was saved"
    )
