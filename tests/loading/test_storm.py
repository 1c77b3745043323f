"""Everything that has state, in any order of rules: a bounded part of `make storm`."""

from itertools import product

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from storm.adapters import ADAPTERS
from storm.machine import machine_for
from storm.model import Place

# Processes take their time: what starts some is left to `make storm`, but for one of each kind of loader.
WITH_WORKERS = {"sampler, DataLoader, workers", "stream, DataLoader, workers", "stream, StatefulDataLoader, workers"}
NAMES = [name for name, adapter in ADAPTERS.items() if not adapter.is_slow or name in WITH_WORKERS]


@pytest.mark.parametrize("name", NAMES)
def test_epochs_come_as_listed_whatever_is_saved_copied_or_broken_off(name: str) -> None:
    adapter = ADAPTERS[name]
    chosen = settings(
        max_examples=2 if adapter.is_slow else 6,
        stateful_step_count=10,
        phases=[Phase.generate, Phase.shrink],
        database=None,
        print_blob=False,
    )
    run_state_machine_as_test(machine_for(adapter), settings=chosen)


@pytest.mark.parametrize("kind", ["sampler", "packs", "stream"])
def test_accelerate_with_stateful_workers_takes_a_position_before_prepare(kind: str) -> None:
    """An example that failed where the position was sought after: `prepare` asks for a state, and so begins a pass."""
    state = machine_for(ADAPTERS[f"{kind}, accelerate stateful, workers"])()
    state.begin(replicas=0, workers=0)
    state.exhaust()
    state.start_the_next_epoch()
    state.change_replicas_and_workers(number=0, replicas=0, workers=0)
    state.exhaust()
    state.teardown()


@pytest.mark.parametrize(("laid", "replicas"), [*product((1, 2, 3), repeat=2)])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_step_goes_on_where_it_was_left_after_other_replicas(laid: int, replicas: int, steps: int) -> None:
    """An example that the model could not follow: a state within a step of an epoch that other replicas began."""
    state = machine_for(ADAPTERS["sampler of all"])()
    state.begin(replicas=laid - 1, workers=0)
    state.take(steps * laid)
    state.change_replicas_and_workers(number=steps, replicas=replicas - 1, workers=0)
    for given in range(10**6):
        state.restore(save=state.save(), workers=0)
        assert state.place.within == given % replicas
        if not state.take(1):
            break
    assert given == state.book.steps(Place(0, laid, steps * laid), replicas) * replicas
    state.teardown()
