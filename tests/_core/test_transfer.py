"""What waits for what in ``_core/transfer.py``, on streams and events that only keep the order.

Streams and events stand in for CUDA's and hold vector clocks; a dispatch mode notes which op on
which stream reads and writes which memory. Two accesses to one memory, one of them a write, must
have an order that every schedule of the streams keeps: nothing else is a proof without a card.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import combinations
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tailor_fast._core.transfer import (
    Outbox,
    _stream_of_this_thread,
    own_stream,
    page_locked,
    panels,
    to_device,
)

CARD = torch.device("meta")  # stands for a card: another device, without memory
HOST = "host"
Clock = dict[str, int]


def later(one: Clock, other: Clock) -> Clock:
    return {key: max(one.get(key, 0), other.get(key, 0)) for key in one | other}


class Timeline:
    """A stream, or the host's thread."""

    def __init__(self, name: str) -> None:
        self.name, self.clock, self.device = name, Clock(), CARD

    def step(self) -> Clock:
        self.clock = later(self.clock, {self.name: self.clock.get(self.name, 0) + 1})
        return self.clock


class Card(TorchDispatchMode):
    """Stands for ``torch.cuda`` while it is entered."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        card = self
        self.host, self.default = Timeline(HOST), Timeline("default")
        self.current: Timeline = self.default
        self.made = 0
        # (memory, written, who, its time there, all that it knows of, offset that was read)
        self.seen: list[tuple[int, bool, str, int, Clock, int]] = []
        self.home: dict[int, str] = {}  # the stream that memory was made on
        self.kept: set[tuple[int, str]] = set()  # memory, and a stream that must be done with it
        self.alive: list[torch.UntypedStorage] = []  # so that no memory is taken for another

        class Stream(Timeline):
            def __init__(self, device: torch.device) -> None:
                card.made += 1
                super().__init__(f"stream {card.made}")
                self.device = device

            def wait_event(self, event: Event) -> None:
                self.clock = later(self.clock, event.clock)

            def wait_stream(self, other: Timeline) -> None:
                self.clock = later(self.clock, later(other.clock, card.host.clock))

            def synchronize(self) -> None:
                card.host.clock = later(card.host.clock, self.clock)

        class Event:
            def __init__(self) -> None:
                self.clock = Clock()

            def record(self, stream: Timeline) -> None:
                self.clock = later(stream.clock, card.host.clock)

            def synchronize(self) -> None:
                card.host.clock = later(card.host.clock, self.clock)

        @contextmanager
        def stream(chosen: Timeline) -> Iterator[None]:
            before, card.current = card.current, chosen
            yield
            card.current = before

        self.default.wait_event = lambda event: Stream.wait_event(self.default, event)  # type: ignore[attr-defined]  # a stream like the others
        for name, fake in {"Stream": Stream, "Event": Event, "stream": stream}.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _device=None: card.current)

    def note(self, tensor: torch.Tensor, *, write: bool, who: Timeline) -> None:
        storage = tensor.untyped_storage()
        self.alive.append(storage)
        if who is not self.host:
            who.clock = later(who.clock, self.host.clock)  # the host has launched it
        time = who.step()
        place = (storage._cdata, write, who.name, time[who.name], dict(time))
        self.seen.append((*place, tensor.storage_offset()))
        self.home.setdefault(storage._cdata, who.name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = (
            {**(kwargs or {}), "pin_memory": False} if "pin_memory" in (kwargs or {}) else kwargs
        )
        name = func.overloadpacket.__name__
        if name == "record_stream":
            raise AssertionError("record_stream is a method of the tensor")
        result = args[0] if name == "copy_" else func(*args, **(kwargs or {}))
        if func.is_view or name == "detach":
            return result
        if name == "copy_":
            self.note(args[1], write=False, who=self.current)
            self.note(args[0], write=True, who=self.current)
            return result
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, torch.Tensor) and leaf.device == CARD:
                self.note(leaf, write=False, who=self.current)
        if name == "empty":
            here = result.device == CARD
            self.home[result.untyped_storage()._cdata] = self.current.name if here else HOST
            if here:  # what had this memory before may still be at work on it
                self.note(result, write=True, who=self.current)
            self.alive.append(result.untyped_storage())
        return result

    def races(self) -> list[str]:
        """Accesses to one memory in no order, and memory that may be given out too early."""
        found = []
        for (a, writes, who, at, _, _), (b, also, other, _, knows, _) in combinations(self.seen, 2):
            if a == b and (writes or also) and who != other and knows.get(who, 0) < at:
                found.append(f"{other} touches what {who} is not done with")
        for memory, _, who, *_ in self.seen:
            home = self.home[memory]
            if HOST not in (who, home) and who != home and (memory, who) not in self.kept:
                found.append(f"{home}'s memory is not kept for {who}")
        return found


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    made = Card(monkeypatch)

    def record_stream(tensor: torch.Tensor, stream: Timeline) -> None:
        made.kept.add((tensor.untyped_storage()._cdata, stream.name))

    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    with made:
        yield made


@pytest.mark.parametrize("count", [1, 2, 3, 7, 12])
def test_panels_are_there_when_they_are_read(card: Card, count: int) -> None:
    matrix = torch.zeros(count, 5)
    card.home[matrix.untyped_storage()._cdata] = HOST
    places = []
    for place, piece in panels(matrix, 3, CARD):
        assert piece.device == CARD
        assert piece.shape == matrix[place].shape
        places.append(place)
        reading = len(card.seen)
        piece.sum()
        memory = card.seen[reading][0]
        copies = [i for i, seen in enumerate(card.seen) if seen[0] == memory and seen[1]]
        assert card.seen[copies[-1] - 1][-1] == 5 * place.start, "these rows, none before or after"
    assert [matrix[place].shape[0] for place in places] == [3] * (count // 3) + [count % 3][
        : count % 3
    ]
    assert card.races() == []


def test_panels_are_copied_while_another_is_read(card: Card) -> None:
    """The second copy does not wait for the first read, the third does."""
    matrix = torch.zeros(12, 5)
    card.home[matrix.untyped_storage()._cdata] = HOST
    for _, piece in panels(matrix, 3, CARD):
        piece.sum()
    reads = [(who, at) for _, write, who, at, *_ in card.seen if not write and who == "default"]
    copies = [knows for _, write, who, _, knows, _ in card.seen if write and who != "default"]
    waited = [sum(knows.get(who, 0) >= at for who, at in reads) for knows in copies]
    assert waited == [0, 0, 1, 2]


def test_panels_that_are_given_up(card: Card) -> None:
    matrix = torch.zeros(12, 5)
    card.home[matrix.untyped_storage()._cdata] = HOST
    for _, piece in panels(matrix, 3, CARD):
        piece.sum()
        break
    assert card.races() == []


def test_panels_of_one_memory_are_not_copied() -> None:
    matrix = torch.arange(10.0).view(5, 2)
    found = list(panels(matrix, 2, matrix.device))
    assert [place for place, _ in found] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert torch.equal(torch.cat([piece for _, piece in found]), matrix)
    assert all(piece.untyped_storage().data_ptr() == matrix.data_ptr() for _, piece in found)
    assert list(panels(matrix[:0], 2, matrix.device)) == []


def test_what_is_sent_has_arrived_before_it_is_written(card: Card) -> None:
    """As the writer does it: it waits in its own time, and is done before the next but one."""
    outbox, before = Outbox(), None
    for size in (4, 6, 6, 3, 9):
        tensor = torch.empty(size, 2, dtype=torch.bfloat16, device=CARD)
        card.note(tensor, write=True, who=card.default)
        there, arrived = outbox.send(tensor)
        assert there.shape == tensor.shape
        assert there.dtype == torch.bfloat16
        if before is not None:  # written while this one is copied
            before[1]()
            card.note(before[0], write=False, who=card.host)
        before = there, arrived
    assert card.races() == []


def test_what_is_read_too_early_is_found(card: Card) -> None:
    """The checker is worth what it sees."""
    tensor = torch.empty(4, device=CARD)
    card.note(tensor, write=True, who=card.default)
    there, _ = Outbox().send(tensor)
    card.note(there, write=False, who=card.host)
    assert card.races() == ["host touches what stream 1 is not done with"]


def test_a_tensor_in_the_machine_is_sent_as_it_is() -> None:
    tensor = torch.zeros(3)
    there, arrived = Outbox().send(tensor)
    assert there is tensor
    assert arrived() is None


def test_a_thread_has_a_stream_of_its_own(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailor_fast._core.transfer._streams", type("Local", (), {})())
    device, given = torch.device("cuda", 1), torch.empty(4, device=CARD)
    card.note(given, write=True, who=card.default)
    for _ in range(2):
        with own_stream(device):
            assert card.current.name == "stream 1"
            made = torch.empty(4, device=CARD)
            card.note(given, write=True, who=card.current)
            card.kept.add((given.untyped_storage()._cdata, "stream 1"))  # it outlives the block
            card.note(made, write=True, who=card.current)
        assert card.current is card.default
        card.note(made, write=False, who=card.host)
        card.note(given, write=True, who=card.default)
    assert card.races() == []
    with own_stream(torch.device("cpu")):
        assert card.current is card.default


def test_each_thread_keeps_its_stream(card: Card) -> None:
    device, found = torch.device("cuda", 2), []
    for _ in range(2):
        thread = threading.Thread(
            target=lambda: found.append([_stream_of_this_thread(device) for _ in range(2)])
        )
        thread.start()
        thread.join()
    (first, again), (other, _) = found
    assert first is again
    assert first is not other
    assert card.made == 2


class _Copies(TorchDispatchMode):
    """Notes whether the host waits for the copies to a card."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten._to_copy:
            self.waits.append(not (kwargs or {}).get("non_blocking", False))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("locked", [False, True])
def test_the_host_waits_for_no_page_locked_memory(
    locked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _tensor: locked)
    with FakeTensorMode(), _Copies() as copies:
        there = to_device(torch.empty(3, 2), torch.device("cuda:0"), torch.bfloat16)
    assert (there.device, there.dtype) == (torch.device("cuda:0"), torch.bfloat16)
    assert copies.waits == [not locked]
    tensor = torch.ones(3)
    assert to_device(tensor, torch.device("cpu")) is tensor


@pytest.mark.parametrize("failed", [0, 801])
def test_memory_is_locked_and_let_go(monkeypatch, caplog, failed: int) -> None:
    calls: list[tuple[int, ...]] = []

    class Runtime:
        def cudaHostRegister(self, *given: int) -> int:  # noqa: N802  the name that CUDA gives it
            calls.append(given)
            return failed

        def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
            calls.append((address,))
            return 0

    @contextmanager
    def device(_device: torch.device) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(torch.cuda, "device", device)
    taken: list[torch.device] = []

    def zeros(_size: int, *, device: torch.device) -> None:
        taken.append(device)
        raise RuntimeError("the error before")

    monkeypatch.setattr(torch, "zeros", zeros)
    memory, card = memoryview(bytearray(8192)), torch.device("cuda", 0)
    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    with caplog.at_level(logging.WARNING, "tailor_fast"), page_locked(memory, card):
        assert calls == [(address, 8192, 0)]
    assert calls[1:] == ([] if failed else [(address,)])
    assert taken == ([card] if failed else [])
    assert ("8192 bytes cannot be page-locked (CUDA error 801)" in caplog.text) == bool(failed)
    calls.clear()
    with page_locked(memory, torch.device("cpu")):
        assert calls == []
