"""Slabs: a batch from a worker never changes while anything refers to it, whatever becomes of its memory."""

import copy
import errno
import gc
import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as torch_multiprocessing
from corpora import write
from hypothesis import given
from hypothesis import strategies as st
from killed_workers import kills_workers
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from collate import LengthTrackedBatch, PadCollator, VarlenCollator
from collate.operations.serialization import try_to_send
from collate.tensors.slabs import receiving, sending
from collate.tensors.slabs import slab as slabs
from samplers import ShardDataset

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="has no slabs")

ROWS, STEPS = 4, 10_000


def values_of(number: int) -> np.ndarray[Any, Any]:
    """Sample `number`, int64: every value tells whose it is. A batch of four has 320,000 bytes or less."""
    return np.arange(STEPS - number % 7 * 100) * 1_000 + number


class Numbers(Dataset[Any]):
    """Samples as arrays or tensors."""

    def __init__(self, size: int = 10_000, *, as_tensors: bool = False) -> None:
        self.size, self.as_tensors = size, as_tensors

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return torch.from_numpy(values_of(index)) if self.as_tensors else values_of(index)


def loader_of(data: Any = None, collate: Any = None, workers: int = 2, **options: Any) -> DataLoader[Any]:
    return DataLoader(
        Numbers() if data is None else data,
        batch_size=ROWS,
        num_workers=workers,
        collate_fn=PadCollator(padding_value=-1) if collate is None else collate,
        **options,
    )


def expected(number: int) -> Tensor:
    """Padded values of the batch that has samples from `ROWS * number` on, by hand, in order of length."""
    samples = [values_of(ROWS * number + row) for row in range(ROWS)]
    padded = np.full((ROWS, max(map(len, samples))), -1)
    for row, sample in zip(padded, sorted(samples, key=len, reverse=True), strict=True):
        row[: len(sample)] = sample
    return torch.from_numpy(padded)


def slabs_mapped() -> int:
    """Slabs that this process has mapped now."""
    return Path("/proc/self/maps").read_text().count("/memfd:lengthtrack")


def is_in_slab(tensor: Tensor) -> bool:
    """Whether a tensor's memory is a slab's."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(end, 16) for end in line.split()[0].split("-"))
        if first <= tensor.data_ptr() < last:
            return "/memfd:lengthtrack" in line
    return False


@pytest.fixture(autouse=True)
def _nothing_stays_mapped() -> Iterator[None]:
    # A test that failed keeps its batches.
    before = slabs_mapped()
    yield
    # A collection of garbage takes longer than most of these tests.
    if slabs_mapped() > before:
        gc.collect()
    assert slabs_mapped() <= before


class Keeper:
    """A loop that keeps batches, parts and copies of them at random, and what each must hold."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.kept: list[tuple[Any, Tensor]] = []

    def take(self, padded: Tensor, oracle: Tensor) -> None:
        rows = self.random.randrange(ROWS)
        changed = oracle + 1
        self.kept.append(
            self.random.choice(
                [
                    lambda: (padded, oracle),
                    lambda: (padded[rows, 5:], oracle[rows, 5:]),
                    lambda: (padded.t(), oracle.t()),
                    lambda: (padded.view(torch.uint8)[:, -64:], oracle.view(torch.uint8)[:, -64:]),
                    lambda: (padded.numpy()[rows], oracle[rows]),
                    lambda: (memoryview(padded.numpy()), oracle),
                    lambda: (torch.from_dlpack(padded)[:, 0], oracle[:, 0]),
                    lambda: (copy.deepcopy(padded), oracle),
                    lambda: (pickle.loads(pickle.dumps(padded)), oracle),
                    # The loop may write to its batches.
                    lambda: (padded.add_(1), changed),
                    lambda: (padded.share_memory_(), oracle),
                ]
            )()
        )

    def drop(self, most: int) -> None:
        while len(self.kept) > most:
            self.kept.pop(self.random.randrange(len(self.kept)))

    def check(self, some: int) -> None:
        for values, oracle in self.random.sample(self.kept, min(some, len(self.kept))):
            assert np.array_equal(np.asarray(values), oracle.numpy())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("as_tensors", [False, True])
def test_what_a_loop_keeps_of_its_batches_never_changes(seed: int, as_tensors: bool) -> None:
    keeper = Keeper(seed)
    loader = loader_of(Numbers(400, as_tensors=as_tensors))
    addresses = set()
    for number, batch in enumerate(loader):
        assert torch.equal(batch.padded, expected(number))
        assert is_in_slab(batch.padded)
        addresses.add(batch.padded.data_ptr())
        keeper.take(batch.padded, expected(number))
        del batch
        keeper.drop(most=4 + number % 9)
        keeper.check(3)
    keeper.check(20)
    # Slabs were used again: there are twice as many batches.
    assert len(addresses) < 50


events = ["make", "make", "send", "send", "receive", "drop", "view", "fork"]
actions = st.lists(st.tuples(st.sampled_from(events), st.integers(0, 9)), min_size=30, max_size=80)


@given(actions=actions, most=st.integers(1, 4), idle=st.integers(1, 9))
def test_no_order_of_events_overwrites_values_that_are_in_use(
    actions: Sequence[tuple[str, int]], most: int, idle: int
) -> None:
    """A worker and its receiver in one process, so that every order of their steps is tried.

    Free slabs never hold more memory than those that are used.
    """
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sending, "MOST", most)
        patched.setattr(sending, "IDLE", idle)
        patched.setattr(sending, "_pool", sending._Pool())
        in_use: list[tuple[Tensor, int]] = []
        messages: list[tuple[slabs.Loan, int]] = []
        for number, (action, choice) in enumerate(actions):
            if action == "make":
                size = 4096 * (1 + choice)
                made = sending._pool.take(size, (size // 8,), torch.int64)
                kept = sending._pool._slabs
                free = sum(slab.reserved for slab in kept if slab.is_free)
                assert free <= sum(slab.reserved for slab in kept if not slab.is_free) + (size if made is None else 0)
                assert len(kept) <= most
                if made is not None:
                    in_use.append((made.fill_(number), number))
                del made
            elif action == "fork":
                slabs._begin_fork()
                slabs._forks.pop()
            elif action == "receive" and messages:
                loan, value = messages.pop(0)
                in_use.append((receiving.borrow(loan), value))
            elif in_use and action != "receive":
                tensor, value = in_use.pop(choice % len(in_use))
                if action == "view":
                    in_use.append((tensor[choice:], value))
                elif action == "send":
                    loan = sending.lend(tensor)
                    messages += [] if loan is None else [(loan, value)]
                del tensor
            assert all((tensor == value).all() for tensor, value in in_use)
        in_use.clear()
        for loan, _ in messages:
            receiving.borrow(loan)


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_epochs_are_those_of_one_process_however_workers_start(start: str) -> None:
    loader = loader_of(Numbers(96), workers=1, multiprocessing_context=start, persistent_workers=True)
    for _ in range(2):
        for number, batch in enumerate(loader):
            assert is_in_slab(batch.padded)
            assert torch.equal(batch.padded, expected(number))
    loader._iterator = None


def test_batches_of_an_epoch_that_is_left_early_do_not_come_back_changed() -> None:
    loader = loader_of(Numbers(200), persistent_workers=True, prefetch_factor=4)
    kept = []
    for stop in (1, 7, 3, 49):
        for number, batch in enumerate(loader):
            assert torch.equal(batch.padded, expected(number))
            if number == stop:
                kept.append((batch, number))
                break
    del batch
    assert all(torch.equal(batch.padded, expected(number)) for batch, number in kept)
    loader._iterator = None


def test_a_loop_that_keeps_every_batch_gets_every_batch() -> None:
    for number, batch in enumerate(kept := list(loader_of(Numbers(400)))):
        assert torch.equal(batch.padded, expected(number))
    assert any(is_in_slab(batch.padded) for batch in kept)
    assert not is_in_slab(kept[-1].padded)


def collated(number: int) -> LengthTrackedBatch:
    return PadCollator(padding_value=-1)([values_of(ROWS * number + row) for row in range(ROWS)])


@pytest.mark.parametrize("way", ["shards", "varlen", "dict"])
def test_every_collator_fills_slabs_with_the_batch_of_one_process(way: str, tmp_path: Path) -> None:
    samples = [{"tokens": values_of(number), "labels": -values_of(number)} for number in range(32)]
    data: Any = samples
    collate: Any = VarlenCollator(capacity=2 * STEPS) if way == "varlen" else PadCollator(padding_value=-1)
    if way == "shards":
        data = ShardDataset(write(tmp_path, [{"__key__": str(index), **each} for index, each in enumerate(samples)]))
    alone, sent = loader_of(data, collate, workers=0), loader_of(data, collate)
    for one, other in zip(alone, sent, strict=True):
        for name in ("tokens", "labels"):
            values = [batch[name].values if way == "varlen" else batch[name].padded for batch in (one, other)]
            assert torch.equal(*values)
            assert is_in_slab(values[1])


def test_short_rows_that_are_scattered_are_in_slabs_too() -> None:
    data = [np.full(1 + number % 40, number) for number in range(4_000)]
    collate = PadCollator(padding_value=-1)
    alone, sent = (DataLoader(data, 2_000, num_workers=workers, collate_fn=collate) for workers in (0, 1))
    for one, other in zip(alone, sent, strict=True):
        assert torch.equal(one.padded, other.padded)
        assert is_in_slab(other.padded)


def test_a_stateful_loader_uses_slabs() -> None:
    loader = StatefulDataLoader(Numbers(64), ROWS, num_workers=2, collate_fn=PadCollator(padding_value=-1))
    for number, batch in enumerate(loader):
        assert is_in_slab(batch.padded)
        assert torch.equal(batch.padded, expected(number))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.complex64, torch.uint16])
def test_every_dtype_comes_as_it_was_sent(dtype: torch.dtype) -> None:
    rows = [torch.arange(200_000).to(torch.float32).to(dtype) for _ in range(2)]
    (batch,) = DataLoader(rows, 2, num_workers=1, collate_fn=PadCollator(padding_value=0))
    assert is_in_slab(batch.padded)
    assert batch.padded.dtype == dtype
    assert all(torch.equal(row.view(torch.uint8), rows[0].view(torch.uint8)) for row in batch.padded)


def test_a_fork_leaves_the_batch_of_the_child_alone() -> None:
    batches = iter(loader_of(Numbers(800)))
    first = next(batches)
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        os.close(writes)
        # Until the parent has dropped its batch, and has had many others.
        os.read(reads, 1)
        # By NumPy: torch's threads do not come with a fork.
        os._exit(0 if np.array_equal(first.padded.numpy(), expected(0).numpy()) else 1)
    os.close(reads)
    del first
    for _ in range(100):
        next(batches)
    os.close(writes)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_batch_that_dies_in_a_forked_process_is_the_parents_still() -> None:
    batches = iter(loader_of(Numbers(800)))
    first = next(batches)
    child = os.fork()
    if not child:
        del first
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for _ in range(100):
        next(batches)
    assert torch.equal(first.padded, expected(0))


def kill_and_go_on(batches: Any) -> None:
    for worker in batches._workers:
        os.kill(worker.pid, signal.SIGKILL)
    list(batches)


@kills_workers
def test_a_batch_survives_its_workers_and_its_loader() -> None:
    loader = loader_of(Numbers(800))
    batches = iter(loader)
    kept = [next(batches) for _ in range(3)]
    with pytest.raises(RuntimeError, match="exited unexpectedly|killed"):
        kill_and_go_on(batches)
    del batches, loader
    gc.collect()
    for number, batch in enumerate(kept):
        assert torch.equal(batch.padded, expected(number))


def _keep_first(inbox: Any, outbox: Any) -> None:
    """A third process: keeps a batch while others come."""
    first = inbox.get()
    for batch in iter(inbox.get, None):
        assert batch.padded.shape[0] == ROWS
    # By NumPy: torch's threads do not come with a fork.
    outbox.put(np.array_equal(first.padded.numpy(), expected(0).numpy()))


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_third_process_may_have_the_batch(start: str) -> None:
    context = torch_multiprocessing.get_context(start)
    inbox, outbox = context.Queue(), context.Queue()
    other = context.Process(target=_keep_first, args=(inbox, outbox))
    other.start()
    for batch in loader_of(Numbers(160)):
        inbox.put(batch)
    inbox.put(None)
    assert outbox.get(timeout=120)
    other.join()
    del batch


class Tapped:
    """A collator that sends every batch to another process as well."""

    def __init__(self, inbox: Any) -> None:
        self.inbox = inbox

    def __call__(self, samples: list[Any]) -> LengthTrackedBatch:
        batch = PadCollator(padding_value=-1)(samples)
        # Sometimes the other process is the first, sometimes it is the only one.
        self.inbox.put(batch)
        return batch if len(samples) == ROWS else PadCollator(padding_value=-1)(samples)


def test_a_worker_may_send_a_batch_to_two_processes() -> None:
    context = torch_multiprocessing.get_context("fork")
    inbox, outbox = context.Queue(), context.Queue()
    other = context.Process(target=_keep_first, args=(inbox, outbox))
    other.start()
    for number, batch in enumerate(loader_of(Numbers(160), Tapped(inbox), workers=1)):
        assert torch.equal(batch.padded, expected(number))
    inbox.put(None)
    assert outbox.get(timeout=120)
    other.join()
    del batch


class Cached(IterableDataset[Any]):
    """Sends two batches again and again, which it keeps."""

    def __iter__(self) -> Iterator[LengthTrackedBatch]:
        made = [collated(number) for number in range(2)]
        for number in range(40):
            yield made[number % 2]


def test_a_worker_may_send_a_batch_again() -> None:
    kept = list(DataLoader(Cached(), batch_size=None, num_workers=1))
    assert len(kept) == 40
    for number, batch in enumerate(kept):
        assert torch.equal(batch.padded, expected(number % 2))


class Twice:
    """A batch that comes with parts of itself, and with other batches of the same values."""

    def __call__(self, samples: list[Any]) -> dict[str, Any]:
        batch = PadCollator(padding_value=-1)(samples)
        same = batch.with_padded(batch.padded)
        return {"batch": batch, "same": same, "bare": batch.padded, "moved": batch.map(torch.neg)}


def test_batches_that_share_values_all_come() -> None:
    for number, sent in enumerate(loader_of(Numbers(80), Twice())):
        padded = expected(number)
        for name in ("batch", "same"):
            assert torch.equal(sent[name].padded, padded)
        assert torch.equal(sent["bare"], padded)
        assert torch.equal(sent["moved"].padded[padded >= 0], -padded[padded >= 0])


class Failing:
    """A collator that fails after the batch is made."""

    def __call__(self, samples: list[Any]) -> LengthTrackedBatch:
        batch = PadCollator(padding_value=-1)(samples)
        if int(batch.padded[0, 0]) % 3:
            raise ValueError("none of this batch")
        return batch


def test_a_batch_that_fails_gives_its_slab_back() -> None:
    batches = iter(loader_of(Numbers(800), Failing(), workers=1))
    addresses = set()
    for number in range(200):
        try:
            batch = next(batches)
        except ValueError:
            continue
        assert torch.equal(batch.padded, expected(number))
        addresses.add(batch.padded.data_ptr())
        del batch
    # An error's traceback refers to itself and to the iterator; a collection of garbage would wait for the worker.
    batches._shutdown_workers()  # type: ignore[attr-defined]
    assert len(addresses) <= 8


def test_a_trial_of_whether_a_batch_can_be_sent_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_pool", sending._Pool())
    monkeypatch.setattr(sending, "get_worker_info", lambda: True)
    batch = collated(0)
    try_to_send([batch])
    loan = sending.lend(batch.padded)
    assert loan is not None
    assert sending.lend(batch.padded) is None
    receiving.borrow(loan)
    del batch, loan


@pytest.mark.parametrize("call", ["posix_fallocate", "memfd_create"])
def test_without_shared_memory_batches_come_as_before(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, call, fail)
    for number, batch in enumerate(loader_of(Numbers(80))):
        assert not is_in_slab(batch.padded)
        assert torch.equal(batch.padded, expected(number))


def test_a_system_without_slabs_sends_batches_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_HAS_SLABS", False)
    for number, batch in enumerate(loader_of(Numbers(80))):
        assert not is_in_slab(batch.padded)
        assert torch.equal(batch.padded, expected(number))


def test_outside_of_a_worker_and_for_small_values_there_is_no_slab() -> None:
    assert not is_in_slab(collated(0).padded)
    data = [torch.arange(10)] * 8
    for batch in DataLoader(data, 4, num_workers=1, collate_fn=PadCollator()):
        assert not is_in_slab(batch.padded)


def test_a_tensor_that_requires_gradients_still_does_when_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_pool", sending._Pool())
    monkeypatch.setattr(sending, "get_worker_info", lambda: True)
    leaf = PadCollator()([np.ones(100_000, np.float32), np.ones(3, np.float32)])
    leaf = leaf.with_padded(leaf.padded.requires_grad_())
    kept = ForkingPickler.loads(ForkingPickler.dumps(leaf))
    assert is_in_slab(kept.padded)
    assert kept.padded.requires_grad
    with pytest.raises(RuntimeError, match="resize"):
        kept.padded.detach().resize_(1 << 20)
    del leaf, kept


def test_a_slab_that_is_idle_is_given_back_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    """One large batch among small ones does not keep its memory until the end."""
    monkeypatch.setattr(sending, "IDLE", 16)
    sizes = [2_000_000 if number == 3 else 80_000 for number in range(60)]
    batches = iter(DataLoader([torch.zeros(size) for size in sizes], 1, num_workers=1, collate_fn=PadCollator()))
    large = [_largest_slab() for _ in batches]
    assert max(large) >= 8_000_000
    assert large[-1] < 1_000_000
    del batches


def test_slabs_can_be_switched_off() -> None:
    code = "from collate.tensors.slabs import sending; print(sending._HAS_SLABS)"
    for value, expected_output in (("0", "False"), ("1", "True")):
        environment = {**os.environ, "LENGTHTRACK_SLABS": value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected_output


def _largest_slab() -> int:
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if "/memfd:lengthtrack" in line]
    ends = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
    return max((last - first for first, last in ends), default=0)


def test_a_slab_that_is_gone_is_an_error_that_says_so() -> None:
    made = slabs.Slab.make(1 << 13)
    made.reserve(8)
    facts = (torch.int64, (1,), False)
    with pytest.raises(RuntimeError, match="memory of a batch from worker .* cannot be opened"):
        receiving.borrow(slabs.Loan(b"another token...", 0, os.getpid(), made.file, None, *facts))
    with pytest.raises(RuntimeError, match="memory of a batch from worker .* cannot be opened"):
        receiving.borrow(slabs.Loan(made.token, 0, os.getpid(), 1 << 20, None, *facts))
    assert receiving.borrow(slabs.Loan(made.token, 0, os.getpid(), made.file, None, *facts)).shape == (1,)
    del made


def test_the_module_loads_where_the_system_has_none_of_this() -> None:
    code = (
        "import os\n"
        "for name in ('memfd_create', 'posix_fallocate'):\n"
        "    delattr(os, name)\n"
        "from collate.tensors.slabs.sending import new_values\n"
        "import torch\n"
        "print(tuple(new_values((3,), torch.int64).shape))"
    )
    reads, writes = os.pipe()
    pid = os.posix_spawn(
        sys.executable, [sys.executable, "-c", code], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, writes, 1)]
    )
    os.close(writes)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert os.read(reads, 100) == b"(3,)\n"
    os.close(reads)
