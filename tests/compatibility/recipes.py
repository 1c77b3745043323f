"""Which samplers and streams fixtures are made of, in plain values."""

from typing import Any

FEW, PAIRS, MANY = {"count": 60}, {"count": 60, "fields": 2}, {"count": 3000}
BUDGET = {"max_tokens": 256}
# Lengths and options of samplers; whatever decides a plan is in one of them.
PLANS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "small": (FEW, BUDGET),
    "small, in order": (FEW, BUDGET | {"shuffle": False}),
    "small, seed and window": (FEW, BUDGET | {"seed": 2**64 - 1, "window": 20}),
    "small, rows": (FEW, {"batch_size": 7, "drop_last": True}),
    "small, real tokens": (FEW, BUDGET | {"count_tokens": "real", "batch_size": 6}),
    "small, widths as multiple": (FEW, BUDGET | {"widths": 16, "min_length": 5}),
    "small, widths as list": (FEW, BUDGET | {"widths": [16, 48, 97], "indices": list(range(3, 50))}),
    "small, over-long dropped": (FEW, {"max_tokens": 80, "overlong": "drop"}),
    "small, over-long alone": (FEW, {"max_tokens": 80, "overlong": "alone"}),
    "small, cut": (FEW, BUDGET | {"max_length": 60}),
    "two fields": (PAIRS, {"max_tokens": 512}),
    "two fields, widths": (PAIRS, {"max_tokens": 512, "widths": 32, "drop_last": True}),
    "many": (MANY, BUDGET),
    "many, widths": (MANY, BUDGET | {"widths": 8, "seed": 3}),
    "many, drop last": (MANY, {"batch_size": 32, "drop_last": True}),
}


# Samplers of full rows, and of several corpora: since 0.2.
PACKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "packed": (FEW, {"capacity": 128}),
    "packed, two rows": (FEW, {"capacity": 60, "rows": 2, "multiple": 4, "overlong": "split", "seed": 3}),
}
MIXED = {"sources": {"web": 60, "books": 20}, "weights": {"web": 3, "books": 2}, "passes": {"books": 3}}


def pack_recipe(name: str) -> dict[str, Any]:
    """A packing sampler of `PACKS`."""
    lengths, options = PACKS[name]
    return {"kind": "packing", "lengths": lengths, "options": options}


def mixture_recipe() -> dict[str, Any]:
    """A sampler of several corpora."""
    return {"kind": "mixture", "options": BUDGET} | MIXED


def sampler_recipe(name: str) -> dict[str, Any]:
    """A sampler of `PLANS`."""
    lengths, options = PLANS[name]
    return {"kind": "sampler", "lengths": lengths, "options": options}


def stream_recipe(corpus: str) -> dict[str, Any]:
    """A stream of one of the written corpora."""
    return {"kind": "stream", "corpus": corpus, "options": {"max_tokens": 10, "window": 5}}


def packed_stream_recipe(corpus: str) -> dict[str, Any]:
    """A stream of full rows of one of the written corpora."""
    return {"kind": "packed stream", "corpus": corpus, "options": {"capacity": [20, 20], "window": 5}}


def take(iterator: Any, count: int) -> None:
    """Take that number of batches."""
    for _ in range(count):
        next(iterator)
