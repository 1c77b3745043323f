"""Everything that has state, in any order of rules: a bounded part of `make storm`."""

import pytest
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from storm.adapters import ADAPTERS
from storm.machine import machine_for


@pytest.mark.parametrize("name", ADAPTERS)
def test_epochs_come_as_listed_whatever_is_saved_copied_or_broken_off(name):
    adapter = ADAPTERS[name]
    examples = 4 if adapter.is_slow else 25
    run_state_machine_as_test(
        machine_for(adapter), settings=settings(max_examples=examples, stateful_step_count=12, print_blob=False)
    )
