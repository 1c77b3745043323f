"""datasets in its two ways: lists with transformers' collators, and tensors with `pad_sequence`; grouped by length."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

import datasets
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, DataCollatorWithPadding, PreTrainedTokenizerFast
from transformers.trainer_pt_utils import LengthGroupedSampler

from loaders.contract import Blocks, Loader, blocks_of_pair, pad
from loaders.works import ROWS, Work

# The collators know the tokens by this name.
NAMES: Final = {"tokens": "input_ids", "labels": "labels", "frames": "frames"}


def write(work: Work, folder: Path) -> None:
    """An Arrow dataset on disk."""
    features = {
        NAMES[name]: datasets.Array2D((None, values.shape[1]), str(values.dtype))
        if values.ndim > 1
        else datasets.List(datasets.Value(str(values.dtype)))
        for name, values in work.fields.items()
    }

    def rows() -> Iterator[dict[str, Any]]:
        for sample in work.samples():
            yield {NAMES[name]: values for name, values in sample.items()}

    made = datasets.Dataset.from_generator(rows, features=datasets.Features(features), cache_dir=str(folder / "cache"))
    made.save_to_disk(str(folder / "saved"))
    for file in sorted((folder / "cache").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (folder / "cache").rmdir()


def grouped(work: Work, source: Any, collate: Any, workers: int) -> Iterable[Any]:
    """Batches of transformers' sampler by length."""
    sampler = LengthGroupedSampler(ROWS, lengths=work.lengths.tolist())
    return DataLoader(source, batch_size=ROWS, sampler=sampler, collate_fn=collate, num_workers=workers)


def with_collator(work: Work, folder: Path, workers: int) -> Iterable[Any]:
    """Lists, and the collator of transformers for tokens and labels."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"[PAD]": 0}, "[PAD]")), pad_token="[PAD]", padding_side="right"
    )
    collate = DataCollatorForSeq2Seq if "labels" in work.fields else DataCollatorWithPadding
    return grouped(work, datasets.load_from_disk(str(folder / "saved")), collate(tokenizer), workers)


def collate_tensors(samples: list[dict[str, Any]]) -> Any:
    """`pad_sequence` under the names of the work."""
    return pad([{name: sample[theirs] for name, theirs in NAMES.items() if theirs in sample} for sample in samples])


def with_tensors(work: Work, folder: Path, workers: int) -> Iterable[Any]:
    """Tensors from the Arrow table, and `pad_sequence`."""
    source = datasets.load_from_disk(str(folder / "saved")).with_format("torch")
    return grouped(work, source, collate_tensors, workers)


def blocks(batch: Any) -> Blocks:
    """The padded tensors of the collator of transformers."""
    return {name: torch.as_tensor(batch[theirs]) for name, theirs in NAMES.items() if theirs in batch}


LOADERS: Final = {
    "datasets, DataCollator": Loader(write, with_collator, blocks, "nothing", "arrow", works=("tokens", "sft")),
    "datasets, torch + pad_sequence": Loader(write, with_tensors, blocks_of_pair, "nothing", "arrow"),
}
LIBRARIES: Final = ("datasets", "transformers")
