"""Masked arrays are refused wherever numbers are read: NumPy's functions would read the values under the mask."""

from typing import Final

import numpy as np

# Samples that a message lists.
_LISTED: Final = 5


def refuse_masked(values: object, name: str, hint: str) -> None:
    """Refuse an array that masks values; anything else passes, and so does a masked array that masks nothing.

    Args:
        values: Anything.
        name: Name of the values, for the message.
        hint: What to do instead, for the message.

    Raises:
        TypeError: Values are masked; the message names the first by their index along the first axis.
    """
    if not isinstance(values, np.ma.MaskedArray) or not np.ma.is_masked(values):
        return
    masks = np.atleast_1d(np.ma.getmaskarray(values))
    masked = np.flatnonzero(masks.reshape(len(masks), -1).any(1))
    first = ", ".join(map(str, masked[:_LISTED].tolist())) + ", ..." * (len(masked) > _LISTED)
    raise TypeError(
        f"{name} must be known, got a masked array that masks {len(masked)} of {len(masks)} (at {first}), which would "
        f"be read as if nothing were masked: {hint}"
    )
