"""What must come: the epochs as plain lists of steps, and where in them a run stands."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

Batch = list[int]
# One batch for each replica. Empty where no page tells of it: the replica that gets it first writes it down, and all
# others must get the same.
Step = list[Batch]


@dataclass(frozen=True)
class Place:
    """A place in the sequence of an epoch's batches.

    Attributes:
        epoch: which one.
        laid: replicas for which it was laid out.
        taken: batches of the sequence that are taken.
        within: replicas that have their batch of the step that comes, where one loader serves all.
    """

    epoch: int
    laid: int
    taken: int = 0
    within: int = 0


class Book:
    """All epochs on any number of replicas.

    Args:
        write: gives an epoch's batches, in order, on that number of replicas; it is asked once for each.
        alike: whether epochs may be alike.
        even: whether all have as many batches.
    """

    def __init__(self, write: Callable[[int, int], list[Batch]], *, alike: bool = False, even: bool = True) -> None:
        self._write = write
        self._alike, self._even = alike, even
        self._pages: dict[tuple[int, int], list[Batch]] = {}
        self._found: dict[tuple[int, ...], Batch] = {}
        self.samples = sorted(sample for batch in self.page(0, 1) for sample in batch)
        assert len(set(self.samples)) == len(self.samples)

    def total(self, epoch: int) -> int:
        """Batches of an epoch's sequence: one replica splits no step."""
        return len(self.page(0 if self._even else epoch, 1))

    def page(self, epoch: int, replicas: int) -> list[Batch]:
        """An epoch's batches, `replicas` in each step."""
        if (epoch, replicas) not in self._pages:
            batches = self._write(epoch, replicas)
            if self._pages:
                assert sorted(sample for batch in batches for sample in batch) == self.samples
                assert not self._even or len(batches) == replicas * self.steps(Place(epoch, replicas), replicas)
            others = [page for (other, count), page in self._pages.items() if count == replicas and other != epoch]
            assert self._alike or batches not in others, f"epoch {epoch} is like another"
            self._pages[epoch, replicas] = batches
        return self._pages[epoch, replicas]

    def steps(self, place: Place, replicas: int) -> int:
        """Steps in which that number of replicas takes the rest."""
        return -(-(self.total(place.epoch) - place.taken) // replicas)

    def rest(self, place: Place, replicas: int) -> tuple[list[Step], set[int]]:
        """The steps that are left, and their samples."""
        total = self.total(place.epoch)
        if place.taken >= total:
            return [], set()
        taken = [self.whole(place, at) for at in range(place.taken)]
        split = total - (total - place.taken) % replicas
        flat = [self.whole(place, at) for at in range(place.taken, split)]
        if split < total:
            flat += [self.piece(place, replicas, split, rank) for rank in range(replicas)]
        steps = [flat[at : at + replicas] for at in range(0, len(flat), replicas)]
        before = taken + (steps[0][: place.within] if place.within else [])
        assert all(before), "a place behind a batch that nobody has got"
        return steps, set(self.samples) - {sample for batch in before for sample in batch}

    def whole(self, place: Place, at: int) -> Batch:
        """A batch of the sequence; a page has those of the last step split, if they are fewer than its replicas."""
        total = self.total(place.epoch)
        if at < total - total % place.laid:
            return self.page(place.epoch, place.laid)[at]
        return self._found.setdefault((place.epoch, place.laid, at), [])

    def piece(self, place: Place, replicas: int, split: int, rank: int) -> Batch:
        """A replica's part of the batches from `split` on."""
        if place.laid == replicas and split % replicas == 0:
            return self.page(place.epoch, place.laid)[split + rank]
        return self._found.setdefault((place.epoch, place.laid, replicas, split, rank), [])


@dataclass
class Pass:
    """An iteration over the rest of an epoch, on as many replicas as `taken` has numbers.

    Attributes:
        start: where it began.
        steps: what must come.
        left: samples that have not.
        given: batches that came, over all replicas.
        ended: whether StopIteration came.
    """

    start: Place
    replicas: int
    steps: list[Step]
    left: set[int]
    total: int
    given: int = 0
    ended: bool = False

    def __post_init__(self) -> None:
        self.given += self.start.within

    @property
    def expected(self) -> int:
        """Batches of the pass, over all replicas."""
        return len(self.steps) * self.replicas

    @property
    def over(self) -> bool:
        """Whether nothing is left."""
        return self.given >= self.expected

    def check(self, batch: Batch) -> None:
        """Hold the next batch to what must come."""
        assert not self.over, f"{batch} came after the last batch"
        expected = self.steps[self.given // self.replicas][self.given % self.replicas]
        assert not expected or batch == expected, f"got {batch}, expected {expected}"
        assert len(set(batch)) == len(batch) > 0
        assert self.left.issuperset(batch), f"{sorted(set(batch) - self.left)} came before, or are of another replica"
        self.left -= set(batch)
        self.given += 1
        expected[:] = batch

    def end(self) -> None:
        """Know that no more comes."""
        left = self.expected - self.given
        assert left == 0, f"the epoch ended {left} batches early: samples {sorted(self.left)} never came"
        assert not self.left
        self.ended = True

    @property
    def place(self) -> Place:
        """Where the epoch stands now."""
        steps, within = divmod(self.given, self.replicas)
        taken = min(self.start.taken + steps * self.replicas, self.total)
        return Place(self.start.epoch, self.start.laid, taken, within)


@dataclass(frozen=True)
class Save:
    """A state that was saved.

    Attributes:
        state: what the object gave.
        place: where its epoch stood.
        ended: whether the end of the pass had been seen.
        replicas: who saved.
        workers: of the loader that saved.
    """

    state: object
    place: Place
    ended: bool
    replicas: int
    workers: tuple[int, bool]


@dataclass
class Model:
    """Where a run stands.

    Attributes:
        coming: where the next pass begins.
        present: the last pass that began, unless a seek or another epoch was asked for since.
        last: the last pass that began.
        is_open: whether it can be gone on with.
        is_handed: whether the last pass began after all that was set or sought.
        repeats: whether a pass that is broken off comes again, as where a trainer counts whole passes.
    """

    book: Book
    replicas: int
    coming: Place
    repeats: bool = False
    present: Pass | None = field(default=None)
    last: Pass | None = field(default=None)
    is_open: bool = False
    is_handed: bool = False

    def begin(self) -> Pass:
        """A pass begins where one was to come; the next epoch comes after it."""
        start = self.coming
        steps, left = self.book.rest(start, self.replicas)
        self.present = self.last = Pass(start, self.replicas, steps, left, self.book.total(start.epoch))
        self.is_open = self.is_handed = True
        self.coming = Place(start.epoch + (not self.repeats), self.replicas)
        return self.last

    def end(self) -> None:
        """The pass has ended."""
        assert self.last is not None
        self.last.end()
        self.coming = Place(self.last.start.epoch + 1, self.replicas) if self.repeats else self.coming

    def set_epoch(self, epoch: int) -> None:
        """Another epoch comes next."""
        if self.coming.epoch != epoch:
            self.coming, self.is_handed = Place(epoch, self.replicas), False
        if self.present is not None and self.present.start.epoch != epoch:
            self.present = None

    def seek(self, place: Place, *, skip_end: bool = False) -> None:
        """The next pass begins at a place, or in the next epoch where the place is an epoch's end that is skipped."""
        at_end = place.taken >= self.book.total(place.epoch)
        self.coming = Place(place.epoch + 1, self.replicas) if at_end and skip_end else replace(place)
        self.present, self.is_open, self.is_handed = None, False, False
