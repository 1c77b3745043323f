"""Leak 1, masks switched off: a 2-D mask or a cache makes a model of transformers forget the borders of documents.

python examples/leaks/masks_switched_off.py
"""

import torch
from compare import Step, documents, losses_of, show
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from collate import VarlenBatch

SIZES = {"vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.3}


def make_llama() -> LlamaForCausalLM:
    """A tiny random Llama."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=24)).double().eval()


def make_gpt2() -> GPT2LMHeadModel:
    """A tiny random GPT-2."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**SIZES, n_positions=32)).double().eval()


def steps_of(model: torch.nn.Module) -> dict[str, Step]:
    """Four ways to call a model on a row of documents."""

    def called(**arguments: object) -> Step:
        def step(batch: VarlenBatch) -> torch.Tensor:
            ours = batch.kwargs_for("transformers")
            made = {name: make(batch) if callable(make) else make for name, make in arguments.items()}
            return losses_of(model(batch.values, **{**ours, **made}).logits, batch)

        return step

    name = type(model).__name__.removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    return {
        f"{name}, and attention_mask": called(attention_mask=lambda batch: batch.mask.long()),
        f"{name}, and use_cache=True": called(use_cache=True),
        f"{name}, without position_ids": called(position_ids=None),
        f"{name}, lengthtrack": called(),
    }


def main() -> None:
    """Print what each way does to documents."""
    show(steps_of(make_llama()) | steps_of(make_gpt2()), documents())


if __name__ == "__main__":
    main()
