"""Training steps of Hugging Face models, tiny and random, as they are written: right ones and known mistakes.

Each entry makes a module, a step and a batch. Nothing is downloaded.
"""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

# `make oldest` has no transformers: what imports this module is skipped there.
pytest.importorskip("transformers")
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForTokenClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from collate import PadCollator

VOCAB = 24
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT |= {"intermediate_size": 32, "max_position_embeddings": 40}
GPT2 = {"vocab_size": VOCAB, "n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32, **SPECIAL}


def written(values: tuple[str, ...]) -> dict[str, Any]:
    """A field of token ids, tags or the like, padded with 0; -100 for labels."""
    samples = []
    for index, length in enumerate((9, 7, 4, 3)):
        draw = torch.Generator().manual_seed(index)
        ids = torch.randint(3, VOCAB, (length,), generator=draw)
        labels = ids.clone()
        labels[: length // 3] = -100
        masked = torch.where(torch.arange(length) % 3 == 1, ids, -100)
        sample = {"ids": ids, "labels": labels, "masked": masked, "tags": ids % 4, "label": index % 3}
        sample |= {"target": torch.randint(3, VOCAB, (length // 2 + 1,), generator=draw), "start": index % 2}
        samples.append({name: sample[name] for name in values})
    fields: dict[str, Any] = {name: -100 for name in ("labels", "masked", "tags", "target") if name in values}
    return PadCollator({"ids": 0, **fields})(samples)


def spoken(lengths: tuple[int, ...] = (90, 67, 50, 45)) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)
    samples = [
        {"wave": torch.randn(length, generator=draw), "text": torch.randint(3, VOCAB, (length // 20,), generator=draw)}
        for length in lengths
    ]
    return PadCollator({"wave": 0, "text": -100})(samples)


def gpt2(**options: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(**GPT2, **options))


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **SPECIAL,
    )
    return LlamaForCausalLM(config)


def bert(kind: type[Any], **options: Any) -> BertForQuestionAnswering | BertForTokenClassification | BertModel:
    torch.manual_seed(0)
    return kind(BertConfig(**BERT, **options))


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


def bart() -> BartForConditionalGeneration:
    torch.manual_seed(0)
    sizes: dict[str, float] = {
        f"{side}_{part}": 2 for side in ("encoder", "decoder") for part in ("layers", "attention_heads")
    }
    sizes |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32}
    return BartForConditionalGeneration(
        BartConfig(vocab_size=VOCAB, d_model=16, decoder_start_token_id=2, **sizes, **SPECIAL)
    )


def wav2vec2(norm: str = "layer", **options: Any) -> Wav2Vec2ForCTC:
    torch.manual_seed(0)
    config = Wav2Vec2Config(
        **{**BERT, "max_position_embeddings": None},
        conv_dim=(8, 8, 8),
        conv_kernel=(5, 3, 2),
        conv_stride=(2, 2, 2),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        feat_extract_norm=norm,
        do_stable_layer_norm=norm == "layer",
        ctc_loss_reduction="sum",
        layerdrop=0.0,
        **{"apply_spec_augment": False, **options},
    )
    return Wav2Vec2ForCTC(config)


def attended(batch: dict[str, Any], name: str = "ids") -> dict[str, torch.Tensor]:
    return {"input_ids": batch[name].padded, "attention_mask": batch[name].mask.long()}


def own_labels(batch: dict[str, Any]) -> torch.Tensor:
    return batch["ids"].padded.masked_fill(~batch["ids"].mask, -100)


def without_end(batch: dict[str, Any]) -> torch.Tensor:
    return own_labels(batch).scatter(1, batch["ids"].lengths[:, None] - 1, -100)


def asked(model: Any, batch: Any) -> Any:
    """Question answering with the scores of padding left out of the softmax."""
    scores = model(**attended(batch)).start_logits.masked_fill(~batch["ids"].mask, -torch.inf)
    return F.cross_entropy(scores, batch["start"])


def pooled(model: BertModel, batch: dict[str, Any], masked: bool) -> torch.Tensor:
    hidden = model(**attended(batch)).last_hidden_state
    weights = batch["ids"].mask.float() if masked else torch.ones_like(batch["ids"].mask, dtype=torch.float32)
    means = (hidden * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
    return F.cross_entropy(means, batch["label"])


def classified_at(model: GPT2LMHeadModel, batch: dict[str, Any], indices: int | torch.Tensor) -> torch.Tensor:
    logits = model.lm_head(model.transformer(**attended(batch)).last_hidden_state)
    return F.cross_entropy(logits[torch.arange(len(batch["ids"])), indices], batch["label"])


def recognised(model: Wav2Vec2ForCTC, batch: dict[str, Any], mask: bool = True) -> torch.Tensor:
    attention_mask = batch["wave"].mask.long() if mask else None
    return model(batch["wave"].padded, attention_mask=attention_mask, labels=batch["text"].padded).loss


def _with(make: Any, step: Any, batch: Any) -> Any:
    def made() -> tuple[Any, ...]:
        model = make()
        return model, lambda batch: step(model, batch), batch()

    return made


def trained(make: Any, fields: Any, step: Any) -> Any:
    return _with(make, step, lambda: written(fields))


def heard(make: Any, step: Any) -> Any:
    return _with(make, step, spoken)


IDS, LM, TAGS, LABEL, PAIR = ("ids",), ("ids", "labels"), ("ids", "tags"), ("ids", "label"), ("ids", "target")

RIGHT = {
    "GPT-2, labels made of the inputs": trained(gpt2, IDS, lambda m, b: m(**attended(b), labels=own_labels(b)).loss),
    "GPT-2, a prompt without loss": trained(gpt2, LM, lambda m, b: m(**attended(b), labels=b["labels"].padded).loss),
    "Llama": trained(llama, LM, lambda m, b: m(**attended(b), labels=b["labels"].padded).loss),
    "Llama without a mask, padded on the right": trained(
        llama, IDS, lambda m, b: m(input_ids=b["ids"].padded, labels=own_labels(b)).loss
    ),
    "BERT token classification": trained(
        lambda: bert(BertForTokenClassification, num_labels=4),
        TAGS,
        lambda m, b: m(**attended(b), labels=b["tags"].padded).loss,
    ),
    "DistilBERT token classification": trained(
        lambda: DistilBertForTokenClassification(
            DistilBertConfig(vocab_size=VOCAB, dim=16, n_layers=2, n_heads=2, hidden_dim=24, num_labels=4)
        ),
        TAGS,
        lambda m, b: m(**attended(b), labels=b["tags"].padded).loss,
    ),
    "BERT sequence classification": trained(
        lambda: bert(BertForSequenceClassification, num_labels=3),
        LABEL,
        lambda m, b: m(**attended(b), labels=b["label"]).loss,
    ),
    "RoBERTa sequence classification": trained(
        lambda: RobertaForSequenceClassification(RobertaConfig(**BERT, num_labels=3, pad_token_id=0)),
        LABEL,
        lambda m, b: m(**attended(b), labels=b["label"]).loss,
    ),
    "BERT masked language model": trained(
        lambda: bert(BertForMaskedLM),
        ("ids", "masked"),
        lambda m, b: m(**attended(b), labels=b["masked"].padded).loss,
    ),
    "BERT sentence embeddings": trained(lambda: bert(BertModel), LABEL, lambda m, b: pooled(m, b, masked=True)),
    "BERT question answering, masked": trained(lambda: bert(BertForQuestionAnswering), ("ids", "start"), asked),
    "GPT-2 classifier of the last token": trained(
        lambda: GPT2ForSequenceClassification(GPT2Config(**GPT2, num_labels=3)),
        LABEL,
        lambda m, b: m(**attended(b), labels=b["label"]).loss,
    ),
    "GPT-2 read at each row's last token": trained(gpt2, LABEL, lambda m, b: classified_at(m, b, b["ids"].lengths - 1)),
    "T5": trained(t5, PAIR, lambda m, b: m(**attended(b), labels=b["target"].padded).loss),
    "BART": trained(bart, PAIR, lambda m, b: m(**attended(b), labels=b["target"].padded).loss),
    "wav2vec 2.0 with CTC": heard(wav2vec2, recognised),
    "wav2vec 2.0, masked spans of features": heard(
        lambda: wav2vec2(apply_spec_augment=True, mask_time_prob=0.3, mask_time_length=2), recognised
    ),
}


def speech_to_text() -> Speech2TextForConditionalGeneration:
    torch.manual_seed(0)
    sizes: dict[str, float] = {
        f"{side}_{part}": 2 for side in ("encoder", "decoder") for part in ("layers", "attention_heads")
    }
    sizes |= {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
    return Speech2TextForConditionalGeneration(
        Speech2TextConfig(vocab_size=VOCAB, d_model=16, input_feat_per_channel=4, conv_channels=16, **sizes, **SPECIAL)
    )


def translated(model: Speech2TextForConditionalGeneration, batch: dict[str, Any]) -> torch.Tensor:
    wave = batch["wave"]
    clean = (wave.padded * wave.mask)[..., None].expand(-1, -1, 4)
    return model(input_features=clean, attention_mask=wave.mask.long(), labels=batch["text"].padded).loss


MISTAKES = {
    "GPT-2, padding among the labels": (
        trained(gpt2, IDS, lambda m, b: m(**attended(b), labels=b["ids"].padded).loss),
        {"width", "other rows"},
    ),
    "Llama, the end of the text masked like padding": (
        # The token for padding is often that of the end, so that no model learns to stop.
        trained(llama, IDS, lambda m, b: m(**attended(b), labels=without_end(b)).loss),
        {"padding", "dead step"},
    ),
    "BERT without an attention mask": (
        trained(
            lambda: bert(BertForTokenClassification, num_labels=4),
            TAGS,
            lambda m, b: m(input_ids=b["ids"].padded, labels=b["tags"].padded).loss,
        ),
        {"padding", "width", "other rows"},
    ),
    "BERT, attention mask of the wrong polarity": (
        trained(
            lambda: bert(BertForTokenClassification, num_labels=4),
            TAGS,
            lambda m, b: (
                m(input_ids=b["ids"].padded, attention_mask=(~b["ids"].mask).long(), labels=b["tags"].padded).loss
            ),
        ),
        {"padding"},
    ),
    "BERT, tags padded with a class": (
        trained(
            lambda: bert(BertForTokenClassification, num_labels=4),
            TAGS,
            lambda m, b: m(**attended(b), labels=b["tags"].padded.clamp(min=0)).loss,
        ),
        {"width", "other rows"},
    ),
    "BERT sentence embeddings, mean over padding": (
        trained(lambda: bert(BertModel), LABEL, lambda m, b: pooled(m, b, masked=False)),
        {"width", "other rows"},
    ),
    "BERT question answering as it comes": (
        trained(
            lambda: bert(BertForQuestionAnswering),
            ("ids", "start"),
            lambda m, b: m(**attended(b), start_positions=b["start"], end_positions=b["start"]).loss,
        ),
        {"width", "other rows"},
    ),
    "GPT-2 read at the last column": (
        trained(gpt2, LABEL, lambda m, b: classified_at(m, b, -1)),
        {"width", "other rows"},
    ),
    "GPT-2 read one token early": (
        trained(gpt2, LABEL, lambda m, b: classified_at(m, b, b["ids"].lengths - 2)),
        {"dead step"},
    ),
    "T5 without an attention mask": (
        trained(t5, PAIR, lambda m, b: m(input_ids=b["ids"].padded, labels=b["target"].padded).loss),
        {"width", "other rows"},
    ),
    "T5, padding among the labels": (
        trained(t5, PAIR, lambda m, b: m(**attended(b), labels=b["target"].padded.clamp(min=0)).loss),
        {"width", "other rows"},
    ),
    "BART, encoder mask of the targets": (
        trained(
            bart,
            TAGS,
            lambda m, b: (
                m(input_ids=b["ids"].padded, attention_mask=(b["tags"].padded > 0).long(), labels=b["tags"].padded).loss
            ),
        ),
        {"dead step"},
    ),
    "wav2vec 2.0 without an attention mask": (
        heard(wav2vec2, lambda m, b: recognised(m, b, mask=False)),
        {"padding", "width", "other rows"},
    ),
    "wav2vec 2.0 with group norm over padding": (
        heard(lambda: wav2vec2("group"), recognised),
        {"padding", "other rows"},
    ),
    "Speech2Text, convolutions past the end": (heard(speech_to_text, translated), {"other rows"}),
}
