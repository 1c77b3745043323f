"""Masked arrays, of which NumPy's functions read the values beneath the mask: refused wherever numbers are read."""

from typing import Final

import numpy as np

# Samples that a message names.
_NAMED: Final = 5


def refuse_masked(values: object, name: str, hint: str) -> None:
    """Refuse an array that masks values; all else passes, and so does a masked array that masks nothing.

    Args:
        values: anything.
        name: what the values are, for the message.
        hint: the way out.

    Raises:
        TypeError: Values are masked; the message names the first by their index along the first axis.
    """
    if not isinstance(values, np.ma.MaskedArray) or not np.ma.is_masked(values):
        return
    masks = np.atleast_1d(np.ma.getmaskarray(values))
    places = np.flatnonzero(masks.reshape(len(masks), -1).any(1))
    first = ", ".join(map(str, places[:_NAMED].tolist())) + ", ..." * (len(places) > _NAMED)
    raise TypeError(
        f"{name} must be known, got a masked array that masks {len(places)} of {len(masks)} (at {first}), which would "
        f"be read as if nothing were masked: {hint}"
    )
