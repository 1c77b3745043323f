"""The budget that fits memory: the largest number of padded tokens whose training step a device can run."""

import gc
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import nn

from collate.deprecated.names import renamed_arguments
from collate.errors import is_out_of_memory
from collate.training.restore import restored_training
from collate.widths import PaddedShape, check_count

resource: ModuleType | None
try:
    import resource
except ImportError:
    # Windows has no such module: there `peak_resident` raises an error that says so.
    resource = None

SizedStep: TypeAlias = Callable[[int, Any], object]
"""Runs a training step: called with rows and a width (several fields: a tuple of widths)."""
# Inside, a width is always a tuple, with one entry for each field.
FieldWidths: TypeAlias = tuple[int, ...]

# Distinct widths that are tried for each budget, spread evenly over all of them: 5 bound the time of the search.
NUM_WIDTHS: Final = 5
# The result is within this fraction of the largest budget that fits.
PRECISION: Final = 0.05

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@renamed_arguments(step="run_shape", limit="memory_limit", share="memory_fraction", most="upper")
def find_max_tokens(
    run_shape: SizedStep,
    shapes: Sequence[PaddedShape] | Sequence[int],
    *,
    device: torch.device | str | int | None = None,
    memory_limit: int | None = None,
    memory_fraction: float = 0.9,
    upper: int = 1 << 24,
    module: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
) -> int:
    """Find the largest `max_tokens` whose training steps fit in memory, by doubling and then bisection.

    Each budget is tried with real training steps over the widths that will come, with as many rows as it holds. On CUDA
    a step that runs out of memory is caught. On the CPU nothing stops a step that is too large: one step may take twice
    the limit, so leave room for it. There the memory of the whole process counts, measured by its peak resident memory;
    what the process held before counts as well, and pages that Python keeps make limits below about 100 MB unreliable.

    The names `step`, `limit`, `share` and `most` of release 0.1 still work, with a `DeprecationWarning`.

    Args:
        run_shape: `run_shape(rows, width)` makes a batch of that size, runs forward and backward, and may call the
            optimizer. The width is a tuple where that of the shapes is, with one entry for each field.
        shapes: A sampler's `shapes`, or the widths alone.
        device: Where the training step runs; None takes the accelerator, or the CPU where there is none.
        memory_limit: Bytes that count as all memory; None takes the GPU's memory, and must be given elsewhere.
        memory_fraction: Fraction of the limit that may be used.
        upper: The largest budget to try, in padded tokens; with several fields, the tokens of all of them count.
        module: Its parameters, gradients and buffers are restored afterwards.
        optimizer: Its state is restored afterwards.

    Returns:
        Padded tokens, within 5 % of the largest budget that fits, at most `upper`.

    Raises:
        OSError: The step runs on the CPU, and the system does not tell how much memory a process takes.
        TypeError: `upper` or `memory_limit` is not an int, or an argument is given by its old and its new name.
        ValueError: There is no width, `memory_fraction` is not in (0, 1], `upper` is less than one row of the largest
            width, or there is no limit and no GPU.
        MemoryError: Not even one row of the largest width fits.
    """
    widths, is_tuple = _widths_to_try(shapes)
    if not 0 < memory_fraction <= 1:
        raise ValueError(f"memory_fraction must be above 0 and at most 1, got {memory_fraction}")
    smallest, widest = sum(widths[-1]), widths[-1] if is_tuple else widths[-1][0]
    upper = check_count("upper", upper, least=1, hint="give the largest budget to try, in padded tokens")
    if upper < smallest:
        raise ValueError(f"upper must hold one row of {widest} steps, got {upper}: {smallest} tokens at least")
    target = torch.device(device) if device is not None else _accelerator() or torch.device("cpu")
    allowed = int(memory_fraction * _whole_memory(target, memory_limit))

    def fits(tokens: int) -> bool:
        return all(
            _peak(run_shape, tokens // sum(width), width if is_tuple else width[0], target) <= allowed
            for width in widths
        )

    with restored_training(module, optimizer, target):
        if not fits(smallest):
            raise MemoryError(
                f"not even one row of {widest} steps fits in {allowed:,} bytes: cut rows with max_length, use a "
                "smaller model, or raise the limit"
            )
        return largest_that_fits(fits, smallest, upper)


def largest_that_fits(fits: Callable[[int], bool], lower: int, upper: int) -> int:
    """The largest budget that fits, to 5 %: `lower` fits, and is doubled until a budget does not; then bisection.

    Where 3,000 tokens fit, 1,000 is doubled to 2,000; 4,000 fails; 3,000 fits and 3,500, 3,250 and 3,125 do not:

    >>> tried = []
    >>> largest_that_fits(lambda tokens: tried.append(tokens) or tokens <= 3000, 1000, 1 << 24), tried
    (3000, [2000, 4000, 3000, 3500, 3250, 3125])
    """
    failed = lower
    while failed == lower and lower < upper:
        failed = min(2 * lower, upper)
        if fits(failed):
            lower = failed
    while failed - lower > PRECISION * lower:
        middle = (lower + failed) // 2
        lower, failed = (middle, failed) if fits(middle) else (lower, middle)
    return lower


def _accelerator() -> torch.device | None:
    """The accelerator, if there is one."""
    # A build for CUDA names one that is not there, unless it is asked to look.
    return torch.accelerator.current_accelerator(check_available=True)


def _widths_to_try(shapes: Sequence[PaddedShape] | Sequence[int]) -> tuple[list[FieldWidths], bool]:
    """Up to five of the distinct widths, fewest tokens first; and whether the shapes give tuples.

    Raises:
        ValueError: There is no width, one is below 1, or widths are of different numbers of fields.
    """
    all_widths = [shape[1] if isinstance(shape, (tuple, list)) else shape for shape in shapes]
    if len({np.shape(width) for width in all_widths}) > 1:
        raise ValueError(
            f"shapes must name widths of one number of fields, got {all_widths[:5]}: give a sampler's shapes"
        )
    is_tuple = bool(all_widths) and isinstance(all_widths[0], (tuple, list))
    distinct = {tuple(map(int, np.atleast_1d(width))) for width in all_widths}
    widths = sorted(distinct, key=lambda width: (sum(width), width))
    if not widths or min(map(min, widths)) < 1:
        raise ValueError(f"shapes must name widths of at least 1, got {list(shapes)[:5]}: give a sampler's shapes")
    if len(widths) > NUM_WIDTHS:
        # Of 9 widths those of index 0, 2, 4, 6 and 8.
        widths = [widths[index * (len(widths) - 1) // (NUM_WIDTHS - 1)] for index in range(NUM_WIDTHS)]
    return widths, is_tuple


def _whole_memory(device: torch.device, limit: int | None) -> int:
    """Bytes that count as all memory.

    Raises:
        ValueError: There is no limit and no GPU.
    """
    if limit is not None:
        return check_count("memory_limit", limit, least=1, hint="give the bytes that count as all memory")
    if device.type != "cuda":
        raise ValueError(f"memory_limit must be given on {device}: the bytes that the whole process may take")
    return int(torch.cuda.get_device_properties(device).total_memory)


def _peak(run_shape: SizedStep, rows: int, width: int | FieldWidths, device: torch.device) -> int:
    """Run a training step and return its peak memory in bytes; more than any limit if it ran out of memory.

    Raises:
        RuntimeError: The step failed for another reason.
    """
    gc.collect()
    try:
        if device.type != "cuda":
            _forget_peak()
            run_shape(rows, width)
            return peak_resident()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        run_shape(rows, width)
        torch.cuda.synchronize(device)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return sys.maxsize
    return torch.cuda.max_memory_reserved(device)


def peak_resident() -> int:
    """The process's peak resident memory in bytes: since `_forget_peak` on Linux, since its start elsewhere.

    Raises:
        OSError: The system does not tell.
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
    """Reset the process's peak memory to what is resident now; Linux only."""
    if _CLEAR_REFS.exists():
        # "5" sets the peak back to what is resident now (Linux, proc(5)).
        _CLEAR_REFS.write_text("5")
