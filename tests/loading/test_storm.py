"""Everything that has state, in any order of rules: a bounded part of `make storm`."""

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from storm.adapters import ADAPTERS
from storm.machine import machine_for

# Processes take their time: what starts some is left to `make storm`, but for one of each kind of loader.
WITH_WORKERS = {"sampler, DataLoader, workers", "stream, DataLoader, workers", "stream, StatefulDataLoader, workers"}
NAMES = [name for name, adapter in ADAPTERS.items() if not adapter.is_slow or name in WITH_WORKERS]


@pytest.mark.parametrize("name", NAMES)
def test_epochs_come_as_listed_whatever_is_saved_copied_or_broken_off(name):
    adapter = ADAPTERS[name]
    chosen = settings(
        max_examples=2 if adapter.is_slow else 6,
        stateful_step_count=10,
        phases=[Phase.generate, Phase.shrink],
        database=None,
        print_blob=False,
    )
    run_state_machine_as_test(machine_for(adapter), settings=chosen)
