"""check_step with samples and a collate function of the user's own: mistakes inside of it are found and named."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence, pad_sequence

from collate import LengthError, LengthTrackedBatch, PadCollator, apply_rnn, check_step, sequence_loss

CLASSES = 4


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gru, self.head, self.wide = nn.GRU(6, 8, batch_first=True), nn.Linear(8, CLASSES), nn.Linear(6, CLASSES)

    def tags(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        x = batch["x"]
        packed = pack_padded_sequence(x, batch["lengths"], batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.gru(packed)[0], batch_first=True, total_length=x.shape[1])
        return F.cross_entropy(self.head(hidden).transpose(1, 2), batch["y"], ignore_index=-100)

    def label(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        packed = pack_padded_sequence(batch["x"], batch["lengths"], batch_first=True, enforce_sorted=False)
        return F.cross_entropy(self.gru(packed)[1][-1], batch["label"])

    def mean(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = self.wide(batch["x"])
        means = (hidden * batch["mask"][..., None]).sum(1) / batch["mask"].sum(1, keepdim=True)
        return F.cross_entropy(means, batch["label"])


def samples_of(lengths: tuple[int, ...] = (3, 7, 2, 5)) -> list[dict[str, int | torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [
        {
            "x": torch.randn(n, 6, generator=draw),
            "y": torch.randint(CLASSES, (n,), generator=draw),
            "label": (index + 1) % CLASSES,
        }
        for index, n in enumerate(lengths)
    ]


def padded(
    samples: list[dict[str, int | torch.Tensor]],
    *,
    x: Any = None,
    y: Any = None,
    label: Any = None,
    lengths: Any = None,
    value: int = -100,
) -> dict[str, torch.Tensor]:
    """What a collate function gives, each part made of its own list of samples."""
    rows = [sample["x"] for sample in x or samples]
    counts = torch.tensor([len(sample["x"]) for sample in lengths or samples])
    block = pad_sequence(rows, batch_first=True)
    return {
        "x": block,
        "y": pad_sequence([sample["y"] for sample in y or samples], batch_first=True, padding_value=value),
        "label": torch.tensor([sample["label"] for sample in label or samples]),
        "lengths": counts,
        "mask": torch.arange(block.shape[1]) < counts[:, None],
    }


def longest_first(samples: list[dict[str, int | torch.Tensor]]) -> list[dict[str, int | torch.Tensor]]:
    return sorted(samples, key=lambda sample: -len(sample["x"]))


def as_tuples(samples: list[dict[str, int | torch.Tensor]]) -> list[tuple[npt.NDArray[Any], list[int]]]:
    return [(sample["x"].numpy(), sample["y"].tolist()) for sample in samples]


def of_tuples(samples: list[tuple[npt.NDArray[Any], list[int]]]) -> dict[str, torch.Tensor]:
    return padded([{"x": torch.as_tensor(x), "y": torch.tensor(y), "label": 0} for x, y in samples])


def framed(samples: list[dict[str, int | torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A first and a last step of its own around each row, as tokens for beginning and end are."""
    edge = [{"x": torch.ones(1, 6), "y": torch.zeros(1, dtype=torch.int64)}]
    return padded(
        [
            {name: torch.cat([edge[0][name], sample[name], edge[0][name]]) for name in ("x", "y")}
            | {"label": sample["label"]}
            for sample in samples
        ]
    )


RIGHT = {
    "given order": (padded, Tagger.tags),
    "sorted, all of it": (lambda s: padded(longest_first(s)), Tagger.tags),
    "sorted, a label per row": (lambda s: padded(longest_first(s)), Tagger.label),
    "a mask": (padded, Tagger.mean),
    "edges": (framed, Tagger.tags),
    "packed at once": (
        lambda s: {
            "x": pack_sequence([sample["x"] for sample in s], enforce_sorted=False),
            "label": torch.tensor([sample["label"] for sample in s]),
        },
        lambda m, b: F.cross_entropy(m.gru(b["x"])[1][-1], b["label"]),
    ),
    "time first": (
        lambda s: padded(s) | {"x": pad_sequence([sample["x"] for sample in s])},
        lambda m, b: F.cross_entropy(
            m.gru(pack_padded_sequence(b["x"], b["lengths"], enforce_sorted=False))[1][-1], b["label"]
        ),
    ),
    "PadCollator": (
        PadCollator({"x": 0, "y": -100}),
        lambda m, b: sequence_loss(
            nn.CrossEntropyLoss(reduction="none"), apply_rnn(m.gru, b["x"])[0].map(m.head), b["y"]
        ),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
@pytest.mark.parametrize("lengths", [(3, 7, 2, 5), (7, 5, 3, 2), (4, 2)])
def test_no_right_collate_function_is_accused(name: str, lengths: tuple[int, ...]) -> None:
    collate, step = RIGHT[name]
    model = Tagger()
    report = check_step(lambda b: step(model, b), samples=samples_of(lengths), collate=collate)
    assert report.ok, report


def test_samples_of_arrays_lists_and_tuples_are_taken() -> None:
    report = check_step(Tagger().tags, samples=as_tuples(samples_of()), collate=of_tuples)
    assert report.ok, report


def cut_to(width: int) -> Any:
    def cut(samples: list[dict[str, int | torch.Tensor]]) -> dict[str, torch.Tensor]:
        longest = min(map(len, (sample["x"] for sample in samples))) if width is None else width
        return padded([sample | {n: sample[n][:longest] for n in ("x", "y")} for sample in samples])

    return cut


def changed(**parts: Any) -> Any:
    """The right batch with some parts computed from it."""
    return lambda samples: (lambda batch: batch | {name: change(batch) for name, change in parts.items()})(
        padded(samples)
    )


def dropped_when_short(samples: list[dict[str, int | torch.Tensor]]) -> dict[str, torch.Tensor]:
    return padded([sample for sample in samples if len(sample["x"]) > 2] or samples)


def worded(
    lengths: tuple[int, ...] = (3, 7, 2, 5), words: tuple[int, ...] = (1, 9)
) -> list[dict[str, int | torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [{"x": torch.randint(*words, (n,), generator=draw), "label": n % CLASSES} for n in lengths]


def of_words(
    samples: list[dict[str, int | torch.Tensor]], *, guess: Callable[..., Any] | None = None, **parts: Any
) -> dict[str, torch.Tensor]:
    x = pad_sequence([sample["x"] for sample in samples], batch_first=True)
    known = torch.arange(x.shape[1]) < torch.tensor([len(sample["x"]) for sample in samples])[:, None]
    mask = known if guess is None else guess(x)
    label = torch.tensor([sample["label"] for sample in samples])
    return {"x": x, "mask": mask, "lengths": mask.sum(1), "label": label} | {n: part(x) for n, part in parts.items()}


def word_means(model: Tagger, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """A mean that counts each word, whatever it is."""
    vectors = F.one_hot(batch["x"], 9).float()[..., :6] + 1
    hidden = model.wide(vectors) * batch["mask"][..., None]
    return F.cross_entropy(hidden.sum(1) / batch["mask"].sum(1, keepdim=True).clamp(min=1), batch["label"])


GUESSES = {
    "a mask": lambda x: x != 0,
    "the last that is not zero": lambda x: x.flip(1).ne(0).cumsum(1).flip(1) > 0,
}


@pytest.mark.parametrize("guess", GUESSES.values(), ids=GUESSES)
@pytest.mark.parametrize("seed", range(3))
def test_lengths_guessed_from_values_that_samples_hold_are_found(guess: Callable[..., Any], seed: int) -> None:
    """Red before: a sample may end in a real zero, which was never tried."""
    model, samples = Tagger(), worded()
    samples[1]["x"][2] = 0
    report = check_step(
        lambda b: word_means(model, b), samples=samples, collate=lambda s: of_words(s, guess=guess), seed=seed
    )
    assert [finding.probe for finding in report.findings] == ["dead step"], report
    assert "guessed from values" in str(report)


@pytest.mark.parametrize("features", [(), (6,)])
def test_lengths_guessed_from_floats_are_found_since_a_zero_may_be_real(features: tuple[int, ...]) -> None:
    """Red before."""
    model = Tagger()

    def collate(samples: list[dict[str, int | torch.Tensor]], *, guess: bool = True) -> dict[str, torch.Tensor]:
        x = pad_sequence([sample["x"] for sample in samples], batch_first=True)
        real = (x != 0).any(-1) if features else x != 0
        lengths = real.sum(1) if guess else torch.tensor([len(sample["x"]) for sample in samples])
        return {"x": x, "lengths": lengths, "label": torch.tensor([sample["label"] for sample in samples])}

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        wide = batch["x"] if features else batch["x"][..., None].expand(-1, -1, 6)
        return model.label(batch | {"x": wide})

    draw = torch.Generator().manual_seed(0)
    samples = [{"x": torch.randn(n, *features, generator=draw), "label": n % CLASSES} for n in (3, 7, 2, 5)]
    report = check_step(step, samples=samples, collate=collate)
    assert [finding.probe for finding in report.findings] == ["dead step"], report
    assert "takes the lengths of x from its values: with 0 at step 6, the last of sample 1, lengths" in str(report)
    assert "take len() of each sample" in report.findings[0].likely[0]
    assert check_step(step, samples=samples, collate=lambda s: collate(s, guess=False)).ok


def test_a_mask_of_what_no_sample_holds_is_noted_and_not_accused() -> None:
    model = Tagger()
    report = check_step(
        lambda b: word_means(model, b), samples=worded(), collate=lambda s: of_words(s, guess=lambda x: x != 0)
    )
    assert report.ok, report
    assert "mask and lengths of the batch leave that step out: right only if no sample ever" in str(report)


RIGHT_PARTS = {
    "no guess": {},
    "a guess that is not read": {"other": lambda x: (x != 0).sum(1)},
    "targets made of values": {"positive": lambda x: (x > 0).long()},
}


@pytest.mark.parametrize("parts", RIGHT_PARTS.values(), ids=RIGHT_PARTS)
@pytest.mark.parametrize("words", [(0, 9), (0, 2), (1, 3)])
def test_lengths_that_are_no_guess_are_not_taken_for_one(
    parts: dict[str, Callable[..., Any]], words: tuple[int, ...]
) -> None:
    model, samples = Tagger(), worded(words=words)
    report = check_step(lambda b: word_means(model, b), samples=samples, collate=lambda s: of_words(s, **parts))
    assert report.ok, report
    assert "takes the lengths" not in str(report)


MISTAKES = {
    "x sorted, y not": (
        lambda s: padded(longest_first(s), y=s),
        Tagger.tags,
        r"puts the samples' x in rows \[2, 0, 3, 1\], but their y in rows \[0, 1, 2, 3\]",
    ),
    "x sorted, labels not": (
        lambda s: padded(longest_first(s), label=s),
        Tagger.label,
        r"puts the samples' x in rows \[2, 0, 3, 1\], but their label in rows \[0, 1, 2, 3\]",
    ),
    "y sorted, x not": (lambda s: padded(s, y=longest_first(s)), Tagger.tags, "but their y in rows"),
    "x and y sorted, lengths not": (
        lambda s: padded(longest_first(s), lengths=s),
        Tagger.tags,
        r"lengths of the batch holds the lengths \[3, 7, 2, 5\], but the rows of x have \[7, 5, 3, 2\]",
    ),
    "lengths sorted, rows not": (
        lambda s: padded(s, lengths=longest_first(s)),
        Tagger.label,
        "lengths of another order",
    ),
    "lengths of the block": (
        changed(lengths=lambda b: torch.full_like(b["lengths"], b["x"].shape[1])),
        Tagger.label,
        "padding is read as if it were real",
    ),
    "lengths one too small": (
        changed(lengths=lambda b: (b["lengths"] - 1).clamp(min=1)),
        Tagger.label,
        "lengths .* too small",
    ),
    "lengths one too large": (
        changed(lengths=lambda b: (b["lengths"] + 1).clamp(max=b["x"].shape[1])),
        Tagger.label,
        "lengths .* too large",
    ),
    "cut to the shortest row": (cut_to(None), Tagger.tags, "of x out of the batch"),
    "cut to a width": (cut_to(4), Tagger.tags, "leaves step 6 of sample 1 of x out of the batch"),
    "the last step cut": (
        lambda s: padded([sample | {n: sample[n][: max(1, len(sample[n]) - 1)] for n in ("x", "y")} for sample in s]),
        Tagger.tags,
        "of x out of the batch",
    ),
    "mask of the wrong polarity": (
        changed(mask=lambda b: (torch.arange(b["x"].shape[1]) >= b["lengths"][:, None]) + 1e-3),
        Tagger.mean,
        "other rows|dead step",
    ),
    "mask of everything": (changed(mask=lambda b: torch.ones_like(b["mask"])), Tagger.mean, "padding"),
    "mask of other rows": (changed(mask=lambda b: b["mask"].flip(0)), Tagger.mean, "lengths of another order"),
    "padding is a class": (lambda s: padded(s, value=0), Tagger.tags, "marked by a value that is a real class"),
    "short samples left out": (dropped_when_short, Tagger.tags, "sample 2 of x"),
    "the first sample twice": (lambda s: padded([s[0], *s[:-1]]), Tagger.tags, "sample 3 of x"),
    "padding on the left": (
        changed(
            x=lambda b: torch.stack(
                [row.roll(b["x"].shape[1] - n, 0) for row, n in zip(b["x"], b["lengths"].tolist(), strict=True)]
            )
        ),
        Tagger.label,
        "dead step|other rows",
    ),
    "a step that forgets the mask": (
        padded,
        lambda m, b: F.cross_entropy(m.wide(b["x"]).mean(1), b["label"]),
        "other rows",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_a_collate_function_is_found_and_named(name: str) -> None:
    collate, step, message = MISTAKES[name]
    model = Tagger()
    report = check_step(lambda b: step(model, b), samples=samples_of(), collate=collate)
    with pytest.raises(LengthError, match=message):
        report.raise_if_broken()


@pytest.mark.parametrize("seed", range(8))
def test_a_field_that_is_not_sorted_is_found_for_every_seed(seed: int) -> None:
    for rows in ((7, 5, 3, 2), (4, 6, 5)):
        samples = samples_of(rows)
        report = check_step(Tagger().tags, samples=samples, collate=lambda s: padded(longest_first(s), y=s), seed=seed)
        assert "order" in {finding.probe for finding in report.findings}, report


def test_a_step_that_is_wrong_is_found_behind_a_right_collate_function() -> None:
    model = Tagger()

    def step(batch: dict[str, Any]) -> torch.Tensor:
        return F.cross_entropy(model.gru(batch["x"].padded)[1][-1], batch["label"])

    report = check_step(step, samples=samples_of(), collate=PadCollator({"x": 0, "y": -100}))
    assert {"padding", "width"} <= {finding.probe for finding in report.findings}


def test_a_wrong_order_is_found_in_batches_that_know_their_lengths() -> None:
    def collate(samples: list[dict[str, int | torch.Tensor]]) -> dict[str, Any]:
        batch = PadCollator({"x": 0, "y": -100})(samples)
        return batch | {"label": batch["x"].unsort(batch["label"])}

    model = Tagger()
    report = check_step(
        lambda b: F.cross_entropy(apply_rnn(model.gru, b["x"])[1][-1], b["label"]),
        samples=samples_of(),
        collate=collate,
    )
    assert "but their label in rows" in str(report)


def test_a_collate_function_that_crops_at_random_is_left_in_peace() -> None:
    def crop(samples: list[dict[str, int | torch.Tensor]]) -> dict[str, torch.Tensor]:
        starts = [random.randrange(len(sample["x"])) for sample in samples]
        cropped = [s | {n: s[n][at:] for n in ("x", "y")} for s, at in zip(samples, starts, strict=True)]
        return padded(cropped)

    random.seed(1)
    state = random.getstate()
    report = check_step(Tagger().tags, samples=samples_of(), collate=crop)
    assert report.ok
    assert "draws random numbers" in str(report)
    assert random.getstate() == state


def test_the_samples_are_not_written_to() -> None:
    samples = samples_of()
    before = [{name: np.asarray(value).copy() for name, value in sample.items()} for sample in samples]
    check_step(Tagger().tags, samples=samples, collate=padded)
    for sample, kept in zip(samples, before, strict=True):
        assert all(np.array_equal(np.asarray(sample[name]), value) for name, value in kept.items())


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, TypeError, "give a batch, or samples= and collate="),
        ({"samples": samples_of()}, TypeError, "samples and collate go together"),
        ({"batch": 1, "samples": samples_of(), "collate": padded}, TypeError, "and not both"),
        ({"samples": samples_of((3, 3)), "collate": padded}, LengthError, "two or more of different lengths"),
        ({"samples": samples_of((3,)), "collate": padded}, LengthError, "two or more of different lengths"),
    ],
)
def test_what_cannot_be_checked_is_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_step(Tagger().tags, **given)


def test_a_padded_batch_without_lengths_leads_to_samples_and_collate() -> None:
    with pytest.raises(LengthError, match="pass samples= and collate="):
        check_step(Tagger().tags, padded(samples_of()))


def test_a_tracked_batch_is_what_a_field_becomes_too() -> None:
    def collate(samples: list[dict[str, int | torch.Tensor]]) -> dict[str, LengthTrackedBatch]:
        return {"x": LengthTrackedBatch.from_sequences([sample["x"] for sample in samples], order="given")}

    model = Tagger()
    assert check_step(lambda b: model.wide(b["x"].flat()).square().sum(), samples=samples_of(), collate=collate).ok


def spelled(texts: list[str]) -> dict[str, torch.Tensor]:
    """Characters as numbers, made of texts inside of the collate function, which sorts its list in place."""
    texts.sort(key=len, reverse=True)
    x = pad_sequence([torch.tensor([ord(c) % 7 for c in text]) for text in texts], batch_first=True)
    return {"x": F.one_hot(x, 7)[..., :6].float(), "lengths": torch.tensor([len(text) for text in texts])}


def test_texts_are_checked_as_far_as_they_can_be() -> None:
    model, texts = Tagger(), ["tapir", "ox", "lemur", "elephant"]

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        packed = pack_padded_sequence(batch["x"], batch["lengths"], batch_first=True)
        return model.gru(packed)[1][-1].square().sum()

    report = check_step(step, samples=texts, collate=spelled)
    assert report.ok, report
    assert "they have no field that is a tensor" in str(report)
    assert texts == ["tapir", "ox", "lemur", "elephant"]
    wrong = check_step(lambda b: model.gru(b["x"])[0].mean(1).square().sum(), samples=texts, collate=spelled)
    assert "other rows" in {finding.probe for finding in wrong.findings}


def test_a_collate_function_may_take_its_samples_apart() -> None:
    """Red before: it was given the samples that an earlier call had taken apart, and a list that one had sorted."""

    def apart(samples: list[dict[str, int | torch.Tensor]]) -> dict[str, torch.Tensor]:
        samples.sort(key=lambda sample: -len(sample["x"]))
        labels = torch.tensor([sample.pop("label") for sample in samples])
        lengths = [len(sample["x"]) for sample in samples]
        x = pad_sequence([sample.pop("x") for sample in samples], batch_first=True)
        return {"x": x, "lengths": torch.tensor(lengths), "label": labels}

    model, samples = Tagger(), samples_of()
    assert check_step(model.label, samples=samples, collate=apart).ok
    broken = check_step(model.label, samples=samples, collate=lambda s: apart(s) | {"label": torch.arange(len(s))})
    assert "other rows" in {finding.probe for finding in broken.findings}
    assert [len(sample["x"]) for sample in samples] == [3, 7, 2, 5]
