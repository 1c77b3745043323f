"""Tokenizers for `convert`: a function of the user's, or a `tokenizer.json` of Hugging Face."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from samplers.shards.format.npy import AnyArray
from samplers.shards.indexing.measuring import identify
from samplers.sources.extras import load_extra


@dataclass(frozen=True)
class Tokenizer:
    """Turns text into tokens.

    Attributes:
        function: From a text to token ids: a list, an array, or what tokenizers of Hugging Face return.
        id: A name that changes when the function changes. None if no name can be made.
    """

    function: Callable[[str], Any]
    id: str | None

    def __call__(self, text: str, context: str) -> AnyArray:
        """The tokens of a text: integers `[L]`.

        Raises:
            ValueError: The function does not give a list of integers.
        """
        try:
            value = self.function(text)
        except Exception as error:
            error.add_note(f"--tokenizer was called for {context}")
            raise
        if isinstance(value, Mapping) or hasattr(value, "input_ids"):
            value = value["input_ids"]
        value = getattr(value, "ids", value)
        tokens = np.asarray(value)
        # `np.asarray([])` is float64.
        if tokens.shape == (0,):
            return np.zeros(0, np.int32)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"{context}: the tokenizer must give a list of integers, got {tokens.dtype} {list(tokens.shape)}"
            )
        # No vocabulary has more tokens than int32 can number.
        return tokens.astype(np.int32) if tokens.max() < 1 << 31 and tokens.min() >= 0 else tokens


def read_tokenizer_file(path: str) -> Tokenizer:
    """A tokenizer in a `tokenizer.json`, which cuts and pads nothing.

    Raises:
        FileNotFoundError: There is no such file.
        ModuleNotFoundError: `tokenizers` is not installed.
        ValueError: The file has none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no tokenizer {path}: give a tokenizer.json, or MODULE:FUNCTION")
    content = Path(path).read_bytes()
    tokenizers = load_extra("tokenizers", "convert")
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:
        # The library raises bare exceptions.
        raise ValueError(f"{path}: no tokenizer of Hugging Face: {error}") from error
    # The file may ask for a length of its training.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return Tokenizer(tokenizer.encode, f"{Path(path).name}:{blake2b(content, digest_size=8).hexdigest()}")


def load_tokenizer(text: str | None, load_function: Callable[[str], Callable[..., Any]]) -> Tokenizer | None:
    """The tokenizer that an option names. None without one.

    Args:
        text: `MODULE:FUNCTION`, the path of a `tokenizer.json`, or of the folder that has it.
        load_function: Imports `MODULE:FUNCTION`.

    Raises:
        FileNotFoundError: There is no such file.
        ModuleNotFoundError: `tokenizers` is not installed.
        ValueError: The file has none.
    """
    if text is None:
        return None
    if Path(text).is_dir():
        return read_tokenizer_file(str(Path(text, "tokenizer.json")))
    if text.endswith(".json") or ":" not in text:
        return read_tokenizer_file(text)
    function = load_function(text)
    return Tokenizer(function, identify(function))
