"""With closed shapes a step is made once for each shape, and reads nothing from the host that a graph would freeze."""

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from collate import PadCollator
from samplers import LengthBucketBatchSampler, optimal_widths

EXAMPLE = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "fixed_shapes.py"))
cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
on_cuda = pytest.param("cuda", marks=cuda)


def fixed_batches(count: int = 300) -> Any:
    torch.manual_seed(0)
    samples = EXAMPLE["samples_of"](count)
    lengths = [len(sample["words"]) for sample in samples]
    sampler = LengthBucketBatchSampler(lengths, max_tokens=512, widths=optimal_widths(lengths, 3))
    collate = PadCollator({"words": 0, "tags": -100}, shapes=sampler.shapes)
    return sampler.shapes, DataLoader(samples, batch_sampler=sampler, collate_fn=collate)


def gradients_of(loss: Any, model: Any) -> Any:
    return torch.autograd.grad(loss, list(model.parameters()))


def assert_same(ours: Any, theirs: Any, **tolerance: Any) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **tolerance)


def test_a_step_is_made_once_for_each_shape_and_takes_no_lengths_in() -> None:
    shapes, loader = fixed_batches()
    model = EXAMPLE["Tagger"]()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append([value for value in inputs if not isinstance(value, torch.nn.Parameter)])
        return graph

    torch.compiler.reset()
    step = torch.compile(model, backend=backend, dynamic=False, fullgraph=True)
    seen, kinds = set(), set()
    for _ in range(2):
        for batch in loader:
            words, tags = batch["words"], batch["tags"]
            seen.add(tuple(words.padded.shape))
            kinds.add((tuple(words.padded.shape), tuple(words.lengths.tolist())))
            losses = step(words, tags), model(words, tags)
            torch.testing.assert_close(*losses)
            assert_same(*[gradients_of(loss, model) for loss in losses])
    assert seen <= {(rows, width) for rows, (width,) in shapes}
    # Several lists of lengths went through each graph.
    assert len(kinds) > 3 * len(seen)
    assert len(graphs) == len(seen)
    assert all(value.dim() == 2 for graph in graphs for value in graph)


@pytest.mark.parametrize("device", [on_cuda])
def test_one_cuda_graph_of_a_shape_serves_all_its_batches(device: str) -> None:
    _, loader = fixed_batches()
    model = EXAMPLE["Tagger"]().to(device)
    weights = list(model.parameters())
    graphs = {}
    for batch in [batch for _ in range(2) for batch in loader]:
        words, tags = batch["words"].to(device), batch["tags"].to(device)
        shape = tuple(words.padded.shape)
        if shape not in graphs:
            graphs[shape] = captured(model, words, tags)
        graph, inputs, loss, grads = graphs[shape]
        for static, value in zip(inputs, (words.padded, words.mask, tags.padded, tags.mask), strict=True):
            static.copy_(value)
        graph.replay()
        direct = model(words, tags)
        torch.testing.assert_close(loss, direct)
        assert_same(grads, torch.autograd.grad(direct, weights), rtol=1e-4, atol=1e-5)


def captured(model: Any, words: str, tags: Any) -> Any:
    """Loss and gradients of a batch as a CUDA graph, with the tensors that it reads and writes."""
    words, tags = words.with_padded(words.padded.clone()), tags.with_padded(tags.padded.clone())
    inputs = (words.padded, words.mask, tags.padded, tags.mask)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            gradients_of(model(words, tags), model)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = model(words, tags)
        grads = gradients_of(loss, model)
    return graph, inputs, loss, grads


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("device", [on_cuda])
def test_reduced_overhead_skips_no_graph_and_gives_the_same_loss(device: str) -> None:
    counters = pytest.importorskip("torch._dynamo.utils").counters
    shapes, loader = fixed_batches()
    model = EXAMPLE["Tagger"]().to(device)
    torch.compiler.reset()
    counters.clear()
    step = EXAMPLE["compiled"](model, torch.device(device), len(shapes))
    for _ in range(3):
        for batch in loader:
            words, tags = batch["words"].to(device), batch["tags"].to(device)
            loss = step(words, tags)
            loss.backward()
            torch.testing.assert_close(loss.detach().clone(), model(words, tags).detach(), rtol=1e-4, atol=1e-4)
    assert not counters["inductor"]["cudagraph_skips"]
