"""`PadCollator` against `pad_sequence` alone, a collate function by hand, peers, and a memcpy.

transformers and lhotse are measured if they are installed. `pad_sequence` and lhotse make only the padded tensor,
transformers also the mask, and the function by hand everything that `PadCollator` makes.
"""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from harness import Row, compare, keep_pages, save
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from collate import PadCollator

try:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import DataCollatorWithPadding, PreTrainedTokenizerFast
except ImportError:
    DataCollatorWithPadding = None
try:
    from lhotse.dataset import collation as lhotse
except ImportError:
    lhotse = None

Array: TypeAlias = npt.NDArray[Any]
Calls: TypeAlias = dict[str, Callable[[], object]]


def by_hand(rows: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The usual collate function by hand: sort, pad, lengths, mask."""
    lengths = torch.tensor([len(row) for row in rows])
    order = lengths.argsort(descending=True, stable=True)
    padded = pad_sequence([rows[i] for i in order.tolist()], batch_first=True)
    lengths = lengths[order]
    return padded, lengths, torch.arange(padded.shape[1]) < lengths[:, None], order


def with_lhotse(samples: list[Array] | list[Tensor]) -> Calls:
    """Lhotse's function for rows with this number of axes, if lhotse is installed; it takes arrays and tensors."""
    if lhotse is None:
        return {}
    if samples[0].ndim == 1:
        return {"lhotse collate_vectors": lambda: lhotse.collate_vectors(samples, padding_value=0)}
    return {"lhotse collate_matrices": lambda: lhotse.collate_matrices(samples)}


def compare_lists(case: str, arrays: list[Array]) -> list[Row]:
    """Lists of ints in dicts, the fastest input of `DataCollatorWithPadding`: it converts tensors to lists first."""
    if DataCollatorWithPadding is None:
        return []
    # The smallest tokenizer that it accepts: a word and a padding token.
    words = Tokenizer(WordLevel({"[PAD]": 0, "word": 1}, unk_token="word"))
    pad = DataCollatorWithPadding(PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]"))
    samples = [{"input_ids": array.tolist()} for array in arrays]
    collate = PadCollator()
    # Our mask is bool, theirs is int64.
    calls: Calls = {"PadCollator": lambda: collate(samples), "DataCollatorWithPadding": lambda: pad(samples)}
    return [compare(f"{case} from dicts of lists", "PadCollator", calls)]


def measure(count: int, steps: int, features: tuple[int, ...], dtype: str, bar: str) -> list[Row]:
    """One shape, from arrays and tensors, and for tokens from lists."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.normal(steps, steps / 4, count), 1, None).astype(int)
    arrays = [rng.integers(1, 100, (length, *features)).astype(dtype) for length in lengths]
    tensors = [torch.from_numpy(array) for array in arrays]
    collate = PadCollator()
    block = collate(tensors).padded
    peers: Calls = {
        "pad_sequence alone": lambda: pad_sequence(tensors, batch_first=True),
        "by hand": lambda: by_hand(tensors),
        "one memcpy of the block": block.clone,
    }
    case = f"{count} x {steps}{''.join(f' x {size}' for size in features)} {dtype}"
    rows = []
    for kind, samples in (("arrays", arrays), ("tensors", tensors)):
        calls: Calls = {"PadCollator": lambda s=samples: collate(s), **peers, **with_lhotse(samples)}
        rows.append(compare(f"{case} from {kind}", "PadCollator", calls, bar=bar))
    return rows if features else rows + compare_lists(case, arrays)


def main() -> None:
    """Print and save all shapes."""
    torch.set_num_threads(1)
    keep_pages()
    for name, peer in (("transformers", DataCollatorWithPadding), ("lhotse", lhotse)):
        if peer is None:
            print(f"{name} is not installed, so it is left out: `pip install {name}`")
    shapes: list[tuple[int, int, tuple[int, ...], str, str]] = [
        (32, 30, (), "int64", ""),
        (256, 30, (), "int64", "4x of pad_sequence from arrays, 3x from tensors"),
        (512, 200, (), "int64", ""),
        (64, 400, (80,), "float32", "memcpy's time x 1.3 at most"),
        (256, 50, (128,), "float32", ""),
    ]
    save("collation", [asdict(row) for shape in shapes for row in measure(*shape)])


if __name__ == "__main__":
    main()
