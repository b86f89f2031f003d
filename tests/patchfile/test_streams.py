"""Generators that run ahead in a thread: order, errors, bounds, and that the thread always ends."""

import threading
from collections.abc import Generator
from contextlib import closing
from pathlib import Path

import pytest

from tailor_fast.checkpoint import TensorHasher, open_checkpoint
from tailor_fast.patchfile import streams
from tailor_fast.patchfile.streams import ahead, read_blocks
from tests.patchfile.pairs import content, pair, save


class Counting:
    """Counts how far a generator was asked, and whether it was closed."""

    def __init__(self, stop: int, error: Exception | None = None) -> None:
        self.made = 0
        self.closed = False
        self.threads: set[str] = set()
        self._stop, self._error = stop, error

    def items(self) -> Generator[int, None, None]:
        try:
            for number in range(self._stop):
                self.made += 1
                self.threads.add(threading.current_thread().name)
                yield number
            if self._error is not None:
                raise self._error
        finally:
            self.closed = True


@pytest.fixture(autouse=True)
def _threads_end() -> Generator[None, None, None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 50])
def test_everything_comes_in_order(count: int, depth: int) -> None:
    counting = Counting(count)
    assert list(ahead(ahead(counting.items(), depth), depth)) == list(range(count))
    assert counting.closed
    assert threading.current_thread().name not in counting.threads


def test_it_is_never_more_than_depth_ahead() -> None:
    counting = Counting(100)
    with closing(ahead(counting.items(), 3)) as items:
        for number in items:
            assert counting.made <= number + 1 + 3


def test_an_error_comes_in_its_place() -> None:
    counting = Counting(4, ValueError("broken"))
    seen = []
    with pytest.raises(ValueError, match="broken"):
        seen.extend(ahead(ahead(counting.items())))
    assert counting.closed
    seen.clear()
    with closing(ahead(Counting(4, ValueError("broken")).items())) as items:
        seen.extend(next(items) for _ in range(4))
        with pytest.raises(ValueError, match="broken"):
            next(items)
    assert seen == [0, 1, 2, 3]


def test_leaving_early_closes_everything() -> None:
    counting = Counting(1000)
    with closing(ahead(ahead(counting.items()))) as items:
        assert next(items) == 0
    assert counting.closed
    assert counting.made < 10
    unused = Counting(5)
    with closing(ahead(unused.items())):
        pass
    assert unused.made == 0


@pytest.mark.parametrize("in_use", [0, 1, 4])
def test_blocks_stay_while_they_are_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_use: int
) -> None:
    monkeypatch.setattr(streams, "BLOCK_BYTES", 100)
    path = save(tmp_path / "x.safetensors", pair()[0])
    expected = content(path)
    held: list[tuple[str, int, memoryview]] = []
    digests = {}
    with open_checkpoint(path) as file:
        for block in read_blocks(file, sorted(file.tensors), "xxh3-128", in_use=in_use):
            held.append((block.name, block.begin, block.view))
            for name, begin, view in held[-1 - in_use :]:
                assert expected[name][2][begin : begin + 100] == view
            if block.digest:
                digests[block.name] = block.digest
    for name, (dtype, shape, raw) in expected.items():
        hasher = TensorHasher(dtype, shape)
        hasher.update(raw)
        assert digests.pop(name) == hasher.hexdigest()
    assert digests == {}
