"""DevicePrefetcher: nothing lost, nothing counted before it is handed over, streams in the right order."""

import copy
import gc
import itertools
import pickle
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import ref

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from collate import DevicePrefetcher, LengthTrackedBatch, PadCollator
from collate.operations.construct import trusted_batch
from collate.training import prefetch as module
from samplers import LengthBucketBatchSampler

SAMPLES = [{"x": torch.full((n % 5,), n), "n": n} for n in range(23)]
Pair = namedtuple("Pair", "left right")


def loader(kind: Any = DataLoader, workers: int = 0) -> Any:
    return kind(SAMPLES, batch_size=4, num_workers=workers, collate_fn=PadCollator(sort_by=False))


def planned_loader(kind: Any = DataLoader, workers: int = 0) -> Any:
    sampler = LengthBucketBatchSampler([len(sample["x"]) for sample in SAMPLES], batch_size=4)
    return kind(SAMPLES, batch_sampler=sampler, num_workers=workers, collate_fn=PadCollator(sort_by=False))


def ids(batches: Any) -> Any:
    return [batch["n"].tolist() for batch in batches]


def take(batches: Any, count: Any) -> Any:
    return ids(itertools.islice(batches, count))


class Recorder:
    """Stands in for streams and events: writes down what is asked of them, and copies at once."""

    def __init__(self, device: Any) -> None:
        self.log = []
        self.sent = 0

    def send(self, batch: Any) -> Any:
        self.log.append(("send", self.sent))
        self.sent += 1
        return batch, self.sent - 1

    def receive(self, batch: Any, arrived: Any) -> None:
        self.log.append(("receive", arrived))


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the look-ahead run on a machine without an accelerator."""
    made = []

    def make(device: Any) -> Any:
        made.append(Recorder(device))
        return made[-1]

    monkeypatch.setattr(module, "CopyStream", make)
    return made


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_epoch_gives_what_the_loader_gives(device: str, workers: int, recorders: Any) -> None:
    with DevicePrefetcher(loader(workers=workers), device) as batches:
        assert len(batches) == 6
        for _ in range(2):
            assert [batch["n"].tolist() for batch in batches] == [
                list(range(start, min(start + 4, 23))) for start in range(0, 23, 4)
            ]


@pytest.mark.parametrize("depth", [0, 1, 3, 99])
def test_at_most_depth_batches_are_on_the_way_and_are_received_first(depth: int, recorders: Any) -> None:
    handed = 0
    for _ in DevicePrefetcher(loader(), "meta", depth=depth):
        log = recorders[0].log
        sent = [index for what, index in log if what == "send"]
        assert log[-1] == ("receive", handed)
        assert len(sent) - handed <= depth + 1
        handed += 1
    assert handed == 6


KINDS = [
    pytest.param(loader, StatefulDataLoader, id="stateful"),
    pytest.param(planned_loader, StatefulDataLoader, id="stateful, planned"),
    pytest.param(planned_loader, DataLoader, id="plain, planned"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("make", "kind"), KINDS)
def test_a_state_does_not_count_what_is_on_the_way(
    make: Callable[..., Any], kind: type[Any], device: str, workers: int, recorders: Any
) -> None:
    whole = make(kind)
    epochs = ids(whole), ids(whole)
    for cut in (1, 3, 5):
        batches = DevicePrefetcher(make(kind, workers), device)
        assert take(iter(batches), cut) == epochs[0][:cut]
        state = batches.state_dict()
        batches.close()
        again = DevicePrefetcher(make(kind, workers), device)
        again.load_state_dict(state)
        assert ids(again) == epochs[0][cut:]
        assert ids(again) == epochs[1]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("make", "kind"), KINDS)
def test_a_pass_that_was_resumed_is_stopped_and_resumed_again(
    make: Callable[..., Any], kind: type[Any], device: str, recorders: Any
) -> None:
    whole, seen, state = ids(make(kind)), [], None
    while len(seen) < len(whole):
        batches = DevicePrefetcher(make(kind), device, depth=3)
        if state is not None:
            batches.load_state_dict(state)
        seen += take(iter(batches), 2)
        state = batches.state_dict()
    assert seen == whole


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(("make", "kind"), KINDS)
def test_between_two_epochs_the_state_leads_to_the_next(
    make: Callable[..., Any], kind: type[Any], device: str, workers: int, recorders: Any
) -> None:
    whole = make(kind)
    epochs = ids(whole), ids(whole)
    batches = DevicePrefetcher(make(kind, workers), device)
    assert ids(batches) == epochs[0]
    again = DevicePrefetcher(make(kind, workers), device)
    again.load_state_dict(batches.state_dict())
    # The sampler's own position is the end of its epoch, the stateful loader's the beginning of the next.
    assert (ids(again) or ids(again)) == epochs[1]
    assert ids(batches) == epochs[1]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_before_the_first_batch_the_state_is_the_one_that_was_loaded(device: str, recorders: Any) -> None:
    begun = planned_loader()
    sampler = begun.batch_sampler
    next(iter(begun))
    batches = DevicePrefetcher(planned_loader(), device)
    batches.load_state_dict(sampler.position(1))
    assert batches.state_dict() == sampler.position(1)


def test_a_plain_loader_s_position_serves_any_number_of_workers(recorders: Any) -> None:
    whole = ids(planned_loader())
    batches = DevicePrefetcher(planned_loader(workers=2), "meta")
    take(iter(batches), 2)
    again = DevicePrefetcher(planned_loader(), "cpu")
    again.load_state_dict(batches.state_dict())
    assert ids(again) == whole[2:]


class Counting(IterableDataset):
    """A dataset that hands out its own state, and keeps changing it."""

    def __init__(self) -> None:
        self.state = {"next": 0}

    def __iter__(self) -> Iterator[Any]:
        while self.state["next"] < 9:
            self.state["next"] += 1
            yield {"n": torch.tensor(self.state["next"])}

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = dict(state)


def test_a_state_that_the_dataset_goes_on_to_change_is_kept_as_it_was(recorders: Any) -> None:
    batches = DevicePrefetcher(StatefulDataLoader(Counting(), batch_size=None), "meta")
    assert take(iter(batches), 4) == [1, 2, 3, 4]
    again = DevicePrefetcher(StatefulDataLoader(Counting(), batch_size=None), "meta")
    again.load_state_dict(batches.state_dict())
    assert ids(again) == [5, 6, 7, 8, 9]


def test_a_loader_without_a_state_is_named() -> None:
    with pytest.raises(TypeError, match="a DataLoader has no state, .* use a StatefulDataLoader"):
        DevicePrefetcher(loader(), "cpu").state_dict()
    with pytest.raises(TypeError, match="a list has no state"):
        DevicePrefetcher([1], "cpu").load_state_dict({})


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("workers", [0, 2])
def test_after_an_early_break_the_next_epoch_is_whole(device: str, workers: int, recorders: Any) -> None:
    batches = DevicePrefetcher(loader(workers=workers), device)
    for _ in batches:
        break
    assert len(list(batches)) == 6


def test_what_was_on_the_way_is_dropped_with_its_iterator(recorders: Any) -> None:
    alive = []

    class Fresh:
        def __iter__(self) -> Iterator[Any]:
            for _ in range(6):
                alive.append(ref(batch := torch.ones(1)))
                yield batch

    batches = DevicePrefetcher(Fresh(), "meta", depth=3)
    for _batch in batches:
        assert [tensor() is not None for tensor in alive] == [True] * 4
        break
    del _batch
    gc.collect()
    assert [tensor() is not None for tensor in alive] == [False] * 4


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_closed_pass_gives_nothing_more(device: str, recorders: Any) -> None:
    with DevicePrefetcher(loader(), device) as batches:
        running = iter(batches)
        next(running)
    assert list(running) == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("taken", [0, 1, 5])
def test_a_pass_that_another_one_closes_raises_and_does_not_just_end(device: str, taken: int, recorders: Any) -> None:
    """Red before: a `zip` of a prefetcher with itself gave nothing, a loop within a loop ended both, without a word."""
    batches = DevicePrefetcher(loader(), device)
    earlier = iter(batches)
    assert len(take(earlier, taken)) == taken
    later = iter(batches)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"ended after {taken} batches, because another pass .* began"):
            next(earlier)
    assert len(list(later)) == 6
    assert list(later) == []
    with pytest.raises(RuntimeError, match="another pass"):
        list(zip(batches, batches, strict=True))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_pass_that_has_given_all_stays_at_its_end_when_another_begins(device: str, recorders: Any) -> None:
    batches = DevicePrefetcher(loader(), device)
    first = iter(batches)
    assert len(list(first)) == 6
    assert len(list(batches)) == 6
    assert list(first) == []


class Failing:
    """A loader whose second and fourth batch fail, and which continues after that."""

    def __iter__(self) -> Any:
        self.number = 0
        return self

    def __next__(self) -> Any:
        self.number += 1
        if self.number in (2, 4):
            raise OSError(f"disk {self.number}")
        if self.number == 6:
            raise StopIteration
        return self.number


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("depth", [0, 1, 2, 9])
def test_an_error_of_the_loader_comes_in_its_place_and_need_not_be_the_end(
    device: str, depth: int, recorders: Any
) -> None:
    seen, batches = [], iter(DevicePrefetcher(Failing(), device, depth=depth))
    for _ in range(5):
        try:
            seen.append(next(batches))
        except OSError as error:
            seen.append(str(error))
    assert seen == [1, "disk 2", 3, "disk 4", 5]
    assert list(batches) == []


def broken() -> Iterator[Any]:
    yield torch.zeros(2)
    raise OSError("disk")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_error_that_ends_the_loader_passes_through(device: str, recorders: Any) -> None:
    batches = iter(DevicePrefetcher(broken(), device))
    assert len(next(batches)) == 2
    with pytest.raises(OSError, match="disk"):
        next(batches)
    assert list(batches) == []


def test_on_the_cpu_batches_are_the_loader_s_own_and_none_is_taken_early() -> None:
    given = [object() for _ in range(5)]
    taken = []
    source = (taken.append(batch) or batch for batch in given)
    for index, batch in enumerate(DevicePrefetcher(source, "cpu", depth=9)):
        assert batch is given[index]
        assert len(taken) == index + 1


def test_the_loader_s_parts_stay_reachable_and_nothing_is_invented() -> None:
    wrapped = loader()
    batches = DevicePrefetcher(wrapped, "cpu")
    assert batches.dataset is wrapped.dataset
    assert batches.batch_sampler is wrapped.batch_sampler
    assert batches.sampler is wrapped.sampler
    assert not hasattr(DevicePrefetcher([1], "cpu"), "sampler")
    assert not hasattr(batches, "set_epoch")


def test_containers_keep_their_kind_and_other_objects_pass_untouched() -> None:
    batch = OrderedDict(
        a=(torch.ones(1), "text"),
        b=Pair([torch.ones(2)], None),
        c=LengthTrackedBatch(torch.ones(1, 2), [1]),
        d=pack_sequence([torch.ones(2)]),
    )
    moved = module.moved_to(batch, torch.device("meta"))
    assert type(moved) is OrderedDict
    assert batch["a"][0].is_cpu
    assert moved["a"][0].is_meta
    assert type(moved["b"]) is Pair
    assert moved["a"][1] == "text"
    assert moved["b"].right is None
    assert moved["c"].device.type == "meta"
    assert moved["c"].lengths.is_cpu
    assert isinstance(moved["d"], PackedSequence)
    assert moved["d"].data.is_meta


class Stream:
    """Stands in for a stream: writes down what it is told, and what others do while it is the current one."""

    current = None

    def __init__(self, device: Any, log: Any, name: str) -> None:
        self.device, self.log, self.name, self.events = device, log, name, 0

    def __enter__(self) -> None:
        self.before, Stream.current = Stream.current, self

    def __exit__(self, *error: Any) -> None:
        Stream.current = self.before

    def record_event(self) -> Any:
        self.events += 1
        self.log.append((self.name, "record", self.events))
        return self.events

    def wait_event(self, event: Any) -> None:
        self.log.append((self.name, "wait", event))


class Parcel:
    """A batch that writes down what is done with it, and on which stream."""

    def __init__(self, number: Any, log: Any) -> None:
        self.number, self.log, self.values = number, log, torch.zeros(1)

    def pin_memory(self) -> Any:
        self.log.append(("pin", self.number))
        return self

    def to(self, device: Any, *, non_blocking: Any) -> Any:
        self.log.append((Stream.current.name, "copy", self.number, str(device), non_blocking))
        return self

    def record_stream(self, stream: Any) -> None:
        self.log.append((stream.name, "uses", self.number))


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A side stream and the current one, that log what happens."""
    log = []
    sides = []
    current = Stream(torch.device("cuda:0"), log, "current")

    def open_stream(device: Any) -> Any:
        sides.append(Stream(torch.device("cuda:0"), log, "side"))
        return sides[-1]

    monkeypatch.setattr(Stream, "current", current)
    monkeypatch.setattr(torch, "Stream", open_stream)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: current)
    return log, sides, current


def test_a_batch_is_pinned_copied_awaited_and_claimed_before_its_use(streams: Any) -> None:
    log, _, _ = streams
    batches = DevicePrefetcher([Parcel(number, log) for number in (1, 2, 3)], "cuda", depth=1)
    for batch in batches:
        log.append(("step", batch.number))

    def sending(number: Any) -> Any:
        return [("pin", number), ("side", "copy", number, "cuda:0", True), ("side", "record", number)]

    def handing(number: Any) -> Any:
        return [("current", "wait", number), ("current", "uses", number), ("step", number)]

    assert log == [*sending(1), *sending(2), *handing(1), *sending(3), *handing(2), *handing(3)]


def test_all_epochs_share_one_stream(streams: Any) -> None:
    log, sides, _ = streams
    batches = DevicePrefetcher([Parcel(1, log)], "cuda")
    for _ in range(3):
        list(batches)
    assert len(sides) == 1


def test_an_accelerator_of_one_stream_waits_for_nothing(streams: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    log, _, current = streams
    monkeypatch.setattr(torch, "Stream", lambda device: current)
    list(DevicePrefetcher([Parcel(1, log)], "cuda"))
    assert not any(entry[1] in ("wait", "uses") for entry in log)


class OnDevice(Tensor):
    """A tensor that says it is on a device, and who uses it."""

    is_cpu = False

    def record_stream(self, stream: Any) -> None:
        stream.append(self)


@dataclass(slots=True)
class Slotted:
    """A batch of a user's own, without `record_stream`."""

    values: Tensor
    more: dict[str, Tensor]

    def to(self, device: Any, *, non_blocking: Any) -> Any:
        return self


class Loose:
    """Another one."""

    def __init__(self, values: Any) -> None:
        self.values, self.name = values, "loose"

    def to(self, device: Any, *, non_blocking: Any) -> Any:
        return self


def test_every_tensor_on_the_device_is_claimed_wherever_it_is() -> None:
    def on_device() -> Any:
        return torch.zeros(1).as_subclass(OnDevice)

    data, tracked, indices = on_device(), on_device(), on_device()
    parts = [on_device() for _ in range(6)]
    packed = tuple.__new__(PackedSequence, (data, torch.tensor([1]), indices, None))
    batch = {
        "packed": packed,
        "pair": Pair(parts[0], [parts[1], "text", torch.zeros(1)]),
        "own": [Slotted(parts[2], {"x": parts[3]}), Loose(parts[4])],
        "order": OrderedDict(a=parts[5]),
        "number": 3,
    }
    claimed = []
    module.record_stream(batch, claimed)
    assert {id(tensor) for tensor in claimed} == {id(tensor) for tensor in (data, indices, *parts)}
    claimed.clear()
    mask = on_device()
    trusted_batch(
        LengthTrackedBatch,
        tracked,
        torch.tensor([1]),
        mask=mask,
        permutation=torch.tensor([0]),
        padding_value=0,
    ).record_stream(claimed)
    assert [id(tensor) for tensor in claimed] == [id(tracked), id(mask)]


def test_what_is_on_the_host_is_pinned_and_what_is_on_a_device_is_not() -> None:
    device, host = torch.device("cuda"), torch.zeros(1, 2)
    assert module._can_be_pinned(host, device)
    assert module._can_be_pinned(LengthTrackedBatch(host, [1]), device)
    assert module._can_be_pinned(pack_sequence([host]), device)
    assert module._can_be_pinned(Parcel(1, []), device)
    assert not module._can_be_pinned(Loose(host), device)
    assert not module._can_be_pinned(host.as_subclass(OnDevice), device)
    assert not module._can_be_pinned(pack_sequence([host]).to("meta"), device)
    assert not module._can_be_pinned(host, torch.device("cpu"))


@pytest.mark.parametrize(("depth", "kind"), [(-1, ValueError), (True, TypeError), (1.0, TypeError)])
def test_a_senseless_depth_is_refused(depth: bool | float, kind: type[Exception]) -> None:
    with pytest.raises(kind, match="depth must"):
        DevicePrefetcher([], "cpu", depth=depth)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_state_follows_set_epoch_and_seek(device: str, recorders: Any) -> None:
    # Red: it still told of the pass before.
    batches = DevicePrefetcher(planned_loader(), device)
    whole = ids(batches)
    batches.batch_sampler.set_epoch(5)
    restored = DevicePrefetcher(planned_loader(), device)
    restored.load_state_dict(batches.state_dict())
    assert ids(restored) == ids(batches)
    batches.batch_sampler.seek(planned_loader().batch_sampler.position(2))
    restored.load_state_dict(batches.state_dict())
    assert ids(restored) == whole[2:]


def test_each_state_is_a_new_one() -> None:
    # Red: who changed one changed the next.
    batches = DevicePrefetcher(planned_loader(), "cpu")
    next(iter(batches))
    state = batches.state_dict()
    state.clear()
    assert batches.state_dict()["batches"] == 1


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_a_prefetcher_that_has_begun_can_be_copied(how: Callable[..., Any]) -> None:
    # Red: a pass that runs cannot be pickled.
    batches = DevicePrefetcher(planned_loader(), "cpu")
    running = iter(batches)
    next(running)
    copied = how(batches)
    assert copied.state_dict() == batches.state_dict()
    assert sum(map(len, ids(copied))) == len(SAMPLES)
    assert len(list(running)) == len(batches) - 1


def test_a_new_prefetcher_of_a_sampler_that_was_used_tells_of_what_comes() -> None:
    # Red: it told of the start of the pass that another loader had taken.
    running = planned_loader()
    ids(running)
    second = DevicePrefetcher(planned_loader(), "cpu")
    second.batch_sampler.set_epoch(1)
    restored = DevicePrefetcher(planned_loader(), "cpu")
    restored.load_state_dict(DevicePrefetcher(running, "cpu").state_dict())
    assert ids(restored) == ids(second)
