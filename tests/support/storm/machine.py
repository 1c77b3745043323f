"""The state machine: rules act on a rig and on the model, and the two must agree."""

import re
from collections import Counter
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from storm.adapters import Adapter
from storm.model import Model, Place, Save
from storm.rigs import COPIES, Rig, SourceError

# Rules that ran, by adapter and rule.
RUN: Counter[tuple[str, str]] = Counter()
# What saves a position.
POSITIONS = {"present", "handed"}
NUMBER = st.integers(0, 10**6)


def counts(name: str) -> Any:
    """Only where the adapter has the rule."""
    return precondition(lambda self: name in self.adapter.rules)


class Storm(RuleBasedStateMachine):
    """Any order of rules on one kind of object under one kind of loader."""

    adapter: ClassVar[Adapter]
    saves = Bundle("saves")

    @initialize(replicas=NUMBER, workers=NUMBER)
    def begin(self, replicas: int, workers: int) -> None:
        adapter = self.adapter
        self.book = adapter.book()
        count = adapter.replicas[replicas % len(adapter.replicas)]
        self.rig: Rig = adapter.rig(count, adapter.workers[workers % len(adapter.workers)])
        self.model = self.new_model(count, Place(0, count))
        self.held = not self.rig.saves_early
        # Whether a state waits for the next pass.
        self.is_loaded = False

    def new_model(self, replicas: int, coming: Place) -> Model:
        return Model(self.book, replicas, coming, repeats=self.rig.repeats)

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.close()

    # --- passes

    def take(self, count: int) -> bool:
        """Take that number of steps; whether the pass has more."""
        if not self.model.is_open:
            self.rig.open()
            self.model.begin()
            self.held = self.is_loaded = False
        for _ in range(count):
            batches = self.rig.take()
            for batch in batches:
                self.model.last.check(batch)
            if not batches:
                self.model.end()
                self.model.is_open = False
                return False
        return True

    def close(self) -> None:
        if not self.is_loaded:
            self.rig.close()
        self.model.is_open = False

    @rule(count=st.integers(1, 4))
    def next_batch(self, count: int) -> None:
        self.ran("next batch")
        self.take(count)

    @rule()
    def exhaust(self) -> None:
        self.ran("exhaust")
        self.take(10**6)
        assert self.rig.take() == [], "a pass that has ended gives more"

    @rule()
    def all_but_the_end(self) -> None:
        """As trainers do that take `len` batches."""
        self.ran("exhaust")
        if self.take(1):
            left = self.model.last.expected - self.model.last.given
            self.take(left if self.rig.one_for_all else left // self.model.replicas)

    @precondition(lambda self: self.model.is_open)
    @rule()
    def break_off(self) -> None:
        self.ran("break off")
        self.close()

    @rule()
    def start_the_next_epoch(self) -> None:
        self.ran("start the next epoch")
        self.close()
        self.take(1)

    @rule()
    def peek_and_drop(self) -> None:
        self.ran("peek and drop")
        self.close()
        self.take(1)
        self.close()

    @precondition(lambda self: self.rig.sets_epochs and not (self.model.is_open or self.held or self.is_loaded))
    @rule(epoch=st.integers(0, 4))
    def set_epoch(self, epoch: int) -> None:
        self.ran("set_epoch")
        self.close()
        self.rig.set_epoch(epoch)
        self.model.set_epoch(epoch)

    # --- states

    @property
    def place(self) -> Place:
        """Where the epoch stands that a state now tells of."""
        model = self.model
        # A pass without batches leaves no state behind: the next one comes.
        handed = model.present if model.is_handed and model.last.given > model.last.start.within else None
        last = {"present": model.present, "handed": handed, "last": model.last}.get(
            self.rig.saves, self.model.last if self.rig.iterators is not None else None
        )
        return self.model.coming if last is None else last.place

    def may_save(self) -> bool:
        if "save" not in self.adapter.rules or (self.model.last is None and not self.rig.saves_early):
            return False
        place = self.place
        if not self.rig.saves_ends and place.taken >= self.book.total(place.epoch):
            return False
        return self.rig.saves not in POSITIONS or place.within == 0

    def save_now(self) -> Save:
        place, last = self.place, self.model.last
        present = self.model.present
        if self.rig.saves in POSITIONS:
            self.rig.steps = 0 if present is None else (present.given - present.start.within) // self.model.replicas
        if self.rig.holds and last is None:
            self.held = True
        ended = last is not None and last.ended and place == last.place
        return Save(self.rig.save(), place, ended, self.model.replicas, self.rig.workers)

    @precondition(may_save)
    @rule(target=saves)
    def save(self) -> Save:
        self.ran("save")
        return self.save_now()

    def restored(self, save: Save, *, broken: int | None = None, workers: int = 0) -> tuple[Rig, Model] | None:
        """Another rig that continues from a state, and what must come; None if it refuses the state by name."""
        choice = self.adapter.workers[workers % len(self.adapter.workers)]
        rig = self.rig.fresh(save.replicas, choice if self.rig.moves_workers else save.workers, broken=broken)
        try:
            rig.load(save.state)
        except ValueError as error:
            if self.adapter.refuses is None or not re.search(self.adapter.refuses, str(error)):
                raise
            return None
        model = self.new_model(save.replicas, Place(0, save.replicas))
        skip = rig.skips_end == "always" or (rig.skips_end == "seen" and save.ended)
        model.seek(save.place, skip_end=skip)
        rig.told_of_epoch(model.coming.epoch)
        return rig, model

    def go_on_with(self, restored: tuple[Rig, Model], *, loaded: bool = True) -> None:
        self.rig.close()
        self.rig, self.model = restored
        self.held = not self.rig.saves_early
        self.is_loaded = loaded and self.rig.saves not in POSITIONS

    @rule(save=saves, workers=NUMBER)
    def restore(self, save: Save, workers: int) -> None:
        self.ran("restore")
        restored = self.restored(save, workers=workers)
        if restored is not None:
            self.go_on_with(restored)

    @rule(save=saves, count=st.integers(0, 3))
    def restore_twice(self, save: Save, count: int) -> None:
        """The first one continues, and is saved and restored again; then the state is loaded once more."""
        self.ran("restore twice")
        first, again = self.restored(save), self.restored(save)
        if first is None or again is None:
            return
        self.go_on_with(first)
        if count:
            self.take(count)
        if self.may_save():
            second = self.restored(self.save_now())
            if second is not None:
                self.go_on_with(second)
                self.take(1)
        self.go_on_with(again)

    @rule(save=saves)
    def restore_and_run_two_epochs(self, save: Save) -> None:
        self.ran("restore")
        restored = self.restored(save)
        if restored is not None:
            self.go_on_with(restored)
            for _ in range(3):
                self.take(10**6)

    @counts("source raises")
    @rule(count=st.integers(0, 3), sample=NUMBER)
    def the_source_raises(self, count: int, sample: int) -> None:
        """From a state on a sample is broken; the last state before the error leads on once it is repaired."""
        self.ran("source raises")
        if not self.may_save():
            return
        save = self.save_now()
        try:
            broken = self.restored(save, broken=self.book.samples[sample % len(self.book.samples)])
            if broken is None:
                return
            self.go_on_with(broken)
            for _ in range(count):
                if not self.take(1):
                    break
                if self.may_save():
                    save = self.save_now()
        except SourceError:
            self.close()
        repaired = self.restored(save)
        if repaired is None:
            new = self.rig.fresh(), self.new_model(self.model.replicas, Place(0, self.model.replicas))
            self.go_on_with(new, loaded=False)
            return
        self.go_on_with(repaired)

    # --- positions and copies

    def may_move(self) -> bool:
        return "seek" in self.adapter.rules and not self.held and not self.is_loaded

    def position_at(self, number: int) -> tuple[Any, Place]:
        """A position in the present pass, not always the last, and what it stands for."""
        present, model = self.model.present, self.model
        if present is None:
            return self.rig.position(0), model.coming
        steps = number % ((present.given - present.start.within) // model.replicas + 1)
        taken = min(present.start.taken + steps * model.replicas, self.book.total(present.start.epoch))
        return self.rig.position(steps), Place(present.start.epoch, present.start.laid, taken)

    @precondition(lambda self: self.may_move() and (self.model.present is None or not self.model.present.start.within))
    @rule(number=NUMBER, replicas=NUMBER, workers=NUMBER)
    def change_replicas_and_workers(self, number: int, replicas: int, workers: int) -> None:
        self.ran("change replicas")
        self.ran("change workers")
        position, place = self.position_at(number)
        count = self.adapter.replicas[replicas % len(self.adapter.replicas)]
        rig = self.rig.fresh(count, self.adapter.workers[workers % len(self.adapter.workers)], position=position)
        model = self.new_model(count, Place(0, count))
        model.seek(place, skip_end=rig.repeats)
        rig.told_of_epoch(model.coming.epoch)
        self.go_on_with((rig, model), loaded=False)

    @precondition(lambda self: self.may_move() and (self.model.present is None or not self.model.present.start.within))
    @rule(number=NUMBER)
    def seek(self, number: int) -> None:
        self.ran("seek")
        position, place = self.position_at(number)
        self.close()
        self.rig.seek(position)
        self.model.seek(place, skip_end=self.rig.repeats)
        self.rig.told_of_epoch(self.model.coming.epoch)

    @precondition(lambda self: "copy" in self.adapter.rules and not self.held and not self.is_loaded)
    @rule(how=st.sampled_from(sorted(COPIES)))
    def copy(self, how: str) -> None:
        """The copy continues as the object would; what the object does then changes nothing for the copy."""
        self.ran(how)
        rig = self.rig.copied(how)
        self.take(2)
        self.close()
        if self.rig.sets_epochs:
            self.rig.set_epoch(9)
        before, self.rig = self.rig, rig
        coming, present = self._copied_from
        self.model.coming, self.model.present, self.model.last = coming, present, None
        self.model.is_open = self.model.is_handed = False
        before.close()

    def ran(self, name: str) -> None:
        RUN[self.adapter.name, name] += 1
        # What a copy is made of.
        self._copied_from = (self.model.coming, self.model.present)

    # --- what holds at any time

    @invariant()
    def lengths_are_exact(self) -> None:
        if not hasattr(self, "rig") or "remaining" not in self.adapter.rules:
            return
        coming, replicas = self.model.coming, self.model.replicas
        assert self.rig.lengths() == {self.book.steps(Place(coming.epoch, coming.laid), replicas)}
        if not self.held and not self.is_loaded:
            assert self.rig.remaining() == {self.book.steps(coming, replicas)}


def machine_for(adapter: Adapter) -> type[Storm]:
    """The machine of one adapter."""
    return type(f"Storm{re.sub('[^A-Za-z0-9]', '', adapter.name.title())}", (Storm,), {"adapter": adapter})
