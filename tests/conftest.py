"""Hypothesis profiles: `dev` for the desk, `ci` for a derandomised, longer run, `quick` where a suite runs once more.

HYPOTHESIS_PROFILE names one. Also here: one thread, what to skip where there is no Unix, and quick garbage collections.
"""

import gc
import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# Its import changes the process: only tests/test_bare_systems.py starts processes with it.
collect_ignore = ["support/other_platform"]

SLOW = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("dev", max_examples=50, deadline=None, suppress_health_check=SLOW)
settings.register_profile("ci", max_examples=300, deadline=None, derandomize=True, suppress_health_check=SLOW)
settings.register_profile("quick", max_examples=5, derandomize=True, deadline=None, suppress_health_check=SLOW)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


if "OMP_NUM_THREADS" not in os.environ:
    # Tests run side by side, and their models are tiny: threads of torch that wait for each other would take the cores
    # from the other tests. Processes that tests start inherit it.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Torch refuses operations whose results may differ from run to run."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def pytest_collection_finish() -> None:
    """Have collections pass over the million objects of pytest, torch and all test modules: each took 0.6 s."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what only Unix has, where it is absent."""
    if not hasattr(os, "fork") and item.get_closest_marker("unix"):
        pytest.skip("needs Unix")
