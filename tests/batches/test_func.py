"""torch.func: gradients, ensembles and forward mode through what packs and unpacks, against plain autograd."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils import _pytree as pytree

from collate import LengthTrackedBatch, apply_rnn, last_step, masked_mean, sequence_loss

# Torch's own forward mode calls what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is (deprecated|not supported)")
FLOATS = {"dtype": torch.float64}
COUNTS = (4, 0, 2, 3)


def values(features: int = 3) -> torch.Tensor:
    return torch.randn(len(COUNTS), 5, features, **FLOATS)


def squares(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output - target).square().sum(-1)


def tracked(padded: torch.Tensor, order: list[int] | None = None) -> LengthTrackedBatch:
    return LengthTrackedBatch(padded, list(COUNTS), permutation=order)


WAYS = {
    "flat": lambda x: tracked(x).flat().square().sum(),
    "pack": lambda x: tracked(x).pack().data.square().sum(),
    "unpack": lambda x: (tracked(x).unpack(tracked(x).pack()).padded ** 3).sum(),
    "loss of tokens": lambda x: sequence_loss(squares, tracked(x), tracked(torch.ones_like(x))),
    "loss of sequences": lambda x: sequence_loss(
        squares, tracked(x), tracked(torch.ones_like(x)), reduction="sequence"
    ),
    "mean": lambda x: masked_mean(tracked(x)).square().sum(),
    "last step": lambda x: last_step(tracked(x)).square().sum(),
    "unsort": lambda x: (tracked(x, [2, 0, 3, 1]).unsort().padded * x).sum(),
    "split": lambda x: sum((piece.flat() ** 2).sum() for piece in tracked(x).split(1)[::2]),
    "sequences": lambda x: sum((row**3).sum() for row in tracked(x).sequences()),
    "from sequences": lambda x: (LengthTrackedBatch.from_sequences([x[0], x[1, :2]]).flat() ** 2).sum(),
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@ways
def test_gradients_of_torch_func_are_those_of_autograd(way: Callable[..., Any]) -> None:
    """Red before: lengths were read from memory that a wrapped tensor has not."""
    x = values().requires_grad_()
    expected = torch.autograd.grad(way(x), x)[0]
    torch.testing.assert_close(grad(way)(x.detach()), expected)
    _, back = vjp(way, x.detach())
    torch.testing.assert_close(back(torch.ones((), **FLOATS))[0], expected)


@ways
def test_forward_mode_agrees_with_reverse_mode(way: Callable[..., Any]) -> None:
    x, direction = values(), values()
    value, change = jvp(way, (x,), (direction,))
    torch.testing.assert_close(value, way(x))
    torch.testing.assert_close(change, (grad(way)(x) * direction).sum())
    with forward_ad.dual_level():
        dual = way(forward_ad.make_dual(x, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, change)


@pytest.mark.parametrize("way", ["flat", "pack", "unpack", "loss of tokens"])
def test_second_derivatives_are_those_of_autograd(way: str) -> None:
    x = values(1)
    expected = torch.autograd.functional.hessian(WAYS[way], x)
    torch.testing.assert_close(hessian(WAYS[way])(x), expected)


@ways
def test_a_map_over_values_is_a_loop_over_them(way: Callable[..., Any]) -> None:
    several = torch.stack([values(), values(), values()])
    torch.testing.assert_close(vmap(way)(several), torch.stack([way(x) for x in several]))
    torch.testing.assert_close(vmap(grad(way))(several), torch.stack([grad(way)(x) for x in several]))


class Tagger(nn.Module):
    """An embedding, a recurrent module if there is one, and a loss."""

    def __init__(self, kind: type[Any] | None = None, **options: Any) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Linear(3, 3), None if kind is None else kind(3, 3, **options)

    def forward(self, batch: LengthTrackedBatch) -> torch.Tensor:
        hidden = batch.map(self.embed)
        hidden = hidden.unpack(hidden.pack()) if self.rnn is None else apply_rnn(self.rnn, hidden)[0]
        return hidden.flat().square().sum() + sequence_loss(squares, hidden, hidden.with_padded(hidden.padded * 0))


TAGGERS = {
    "packs": Tagger,
    "RNN": lambda: Tagger(nn.RNN),
    "GRU": lambda: Tagger(nn.GRU),
    "LSTM": lambda: Tagger(nn.LSTM),
    "both ways": lambda: Tagger(nn.GRU, bidirectional=True),
}
taggers = pytest.mark.parametrize("make", TAGGERS.values(), ids=TAGGERS)


@taggers
@pytest.mark.parametrize("order", [COUNTS, (4, 3, 3)], ids=["given", "longest"])
def test_gradients_by_a_functional_call_are_those_of_autograd(make: Callable[..., Any], order: tuple[int, ...]) -> None:
    model = make().double()
    batch = LengthTrackedBatch(torch.randn(len(order), 5, 3, **FLOATS), list(order))
    weights = dict(model.named_parameters())
    expected = torch.autograd.grad(model(batch), list(weights.values()))
    ours = grad(lambda weights: functional_call(model, weights, (batch,)))({k: v.detach() for k, v in weights.items()})
    for name, wanted in zip(weights, expected, strict=True):
        torch.testing.assert_close(ours[name], wanted)


@taggers
def test_forward_mode_through_a_module_agrees_with_reverse_mode(make: Callable[..., Any]) -> None:
    model = make().double()
    batch = tracked(values())
    weights = {name: weight.detach() for name, weight in model.named_parameters()}
    direction = {name: torch.randn_like(weight) for name, weight in weights.items()}

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(model, weights, (batch,))

    _, change = jvp(loss, (weights,), (direction,))
    slopes = grad(loss)(weights)
    torch.testing.assert_close(change, sum((slopes[name] * direction[name]).sum() for name in weights))


@pytest.mark.parametrize("mapped", [vmap, lambda loss: vmap(grad(loss))], ids=["values", "gradients"])
def test_an_ensemble_is_a_loop_over_its_members(mapped: Callable[..., Any]) -> None:
    members = [Tagger().double() for _ in range(3)]
    batch = tracked(values())
    weights, _ = stack_module_state(members)

    def loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(members[0], weights, (batch,))

    several = mapped(loss)(weights)
    for number in range(3):
        alone = mapped(loss)({name: weight[number : number + 1] for name, weight in weights.items()})
        for ours, expected in zip(pytree.tree_leaves(several), pytree.tree_leaves(alone), strict=True):
            torch.testing.assert_close(ours[number], expected[0])


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_torch_itself_maps_no_recurrent_module_over_weights(kind: type[Any]) -> None:
    """What to hope for of `apply_rnn`: when this fails, torch has learned it."""
    rnn = kind(3, 4)
    weights = {name: torch.stack([weight, weight]) for name, weight in rnn.named_parameters()}
    for call in (lambda rnn, x: rnn(x)[0], lambda rnn, x: apply_rnn(rnn, LengthTrackedBatch(x, [4, 2]))[0].padded):
        with pytest.raises(RuntimeError, match="[Bb]atching rule"):
            vmap(lambda weights, call=call: functional_call(Called(rnn, call), weights, (torch.zeros(2, 4, 3),)))(
                {f"rnn.{name}": weight for name, weight in weights.items()}
            )


class Called(nn.Module):
    """A module, called in some way."""

    def __init__(self, rnn: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.rnn, self.call = rnn, call

    def forward(self, x: torch.Tensor) -> Any:
        return self.call(self.rnn, x)


def test_a_jacobian_of_packed_steps_picks_them() -> None:
    x = values(1)
    jacobian = jacrev(lambda x: tracked(x).flat())(x).flatten(2)[:, 0]
    assert jacobian.sum(1).tolist() == [1.0] * sum(COUNTS)
    assert torch.equal(jacobian.nonzero()[:, 1], tracked(x).mask.flatten().nonzero()[:, 0])
