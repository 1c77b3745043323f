"""Lengths with a fingerprint, for tables of windows."""

from typing import Any

import numpy.typing as npt


class Index:
    """Lengths with a fingerprint, as an index has them."""

    fingerprint = "1"

    def __init__(self, lengths: npt.NDArray[Any]) -> None:
        self.lengths = lengths
