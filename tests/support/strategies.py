"""What the property tests draw: lengths with every awkward case, sequences of every dtype and feature shape."""

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]

FEATURES = st.lists(st.integers(1, 3), max_size=3).map(tuple)


def lengths(max_rows: int = 8, longest: int = 12) -> st.SearchStrategy[list[int]]:
    """Lists of lengths: any, all equal, all one, all zero, and one giant among dwarfs."""
    rows = st.integers(1, max_rows)
    return st.one_of(
        st.lists(st.integers(0, longest), min_size=1, max_size=max_rows),
        st.tuples(rows, st.integers(0, longest)).map(lambda case: [case[1]] * case[0]),
        rows.map(lambda count: [1] * count),
        st.tuples(rows, st.integers(0, max_rows)).map(lambda case: [*[1] * case[1], 5 * longest, *[0] * case[0]]),
    )


def fill(rng: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random values that every dtype holds, zeros among them: a real 0 is not padding."""
    values = torch.from_numpy(np.asarray(rng.integers(0, 3, shape), dtype=np.int64))
    return values.to(dtype)


@st.composite
def sequences(draw: st.DrawFn, dtypes: list[torch.dtype] | None = None, max_rows: int = 8) -> list[Tensor]:
    """A list of tensors `[L_i, *F]` of one dtype and feature shape."""
    dtype = draw(st.sampled_from(dtypes or DTYPES))
    features = draw(FEATURES)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return [fill(rng, (length, *features), dtype) for length in draw(lengths(max_rows))]


ORDERS = st.sampled_from(["longest", "given", "shuffled"])


def order_of(kind: str, count: int, seed: int = 0) -> object:
    """An `order` argument: a name, or a random permutation."""
    return np.random.default_rng(seed).permutation(count) if kind == "shuffled" else kind
