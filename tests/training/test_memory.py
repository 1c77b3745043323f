"""find_max_tokens: real allocations, a real limit, and nothing left changed."""

import gc
import random
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from collate import find_max_tokens
from collate.errors import is_out_of_memory
from collate.training.max_tokens import _forget_peak, peak_resident

MEGABYTE = 1 << 20


def resident_now() -> int:
    """Bytes that the process holds now, whatever the peak of the tests before."""
    gc.collect()
    _forget_peak()
    return peak_resident()


def allocate(bytes_per_token: int) -> Callable[..., Any]:
    def step(rows: int, width: int) -> None:
        torch.ones(rows * width * bytes_per_token, dtype=torch.uint8)

    return step


def test_the_answer_is_close_to_what_the_limit_holds() -> None:
    limit = resident_now() + 512 * MEGABYTE
    tokens = find_max_tokens(
        allocate(4096), [(1, 16), (1, 64), (1, 256)], device="cpu", memory_limit=limit, memory_fraction=1.0
    )
    assert 0.7 * 131_072 <= tokens <= 1.3 * 131_072


def test_the_width_that_needs_most_decides() -> None:
    def quadratic(rows: int, width: int) -> None:
        torch.ones(rows * width * width * 64, dtype=torch.uint8)

    limit = resident_now() + 400 * MEGABYTE
    narrow = find_max_tokens(quadratic, [64], device="cpu", memory_limit=limit, memory_fraction=1.0)
    wide = find_max_tokens(quadratic, [64, 512], device="cpu", memory_limit=limit, memory_fraction=1.0)
    assert narrow > 4 * wide


def test_the_greatest_budget_to_try_is_kept() -> None:
    assert find_max_tokens(allocate(1), [10], device="cpu", memory_limit=1 << 40, upper=1000) == 1000


def test_weights_gradients_buffers_optimizer_and_seeds_are_restored() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    gradients = [weight.grad.clone() for weight in module.parameters()]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    random = torch.get_rng_state()

    def step(rows: int, width: int) -> None:
        optimizer.zero_grad()
        module(torch.randn(rows * width, 4)).square().sum().backward()
        optimizer.step()

    find_max_tokens(step, [4], device="cpu", memory_limit=1 << 40, upper=64, module=module, optimizer=optimizer)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(torch.equal(w.grad, g) for w, g in zip(module.parameters(), gradients, strict=True))
    assert all(torch.equal(s["exp_avg"], m) for s, m in zip(optimizer.state.values(), moments, strict=True))
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(
    ("shapes", "options", "kind", "message"),
    [
        ([], {"memory_limit": 1}, ValueError, "shapes must name widths"),
        ([0], {"memory_limit": 1}, ValueError, "shapes must name widths of at least 1"),
        ([8], {}, ValueError, "memory_limit must be given on cpu"),
        ([8], {"memory_limit": 1, "memory_fraction": 0}, ValueError, "memory_fraction must be above 0"),
        ([8], {"memory_limit": 1.5}, TypeError, "memory_limit must be an int"),
        ([8], {"memory_limit": 1 << 40, "upper": 64.0}, TypeError, "upper must be an int"),
        ([8], {"memory_limit": 1}, MemoryError, "not even one row of 8 steps fits in 0 bytes"),
        (
            [(2, 8), (1, 16)],
            {"memory_limit": 1 << 40, "upper": 15},
            ValueError,
            "upper must hold one row of 16 steps, got 15",
        ),
        ([(8, (16, 32))], {"memory_limit": 1 << 40, "upper": 47}, ValueError, r"one row of \(16, 32\) steps, got 47"),
        ([8, (2, (4, 4))], {"memory_limit": 1}, ValueError, "widths of one number of fields"),
        ([(2, (4, 4)), (2, (4, 4, 4))], {"memory_limit": 1}, ValueError, "widths of one number of fields"),
        ([(2, (0, 4))], {"memory_limit": 1}, ValueError, "shapes must name widths of at least 1"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    shapes: list[int | tuple[int, ...] | tuple[int, tuple[int, ...]]],
    options: dict[str, Any],
    kind: type[Exception],
    message: str,
) -> None:
    with pytest.raises(kind, match=message):
        find_max_tokens(allocate(1), shapes, device="cpu", **options)


def test_the_names_of_release_0_1_work_with_a_warning() -> None:
    present = {"step": "run_shape", "limit": "memory_limit", "share": "memory_fraction", "most": "upper"}
    with pytest.warns(DeprecationWarning, match="of find_max_tokens is now called") as caught:
        tokens = find_max_tokens(step=allocate(1), shapes=[10], device="cpu", limit=1 << 40, share=0.5, most=1000)
    assert tokens == 1000
    assert sorted(str(warning.message).split(";")[0] for warning in caught) == sorted(
        f"{former}= of find_max_tokens is now called {name}=" for former, name in present.items()
    )
    assert {warning.filename for warning in caught} == {__file__}


def test_an_old_name_next_to_its_new_one_is_refused() -> None:
    with pytest.raises(TypeError, match="takes upper= once, got its former name most= as well: leave most= out"):
        find_max_tokens(allocate(1), [10], device="cpu", memory_limit=1 << 40, upper=100, most=100)


def test_random_states_of_python_and_numpy_are_restored_too() -> None:
    def draw(rows: int, width: int) -> None:
        random.random()
        np.random.rand()  # noqa: NPY002

    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    find_max_tokens(draw, [8], device="cpu", memory_limit=1 << 40, upper=16)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002


@pytest.mark.parametrize("words", ["CUDA error: out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"])
def test_every_library_s_words_for_lack_of_memory_are_known(words: str) -> None:
    assert is_out_of_memory(RuntimeError(words))
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_shapes_of_several_fields_are_tried_with_all_their_widths() -> None:
    """Red before: a TypeError. Tokens are those of all fields, as the sampler counts them."""
    tried = set()

    def step(rows: int, widths: tuple[int, ...]) -> None:
        tried.add((rows, widths))

    shapes = [(8, (16, 32)), (4, (32, 64)), (16, (8, 8))]
    assert find_max_tokens(step, shapes, device="cpu", memory_limit=1 << 40, upper=960) == 960
    assert {widths for _, widths in tried} == {(16, 32), (32, 64), (8, 8)}
    assert max(rows * sum(widths) for rows, widths in tried) == 960


def test_widths_of_numpy_s_integers_count_as_integers() -> None:
    shapes = [(4, np.int64(10)), np.int64(10)]
    assert find_max_tokens(allocate(1), shapes, device="cpu", memory_limit=1 << 40, upper=1000) == 1000


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
    ],
    ids=["Python", "torch"],
)
def test_an_allocation_that_the_host_refuses_does_not_fit(error: Any) -> None:
    """Red before: the error came through."""

    def step(rows: int, width: int) -> None:
        if rows * width > 3000:
            raise error

    assert 2800 <= find_max_tokens(step, [10], device="cpu", memory_limit=1 << 40) <= 3000


def test_a_real_allocation_beyond_the_address_space_does_not_fit() -> None:
    def step(rows: int, width: int) -> None:
        if rows * width > 3000:
            torch.empty(1 << 61, dtype=torch.uint8)

    assert 2800 <= find_max_tokens(step, [10], device="cpu", memory_limit=1 << 40) <= 3000


def test_a_cuda_build_without_a_gpu_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Red before: it asked for the accelerator that the build is for, whether or not there is one."""
    asked = []

    def current_accelerator(check_available: bool = False) -> torch.device | None:
        asked.append(check_available)
        return None if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", current_accelerator)
    assert find_max_tokens(allocate(1), [10], memory_limit=1 << 40, upper=1000) == 1000
    assert asked[0]


WITHOUT_UNIX = """
import builtins, pathlib, sys
import torch
real = builtins.__import__
def refuse(name, *rest, **options):
    if name in ("resource", "fcntl"):
        raise ImportError(name)
    return real(name, *rest, **options)
def closed(run):
    def call(self, *inputs, **options):
        if str(self).startswith("/proc"):
            raise FileNotFoundError(str(self))
        return run(self, *inputs, **options)
    return call
for name in ("resource", "fcntl"):
    sys.modules.pop(name, None)
builtins.__import__ = refuse
for name in ("open", "read_text", "write_text"):
    setattr(pathlib.Path, name, closed(getattr(pathlib.Path, name)))
pathlib.Path.exists = lambda self, **options: not str(self).startswith("/proc") and pathlib.os.path.exists(self)
import collate
batch = collate.PadCollator()([[1, 2], [3]])
print(batch.lengths.tolist())
try:
    collate.find_max_tokens(lambda rows, width: None, [8], device="cpu", memory_limit=1 << 30)
except OSError as error:
    print(error)
"""


def test_the_package_needs_no_module_or_folder_of_unix() -> None:
    """Red before: importing it imported `resource`."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_UNIX], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lengths, error = done.stdout.splitlines()
    assert lengths == "[2, 1]"
    assert "the memory of a process cannot be measured on this system" in error
