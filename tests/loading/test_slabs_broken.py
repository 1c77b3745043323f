"""Slabs under odd use, each of which once changed a batch that was in use, lost one, or took all descriptors."""

import os
import pickle
import resource
import threading
from contextlib import suppress
from multiprocessing import reduction
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch.multiprocessing as torch_multiprocessing
from torch.utils.data import DataLoader, Dataset

from collate import LengthTrackedBatch, PadCollator
from collate.tensors.slabs import receiving, sending, slab

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="has no slabs")

ROWS, STEPS = 4, 20_000


class Numbers(Dataset[Any]):
    """Samples of one length, each full of its index."""

    def __init__(self, size: int = 400) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Any:
        return np.full(STEPS, index)


def loader_of(data: Any = None, collate: Any = None, workers: int = 1, **options: Any) -> DataLoader[Any]:
    return DataLoader(data or Numbers(), ROWS, num_workers=workers, collate_fn=collate or PadCollator(), **options)


def holds(padded: Any, number: int) -> bool:
    """Whether values are those of batch `number`."""
    return bool((np.asarray(padded) == ROWS * number + np.arange(ROWS)[:, None]).all())


@pytest.fixture
def as_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process make slabs as a worker does."""
    monkeypatch.setattr(sending, "_pool", sending._Pool())
    monkeypatch.setattr(sending, "get_worker_info", lambda: True)


def collated() -> Any:
    return PadCollator()([np.arange(STEPS)] * ROWS)


@pytest.mark.usefixtures("as_worker")
def test_two_threads_that_send_one_batch_lend_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's queues have a thread each; both once lent the slab, and the first receiver gave it back for both."""
    both = threading.Barrier(2)

    def wait_for_the_other(file: int) -> int:
        # As it should be, the other thread waits elsewhere.
        with suppress(threading.BrokenBarrierError):
            both.wait(0.5)
        return file

    monkeypatch.setattr(reduction, "DupFd", wait_for_the_other)
    batch = collated()
    loans: list[Any] = []
    threads = [threading.Thread(target=lambda: loans.append(sending.lend(batch.padded))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [loan is None for loan in loans].count(True) == 1


@pytest.mark.usefixtures("as_worker")
def test_without_a_descriptor_for_the_receiver_torch_sends(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> None:
        raise OSError(24, "too many open files")

    monkeypatch.setattr(reduction, "DupFd", fail)
    batch = collated()
    assert sending.lend(batch.padded) is None
    monkeypatch.undo()


def _shared(batch: LengthTrackedBatch) -> None:
    batch.padded.share_memory_()


def _queued(batch: LengthTrackedBatch) -> None:
    queue = torch_multiprocessing.get_context("fork").SimpleQueue()
    queue.put(batch)
    queue.get()


@pytest.mark.parametrize("share", [_shared, _queued])
def test_arrays_of_a_batch_that_is_shared_later_never_change(share: Any) -> None:
    """`share_memory_` gives a tensor other memory; arrays that were made before still have the slab's."""
    batches = iter(loader_of())
    first = next(batches)
    kept = [first.padded.numpy(), first.padded.detach().numpy(), np.from_dlpack(first.padded)]
    share(first)
    assert first.padded.is_shared()
    for _ in range(60):
        next(batches)
    assert all(holds(values, 0) for values in [*kept, first.padded])
    del first, batches


class Forking:
    """A collator that forks after every fifth batch."""

    made = 0

    def __call__(self, samples: list[Any]) -> Any:
        batch = PadCollator()(samples)
        self.made += 1
        if self.made % 5 == 0:
            child = os.fork()
            if not child:
                os._exit(0)
            os.waitpid(child, 0)
        return batch


def test_batches_of_a_worker_that_forks_all_come() -> None:
    """The slab of a batch that was forked is retired, which may be before its receiver has it."""
    number = -1
    for number, batch in enumerate(loader_of(collate=Forking(), prefetch_factor=8)):
        # The worker is ahead: the messages behind this one are in the queue.
        if number == 20:
            threading.Event().wait(0.5)
        assert holds(batch.padded, number)
    assert number == 99


def test_slabs_of_workers_that_have_ended_are_left_at_the_next_loader() -> None:
    """Some loaders never give up the processes that they have started."""
    held: list[BaseProcess] = []
    for _ in range(3):
        batches = iter(loader_of())
        held += batches._workers  # type: ignore[attr-defined]
        for number, batch in enumerate(batches):
            assert holds(batch.padded, number)
        del batches, batch
    assert len(receiving._kept) == 1
    receiving._kept.clear()


def open_files() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


@pytest.mark.parametrize("spare", [60, 34])
def test_slabs_leave_descriptors_to_a_loop_and_its_workers(spare: int) -> None:
    """Who keeps all batches may have torch share them by name; slabs once took a descriptor each, to the last."""
    before = open_files()
    strategy, limit = torch_multiprocessing.get_sharing_strategy(), resource.getrlimit(resource.RLIMIT_NOFILE)
    torch_multiprocessing.set_sharing_strategy("file_system")
    # Fewer than the slabs of two workers; more than those of one, or as many.
    resource.setrlimit(resource.RLIMIT_NOFILE, (before + spare, limit[1]))
    try:
        kept = list(loader_of(Numbers(320), workers=2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
        torch_multiprocessing.set_sharing_strategy(strategy)
    assert all(holds(batch.padded, number) for number, batch in enumerate(kept))
    assert open_files() <= before + 4


def message_of(batch: LengthTrackedBatch) -> bytes:
    """What a queue sends of a batch."""
    return bytes(reduction.ForkingPickler.dumps(batch))


@pytest.fixture
def is_kept(as_worker: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all slabs of this process look as if its parent has them mapped, so that their names are sent alone."""
    monkeypatch.setattr(sending, "parent_process", lambda: SimpleNamespace(pid=1))
    monkeypatch.setattr(sending._WorkersSlab, "keeper", 1)


@pytest.mark.usefixtures("is_kept")
def test_a_message_that_is_unpickled_twice_gives_one_batch() -> None:
    """Its memory was used again when the first of the two batches was gone, while the second was in use."""
    message = message_of(collated())
    first = pickle.loads(message)
    with pytest.raises(RuntimeError, match="was received before"):
        pickle.loads(message)
    del first
    with pytest.raises(RuntimeError, match="was received before"):
        pickle.loads(message)
    later = message_of(collated())
    assert len(sending._pool._slabs) == 1
    with pytest.raises(RuntimeError, match="was received before"):
        pickle.loads(message)
    assert pickle.loads(later).padded.shape == (ROWS, STEPS)


@pytest.mark.usefixtures("is_kept")
def test_a_retired_slab_waits_for_a_process_that_opens_it_late() -> None:
    """The worker closed the file of a slab that it had retired after a fork, and a third process could not open it."""
    batch = collated()
    message, values = message_of(batch), batch.padded.tolist()
    slab._begin_fork()
    slab._forks.pop()
    del batch
    assert collated().padded.tolist() == values
    assert len(sending._pool._slabs) == 2
    assert pickle.loads(message).padded.tolist() == values
    assert collated().padded.tolist() == values
    assert len(sending._pool._slabs) == 1


@pytest.mark.usefixtures("as_worker")
def test_loops_in_two_threads_forget_an_ended_worker_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both once found it, and the second one that deleted it failed with its batch."""
    both = threading.Barrier(2)

    class Children(list[Any]):
        def __iter__(self) -> Any:
            # As it should be, the other thread waits elsewhere.
            with suppress(threading.BrokenBarrierError):
                both.wait(0.5)
            return super().__iter__()

    monkeypatch.setattr(receiving, "active_children", Children)
    ended = BaseProcess.__new__(BaseProcess)
    receiving._kept[ended] = []
    batches = [collated(), collated()]
    messages = [message_of(batch) for batch in batches]
    received: list[Any] = []
    threads = [
        threading.Thread(target=lambda message=message: received.append(pickle.loads(message))) for message in messages
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all((batch.padded == batches[0].padded).all() for batch in received)
    assert len(received) == 2
    assert not receiving._kept
    batches.clear()
    received.clear()


def test_a_lease_that_lasts_only_while_another_thread_forks_retires() -> None:
    """Calls before a fork may wait for other threads, one of which may lease; the child has a copy of its tensor."""
    made = slab.Slab.make(1 << 13)
    made.reserve(8)
    slab._begin_fork()
    lease = slab.lease(made, 8, lambda: None)
    del lease
    slab._forks.pop()
    assert made.is_retired


@pytest.mark.usefixtures("as_worker")
def test_values_in_slabs_are_no_views() -> None:
    """Some operations refuse views, such as `detach_`, which batches that torch sends are not."""
    made = PadCollator()([np.ones(100_000, np.float32)] * 2)
    sent = pickle.loads(message_of(made))
    for batch in (made, sent):
        assert not batch.padded._is_view()
        batch.padded.detach_()
    del made, sent
