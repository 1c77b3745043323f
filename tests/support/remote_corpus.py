"""A corpus behind a faulty server: what the tests of remote shards share, with fixtures to import.

A module that imports `running` and `server` has a fixture `folder`, whose files the server sends.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from corpora import LAYOUTS, assert_same, write
from faulty import Faulty, faulty

from samplers import Transport

# Where requests are counted: a slow machine must not send one more.
PATIENT: Final = Transport(timeout=100, retries=12, backoff=0.01, patience=0)
# Where they must come together: the server answers with an error after 20 seconds, which is not tried again.
ONCE: Final = Transport(timeout=100, retries=0, patience=0)


def numbered(count: int, shortest: int = 1) -> list[dict[str, Any]]:
    """Samples k0, k1, ...: `shortest` to `shortest + 39` tokens, and their number as label."""
    rng = np.random.default_rng(0)
    return [
        {"__key__": f"k{number}", "tokens": rng.integers(0, 1000, shortest + number % 40), "label": number}
        for number in range(count)
    ]


def write_layouts(folder: Path, samples: Sequence[dict[str, Any]], **options: Any) -> Path:
    """Write samples in each layout: `blocks-000000.tar` and so on, and `plain-000000.tar`."""
    for layout in LAYOUTS:
        write(folder, list(samples), layout=layout, prefix=layout, **options)
    return folder


def assert_each_once(read: Sequence[Any], written: Sequence[dict[str, Any]]) -> None:
    """Each sample came once, in any order, with its values."""
    by_key = {sample["__key__"]: sample for sample in read}
    assert len(read) == len(by_key) == len(written)
    for sample in written:
        assert_same(by_key[sample["__key__"]], sample)


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Faulty]:
    with faulty(folder) as server:
        yield server


@pytest.fixture
def server(running: Faulty) -> Iterator[Faulty]:
    """The server, without faults until a test wants them, and with an empty log."""
    running.behave()
    running.log()
    yield running
    running.behave()
