"""Position: where an epoch stands, as a few primitive values from which any number of replicas can resume."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final, TypeAlias

from samplers.planning.sorting import IndexedLengths, Lengths
from samplers.planning.tables.epoch_table import EpochTable

PositionDict: TypeAlias = dict[str, int | str]
"""A place in an epoch, as JSON holds it."""

POSITION_VERSION: Final = 2
# The version of the first release, which had other plans.
_FIRST_VERSION: Final = 1
# Streams of batches whose windows change from epoch to epoch have the last part, unless an older version saved it.
_DIGESTED: Final = ("lengths", "options", "seed", "windows")
# Epochs and replicas are stored as int64 where a loader's workers share them; no training gets this far.
_LARGEST: Final = 2**31 - 1

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """A position in the order of an epoch's batches.

    Attributes:
        epoch: Number of the epoch.
        replicas: Replicas with which the epoch began, which decide its order; those that resume may be more or fewer.
        batches: Batches of the order that are taken.
    """

    epoch: int
    replicas: int
    batches: int = 0

    def as_dict(self, fingerprint: str) -> PositionDict:
        """Fresh primitive values, for JSON and for `torch.load` at its defaults."""
        return {
            "version": POSITION_VERSION,
            "epoch": self.epoch,
            "replicas": self.replicas,
            "batches": self.batches,
            "fingerprint": fingerprint,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], fingerprint: str, batches: int) -> "Position":
        """Read a position of the plan with this fingerprint and this many batches.

        Raises:
            TypeError: It is not a mapping, or a value has the wrong type.
            ValueError: A value is missing or out of its range, the version is another, or the fingerprint differs.
        """
        if not isinstance(state, Mapping):
            raise TypeError(f"a position must be a dict, as position() gives it, got {type(state).__name__}")
        missing = {"version", "epoch", "replicas", "batches", "fingerprint"} - set(state)
        if missing:
            raise ValueError(f"a position must have {sorted(missing)}, got only {sorted(map(str, state))}")
        version = _read_count(state, "version", least=1)
        if version not in {_FIRST_VERSION, POSITION_VERSION}:
            raise ValueError(
                f"a position must be of version {POSITION_VERSION}, got version {version}: resume with the release "
                "that saved it, or start the epoch again with set_epoch"
            )
        position = cls(
            _read_count(state, "epoch", least=0),
            _read_count(state, "replicas", least=1),
            _read_count(state, "batches", least=0),
        )
        if version == _FIRST_VERSION:
            _refuse_first_version(position, str(state["fingerprint"]), fingerprint, batches)
        else:
            _check_fingerprint(str(state["fingerprint"]), fingerprint)
        return position


def make_fingerprint(lengths: Lengths, table: EpochTable) -> str:
    """Short digests of what was planned, which a position carries: `"...-...-..."`, or four, see `_DIGESTED`."""
    of_lengths = lengths.fingerprint if isinstance(lengths, IndexedLengths) else table.lengths_digest
    parts = [of_lengths, table.digest, str(table.options.seed)]
    if table.other_windows is not None:
        parts.append(str(table.other_windows))
    return "-".join(blake2b(part.encode(), digest_size=6).hexdigest() for part in parts)


def warn_of_drop(epoch: int, taken: int, steps: int) -> None:
    """Log that an iteration which resumed from a position was dropped before its end, if it was."""
    if taken < steps:
        _logger.warning(
            "an iteration that resumed from a saved position was dropped after %d of %d batches, and epoch %d comes "
            "next: to get the others, seek the position again right before the loop that shall take them, and take no "
            "batch in between",
            taken,
            steps,
            epoch + 1,
        )


def refuse_iterator_state(state: Mapping[str, Any]) -> None:
    """Refuse the state of an iterator where a position is wanted.

    Raises:
        ValueError: It is the state of an iterator.
    """
    # These keys tell of one rank or worker only; ignoring them would lose or repeat batches.
    extra = {"dealt", "taken"} & set(state) if isinstance(state, Mapping) else ()
    if extra:
        names = ", ".join(map(repr, sorted(extra)))
        raise ValueError(
            f"a position must be what position() gives, got an iterator's state with {names}: give it to "
            "load_state_dict of an iterator as the one that saved it"
        )


def _read_count(state: Mapping[str, Any], name: str, *, least: int) -> int:
    """A checked integer of a position.

    Raises:
        TypeError: It is not an int.
        ValueError: It is out of its range.
    """
    value = state[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"a position's {name} must be an int, got {value!r}")
    if not least <= value <= _LARGEST:
        bound = f"at least {least}" if value < least else f"at most {_LARGEST}"
        raise ValueError(f"a position's {name} must be {bound}, got {value}")
    return value


def _refuse_first_version(position: Position, saved: str, present: str, batches: int) -> None:
    """Refuse a position of another plan, unless it is at the end of its epoch.

    Raises:
        ValueError: Batches of the epoch remain.
    """
    changed = _list_changed(saved, present)
    if position.batches != batches or not {"lengths", "seed"}.isdisjoint(changed):
        raise ValueError(
            f"a position must be of version {POSITION_VERSION}, got version {_FIRST_VERSION}, after batch "
            f"{position.batches} of epoch {position.epoch}: epochs have other batches since. Finish the epoch with the "
            f"release that saved it, or start it again with set_epoch({position.epoch})"
        )


def _list_changed(saved: str, present: str) -> list[str]:
    """The parts in which two fingerprints differ."""
    pairs = zip(_DIGESTED, saved.split("-"), present.split("-"), strict=False)
    return [name for name, old, new in pairs if old != new]


def _check_fingerprint(saved: str, present: str) -> None:
    """Refuse a position of another plan.

    Raises:
        ValueError: The fingerprints differ.
    """
    if saved == present:
        return
    changed = _list_changed(saved, present)
    if not changed and saved == present.rpartition("-")[0] and present.count("-") == len(_DIGESTED) - 1:
        return
    changed = changed or ["fingerprint"]
    if "lengths" in changed and "options" in changed:
        # Different lengths change the digest of the options too, so report only the lengths.
        changed.remove("options")
    raise ValueError(
        f"a position must be of the same lengths, options and seed, got one whose {' and '.join(changed)} differ: "
        "build the sampler as it was when the position was saved"
    )
