"""The budget that fits memory: the largest number of padded tokens whose training step a device can hold."""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

resource: ModuleType | None
try:
    import resource
except ImportError:
    # It is a module of Unix.
    resource = None

Width: TypeAlias = int | tuple[int, ...]
Shape: TypeAlias = tuple[int, Width]
Step: TypeAlias = Callable[[int, Any], object]

# Widths that are tried for each budget: where more will come, so many of them, spread from the least to the greatest.
TRIED = 5
# The answer is within this share of the largest budget that fits.
GRAIN = 0.05

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def find_max_tokens(
    step: Step,
    shapes: Sequence[Shape] | Sequence[int],
    *,
    device: torch.device | str | int | None = None,
    limit: int | None = None,
    share: float = 0.9,
    most: int = 1 << 24,
    module: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> int:
    """Find the greatest `max_tokens` whose steps fit in memory, by doubling and then halving the interval.

    Each budget is tried with real steps over the widths that will come, as many rows as it holds. On CUDA a step that
    runs out of memory is caught. On the CPU nothing stops a step that is too large: one step may reach twice the limit,
    so leave room for it. There the whole process counts, measured by its peak resident memory; what the process held
    before counts as well, and pages that Python keeps make small limits (below some 100 MB) unreliable.

    Args:
        step: `step(rows, width)` makes a batch of that size, runs forward and backward, and may move the optimizer. The
            width is a tuple where that of the shapes is, one for each field.
        shapes: a sampler's `shapes`, or the widths alone.
        device: where the step runs; None takes the accelerator, or the CPU where there is none.
        limit: bytes that count as all memory; None takes the GPU's own, and must be given elsewhere.
        share: how much of the limit may be filled.
        most: the greatest budget to try, in padded tokens; of several fields, those of all of them count.
        module: its parameters, gradients and buffers are given back afterwards.
        optimizer: its state is given back afterwards.

    Returns:
        Padded tokens, within 5 % of the greatest that fits, at most `most`.

    Raises:
        OSError: The step runs on the CPU, and the system does not say how much memory a process takes.
        ValueError: There is no width, `share` is not in (0, 1], `most` is less than one row of the greatest width, or
            there is no limit and no GPU.
        MemoryError: Not even one row of the greatest width fits.
    """
    widths = _widths_to_try(shapes)
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, got {share}")
    least = tokens_of(widths[-1])
    if most < least:
        raise ValueError(f"most must hold one row of {widths[-1]} steps, got {most}: {least} tokens at least")
    where = torch.device(device) if device is not None else _accelerator() or torch.device("cpu")
    allowed = int(share * _whole_memory(where, limit))

    def fits(tokens: int) -> bool:
        return all(_peak(step, tokens // tokens_of(width), width, where) <= allowed for width in widths)

    with _undisturbed(module, optimizer, where):
        if not fits(least):
            raise MemoryError(
                f"not even one row of {widths[-1]} steps fits in {allowed:,} bytes: cut rows with max_length, use a "
                "smaller model, or raise the limit"
            )
        return _largest(fits, least, most)


def _largest(fits: Callable[[int], bool], low: int, most: int) -> int:
    high = low
    while high == low and low < most:
        high = min(2 * low, most)
        if fits(high):
            low = high
    while high - low > GRAIN * low:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _accelerator() -> torch.device | None:
    # A build for CUDA names one that is not there, unless it is asked to look.
    return torch.accelerator.current_accelerator(check_available=True)


def tokens_of(width: Width) -> int:
    """Padded tokens of one row: the sum of its widths, where it has several fields."""
    return sum(width) if isinstance(width, tuple) else width


def _widths_to_try(shapes: Sequence[Shape] | Sequence[int]) -> list[Width]:
    given = [shape[1] if isinstance(shape, (tuple, list)) else shape for shape in shapes]
    different = {_as_width(width) for width in given}
    if len({np.shape(width) for width in different}) > 1:
        raise ValueError(f"shapes must name widths of one number of fields, got {given[:5]}: give a sampler's shapes")
    widths = sorted(different, key=lambda width: (tokens_of(width), width))
    if not widths or min(int(np.min(width)) for width in widths) < 1:
        raise ValueError(f"shapes must name widths of at least 1, got {list(shapes)[:5]}: give a sampler's shapes")
    if len(widths) <= TRIED:
        return widths
    return [widths[place * (len(widths) - 1) // (TRIED - 1)] for place in range(TRIED)]


def _as_width(width: object) -> Width:
    if isinstance(width, (tuple, list)):
        return tuple(map(int, width))
    return int(cast(int, width))


def _whole_memory(device: torch.device, limit: int | None) -> int:
    if limit is not None:
        return limit
    if device.type != "cuda":
        raise ValueError(f"limit must be given on {device}: the bytes that the whole process may take")
    return int(torch.cuda.get_device_properties(device).total_memory)


def _peak(step: Step, rows: int, width: Width, device: torch.device) -> int:
    """Run a step; the greatest memory in bytes that was in use meanwhile, more than any limit if it ran out.

    Raises:
        RuntimeError: The step failed for another reason.
    """
    gc.collect()
    try:
        if device.type != "cuda":
            _forget_peak()
            step(rows, width)
            return peak_resident()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        step(rows, width)
        torch.cuda.synchronize(device)
    except MemoryError:
        return sys.maxsize
    except RuntimeError as error:
        if not _is_out_of_memory(error):
            raise
        return sys.maxsize
    return torch.cuda.max_memory_reserved(device)


def _is_out_of_memory(error: RuntimeError) -> bool:
    # cuBLAS and cuDNN have their own words for it (CUBLAS_STATUS_ALLOC_FAILED, CUDNN_STATUS_ALLOC_FAILED), and so has
    # torch on the host (DefaultCPUAllocator: can't allocate memory).
    words = ("out of memory", "ALLOC_FAILED", "DefaultCPUAllocator")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def peak_resident() -> int:
    """The process's greatest resident memory in bytes: since `_forget_peak` on Linux, since its start elsewhere.

    Raises:
        OSError: The system does not say.
    """
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    if resource is None:
        raise OSError(
            "the memory of a process cannot be measured on this system, which has neither /proc nor Python's module "
            "resource: find the budget on a GPU, or on Linux or macOS"
        )
    # Kilobytes everywhere but on macOS.
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def _forget_peak() -> None:
    if _CLEAR_REFS.exists():
        # "5" sets the peak back to what is resident now (Linux, proc(5)).
        _CLEAR_REFS.write_text("5")


@contextmanager
def _undisturbed(
    module: nn.Module | None, optimizer: torch.optim.Optimizer | None, device: torch.device
) -> Iterator[None]:
    """Give back weights, gradients, buffers, optimizer state and random states; copies wait on the host."""
    weights = [(weight, _kept(weight), weight.grad) for weight in (module.parameters() if module else [])]
    buffers = [(buffer, _kept(buffer)) for buffer in (module.buffers() if module else [])]
    state = _kept_state(optimizer) if optimizer else None
    for weight, _, _ in weights:
        weight.grad = None
    # Only the step's own device: others would be woken up for nothing.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            for weight, value, gradient in weights:
                weight.data.copy_(value)
                weight.grad = gradient
            for buffer, value in buffers:
                buffer.data.copy_(value)
            if optimizer and state is not None:
                optimizer.load_state_dict(state)


def _kept(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _kept_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    whole = optimizer.state_dict()
    # Options stay where they are: loading moves an optimizer's state to its weights, but no tensor among these.
    return {
        "state": pytree.tree_map_only(Tensor, _kept, whole["state"]),
        "param_groups": deepcopy(whole["param_groups"]),
    }
