"""DevicePrefetcher: nothing lost, nothing counted before it is handed over, streams in the right order."""

from collections import namedtuple

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from collate import DevicePrefetcher, LengthTrackedBatch, PadCollator
from collate import prefetch as module

SAMPLES = [{"x": torch.full((n % 5,), n), "n": n} for n in range(23)]
Pair = namedtuple("Pair", "left right")


def loader(kind=DataLoader, workers=0):
    return kind(SAMPLES, batch_size=4, num_workers=workers, collate_fn=PadCollator(sort_by=False))


class Recorder:
    """Stands in for streams and events: writes down what is asked of them, and copies at once."""

    def __init__(self, device):
        self.log = []
        self.sent = 0

    def send(self, batch):
        self.log.append(("send", self.sent))
        self.sent += 1
        return batch, self.sent - 1

    def receive(self, batch, arrived):
        self.log.append(("receive", arrived))


@pytest.fixture
def recorders(monkeypatch):
    """Let the look-ahead run on a machine without an accelerator."""
    made = []

    def make(device):
        made.append(Recorder(device))
        return made[-1]

    monkeypatch.setattr(module, "Transfer", make)
    return made


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_epoch_gives_what_the_loader_gives(device, workers, recorders):
    with DevicePrefetcher(loader(workers=workers), device) as batches:
        assert len(batches) == 6
        for _ in range(2):
            assert [batch["n"].tolist() for batch in batches] == [
                list(range(start, min(start + 4, 23))) for start in range(0, 23, 4)
            ]


@pytest.mark.parametrize("depth", [0, 1, 3, 99])
def test_at_most_depth_batches_are_on_the_way_and_each_is_received_before_use(depth, recorders):
    handed = 0
    for _ in DevicePrefetcher(loader(), "meta", depth=depth):
        log = recorders[0].log
        sent = [place for what, place in log if what == "send"]
        assert log[-1] == ("receive", handed)
        assert len(sent) - handed <= depth + 1
        handed += 1
    assert handed == 6


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_state_does_not_count_what_is_on_the_way(device, workers, recorders):
    whole = [batch["n"].tolist() for batch in loader(StatefulDataLoader, workers)]
    for cut in range(1, 6):
        batches = DevicePrefetcher(loader(StatefulDataLoader, workers), device)
        running = iter(batches)
        for _ in range(cut):
            next(running)
        state = batches.state_dict()
        batches.close()
        again = DevicePrefetcher(loader(StatefulDataLoader, workers), device)
        again.load_state_dict(state)
        assert [batch["n"].tolist() for batch in again] == whole[cut:]


def test_a_loader_without_a_state_is_named():
    with pytest.raises(TypeError, match="a DataLoader has no state: use a StatefulDataLoader"):
        DevicePrefetcher(loader(), "cpu").state_dict()


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_after_an_early_break_the_next_epoch_is_whole(device, recorders):
    batches = DevicePrefetcher(loader(), device)
    for _ in batches:
        break
    assert len(list(batches)) == 6


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_error_of_the_loader_passes_through(device, recorders):
    def broken():
        yield 1
        raise OSError("disk")

    batches = iter(DevicePrefetcher(broken(), device, depth=0))
    assert next(batches) == 1
    with pytest.raises(OSError, match="disk"):
        next(batches)


def test_the_loader_s_own_parts_stay_reachable_and_nothing_else_is_invented():
    wrapped = loader()
    batches = DevicePrefetcher(wrapped, "cpu")
    assert batches.dataset is wrapped.dataset
    assert batches.batch_sampler is wrapped.batch_sampler
    assert batches.sampler is wrapped.sampler
    assert not hasattr(DevicePrefetcher([1], "cpu"), "sampler")
    assert not hasattr(batches, "set_epoch")


def test_containers_keep_their_kind_and_other_objects_pass_untouched():
    batch = {
        "a": (torch.ones(1), "text"),
        "b": Pair([torch.ones(2)], None),
        "c": LengthTrackedBatch(torch.ones(1, 2), [1]),
    }
    moved = module.moved_to(batch, torch.device("cpu"))
    assert type(moved["b"]) is Pair
    assert moved["a"][1] == "text"
    assert moved["b"].right is None
    assert isinstance(moved["c"], LengthTrackedBatch)


@pytest.mark.parametrize(("depth", "kind"), [(-1, ValueError), (True, TypeError), (1.0, TypeError)])
def test_a_senseless_depth_is_refused(depth, kind):
    with pytest.raises(kind, match="depth must"):
        DevicePrefetcher([], "cpu", depth=depth)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_hold_what_the_loader_gave():
    expected = list(loader())
    for batch, wanted in zip(DevicePrefetcher(loader(), "cuda"), expected, strict=True):
        assert batch["x"].device.type == "cuda"
        assert batch["x"].lengths.device.type == "cpu"
        torch.testing.assert_close(batch["x"].padded.cpu(), wanted["x"].padded)
        assert torch.equal(batch["x"].mask.cpu(), wanted["x"].mask)
