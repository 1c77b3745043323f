"""Inference over a corpus: `run_in_order` next to batches in the order of arrival, and next to a bare loop.

`python benchmarks/inference.py` measures corpora that are drawn here, and saves the results. `--lengths FOLDER`
measures files of lengths instead, and prints only. `--texts N` measures next to sentence-transformers' `encode`, where
that is installed, on N drawn texts, and prints only.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import Bar, keep_pages, save, show, show_bars, spread_of
from torch import Tensor, nn
from torch.utils.data import DataLoader

from collate import LengthTrackedBatch, PadCollator, masked_mean
from samplers import plan_epoch, run_in_order

SAMPLES, ROWS, FEATURES, ROUNDS = 1_500, 32, 64, 5
# A corpus with this much padding in the order of arrival has a target.
MUCH_PADDING = 0.4
STEP_SECONDS, STEPS, BARE_ROUNDS = 0.02, 150, 9


class Encoder(nn.Module):
    """Two convolutions over time and the mean of the real steps: tokens `[B, T]` -> `[B, FEATURES]`.

    Its time grows with the padded tokens, not with the square of the width: the gain is no effect of attention.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(100, FEATURES)
        self.layers = nn.ModuleList(nn.Conv1d(FEATURES, FEATURES, 5, padding=2) for _ in range(2))

    def forward(self, batch: LengthTrackedBatch) -> Tensor:
        """Vectors of all rows, in their order."""
        values = self.embedding(batch.padded)
        for layer in self.layers:
            # Padding must not reach real steps through the window.
            values = (values * batch.mask[:, :, None]).mT
            values = torch.relu(layer(values)).mT
        return masked_mean(batch.with_padded(values))


def draw_corpora() -> dict[str, np.ndarray]:
    """Lengths like those of speech, sentences and long-tailed documents, in random order."""
    rng = np.random.default_rng(0)
    return {
        "speech-like": np.clip(rng.lognormal(np.log(450), 0.6, SAMPLES), 50, 3_000).astype(np.int64),
        "sentence-like": np.clip(rng.lognormal(np.log(18), 0.7, SAMPLES), 1, 200).astype(np.int64),
        "long-tailed": np.clip(rng.pareto(1.2, SAMPLES) * 60 + 20, 20, 4_000).astype(np.int64),
    }


def read_corpora(folder: Path) -> dict[str, np.ndarray]:
    """The first samples of each file, so that the order of arrival is that of the file."""
    return {path.stem: np.load(path)[:SAMPLES] for path in sorted(folder.glob("*.npy"))}


def arrival_padding(lengths: np.ndarray) -> float:
    """The share of padding in batches of `ROWS` in the order of arrival."""
    batches = [lengths[first : first + ROWS] for first in range(0, len(lengths), ROWS)]
    return 1 - lengths.sum() / sum(len(batch) * batch.max() for batch in batches)


def compare_with_arrival(name: str, lengths: np.ndarray) -> dict[str, Any]:
    """Encode a corpus in both orders, in turn; both give the same outputs, in the order of the dataset."""
    rows = [torch.from_numpy(np.random.default_rng(i).integers(0, 100, n)) for i, n in enumerate(lengths.tolist())]
    encoder, collate = Encoder().eval(), PadCollator()
    # As much memory as the largest batch of the other order takes.
    budget = ROWS * int(max(lengths))

    def in_arrival_order() -> list[Tensor]:
        outputs = []
        with torch.no_grad():
            for batch in DataLoader(rows, batch_size=ROWS, collate_fn=collate):  # type: ignore[arg-type]
                outputs += batch.unsort(encoder(batch)).unbind()
        return outputs

    def ours() -> list[Tensor]:
        return run_in_order(encoder, rows, collate_fn=collate, lengths=lengths, max_tokens=budget, progress=False)

    torch.testing.assert_close(torch.stack(ours()), torch.stack(in_arrival_order()), rtol=1e-4, atol=1e-5)
    times = take_turns({"ours": ours, "arrival": in_arrival_order}, ROUNDS)
    low, middle, high = spread_of(times["arrival"], times["ours"])
    return {
        "corpus": name,
        "samples": len(lengths),
        "arrival padding": arrival_padding(lengths),
        "padding": plan_epoch(lengths, max_tokens=budget, shuffle=False, overlong="alone").report().padding,
        "times as fast": [low, middle, high],
    }


def take_turns(
    contenders: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.process_time
) -> dict[str, list[float]]:
    """Seconds of each contender in each round; every second round has the reverse order.

    Other programs on the machine do not count in processor time.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name in list(contenders)[:: -1 if turn % 2 else 1]:
            start = clock()
            contenders[name]()
            times[name].append(clock() - start)
    return times


def measure_overhead() -> dict[str, list[float]]:
    """Time beyond a bare loop over the same batches, whose steps take 20 ms: lowest, median and highest round."""
    lengths = np.random.default_rng(0).integers(100, 400, STEPS * ROWS)
    rows = [torch.full((length,), 1.0) for length in lengths.tolist()]
    collate = PadCollator()
    plan = plan_epoch(lengths, batch_size=ROWS, shuffle=False)

    def step(batch: LengthTrackedBatch) -> Tensor:
        outputs = batch.padded.sum(1, keepdim=True).expand(-1, FEATURES).contiguous()
        # As a device works while the host waits: other programs on this machine make it no longer.
        time.sleep(STEP_SECONDS)
        return outputs

    def bare_loop() -> list[Any]:
        outputs: list[Any] = [None] * len(rows)
        loader = DataLoader(rows, batch_sampler=plan.batches, collate_fn=collate)  # type: ignore[arg-type]
        with torch.no_grad():
            for samples, batch in zip(plan.batches, loader, strict=True):
                for sample, output in zip(samples, batch.unsort(step(batch)), strict=True):
                    outputs[sample] = output
        return outputs

    options: dict[str, Any] = {"collate_fn": collate, "lengths": lengths, "batch_size": ROWS, "progress": False}

    def in_memory() -> Any:
        return run_in_order(step, rows, **options)

    def in_file() -> Any:
        with tempfile.TemporaryDirectory() as folder:
            return np.array(run_in_order(step, rows, out=Path(folder, "outputs.npy"), **options))

    times = take_turns({"bare": bare_loop, "memory": in_memory, "file": in_file}, BARE_ROUNDS, time.perf_counter)
    return {name: [ratio - 1 for ratio in spread_of(times[name], times["bare"])] for name in ("memory", "file")}


def compare_with_sentence_transformers(count: int) -> None:
    """Encode drawn texts with a small random model, by `encode` and by `run_in_order`; print the times."""
    package, transformers = import_module("sentence_transformers"), import_module("transformers")
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(18), 0.7, count), 1, 200).astype(int).tolist()
    texts = [" ".join(f"w{word}" for word in rng.integers(0, 1000, length)) for length in lengths]
    with tempfile.TemporaryDirectory() as folder:
        vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{word}" for word in range(1000))]
        tokenizer = transformers.BertTokenizer(vocab={word: number for number, word in enumerate(vocabulary)})
        config = transformers.BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=512,
        )
        transformers.BertModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        models = package.sentence_transformer.modules if hasattr(package, "sentence_transformer") else package.models
        words = models.Transformer(folder)
        model = package.SentenceTransformer(modules=[words, models.Pooling(config.hidden_size)])
        model.eval()
    bert = next(module for module in model.modules() if isinstance(module, transformers.BertModel))
    tokens = [torch.tensor(ids) for ids in tokenizer(texts)["input_ids"]]

    def step(batch: LengthTrackedBatch) -> Tensor:
        hidden = bert(input_ids=batch.padded, attention_mask=batch.mask.long()).last_hidden_state
        return masked_mean(batch.with_padded(hidden))

    def ours() -> Any:
        ids = [torch.tensor(each) for each in tokenizer(texts)["input_ids"]]
        return run_in_order(step, ids, collate_fn=PadCollator(), max_tokens=1024, container="numpy", progress=False)

    def theirs() -> Any:
        return model.encode(texts, batch_size=ROWS, show_progress_bar=False)

    np.testing.assert_allclose(ours(), theirs(), rtol=1e-3, atol=1e-4)
    times = take_turns({"ours": ours, "encode": theirs}, ROUNDS)
    low, middle, high = spread_of(times["encode"], times["ours"])
    print(f"{count} texts, {sum(map(len, tokens))} tokens: encode {statistics.median(times['encode']):.2f} s, ", end="")
    print(f"ours {statistics.median(times['ours']):.2f} s, {middle:.2f} times as fast [{low:.2f}-{high:.2f}]")


def bars_of(corpora: list[dict[str, Any]], overhead: Mapping[str, list[float]]) -> list[Bar]:
    """The targets."""
    bars: list[Bar] = []
    for corpus in corpora:
        target = 1.3 if corpus["arrival padding"] > MUCH_PADDING else 1.15
        measured = corpus["times as fast"][1]
        name = f"{corpus['corpus']}, arrival padding {corpus['arrival padding']:.0%}"
        bars.append((name, f">= {target}x", f"{measured:.2f}x", measured >= target))
    for name, (_, middle, _) in overhead.items():
        bars.append((f"beyond a bare loop, steps of 20 ms, in {name}", "<= 3 %", f"{middle:.1%}", middle <= 0.03))
    return bars


def main() -> None:
    """Measure what the options choose."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=Path, metavar="FOLDER", help="folder of .npy files, lengths [N] each")
    parser.add_argument("--texts", type=int, metavar="N", help="measure next to sentence-transformers on N texts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_pages()
    if options.texts:
        compare_with_sentence_transformers(options.texts)
        return
    corpora = draw_corpora() if options.lengths is None else read_corpora(options.lengths)
    results = [compare_with_arrival(name, lengths) for name, lengths in corpora.items()]
    overhead = measure_overhead()
    show(
        "encoding a corpus, next to batches in the order of arrival",
        [
            {
                "corpus": each["corpus"],
                "arrival padding": f"{each['arrival padding']:.1%}",
                "padding": f"{each['padding']:.1%}",
                "times as fast": "{1:.2f} [{0:.2f}-{2:.2f}]".format(*each["times as fast"]),
            }
            for each in results
        ],
    )
    bars = bars_of(results, overhead)
    show_bars(bars)
    if options.lengths is None:
        save("inference", {"corpora": results, "overhead": overhead, "bars": bars})


if __name__ == "__main__":
    main()
