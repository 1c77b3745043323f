"""A part of the fuzz run; `make fuzz` makes all of it."""

import pytest
from fuzz import fuzz, report

TRIALS = 2_000


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_mutated_files_give_the_right_data_or_an_error_with_the_file() -> None:
    counts = fuzz(TRIALS, first=0)
    assert sum(counts.values()) == TRIALS
    # Both happen: mutations that matter, and ones that do not.
    assert min(sum(count for (_, served), count in counts.items() if served is kind) for kind in (True, False)) > 100, (
        report(counts)
    )
