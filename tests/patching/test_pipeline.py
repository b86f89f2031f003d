"""Parts through the ring: the right bytes, each read once, and no thread left behind an error."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tailor_fast.checkpoint import (
    Checkpoint,
    DiskFullError,
    Hashed,
    StagedCheckpoint,
    TensorHasher,
    TransferError,
    TruncatedError,
    open_checkpoint,
    plan_layout,
)
from tailor_fast.patching.pipeline import Part, Pipeline, Worker, Writer
from tailor_fast.patching.ring import Ring

PAGE = 4096


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"t{number}": torch.randint(0, 255, (size,), generator=generator, dtype=torch.uint8)
        for number, size in enumerate((3 * PAGE, 100, 5 * PAGE + 1, 1, 2 * PAGE))
    }


@contextmanager
def opened(folder: Path, pages: int) -> Iterator[tuple[Pipeline, StagedCheckpoint, Writer]]:
    """A pair on disk, its output and a pipeline between them."""
    for number, name in enumerate(("base", "tuned")):
        save_file(tensors(number), folder / f"{name}.safetensors")
    with (
        open_checkpoint(folder / "base.safetensors") as base,
        open_checkpoint(folder / "tuned.safetensors") as tuned,
        StagedCheckpoint(folder / "out", plan_layout(base.tensors.values())) as staged,
        Writer(staged) as writer,
        Pipeline(Hashed(base), Hashed(tuned), writer, Ring(pages * PAGE)) as pipeline,
    ):
        yield pipeline, staged, writer


def parts(step: int) -> list[Part]:
    return [
        Part(name, begin, min(len(tensor), begin + step), ("base", "tuned")[: 1 + number % 2])
        for number, (name, tensor) in enumerate(tensors(0).items())
        for begin in range(0, len(tensor), step)
    ]


def workers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("tailor-")]


@pytest.mark.parametrize("step", [PAGE, 3 * PAGE])
@pytest.mark.parametrize("pages", [6, 100])
def test_every_byte_is_read_once_and_written_once(
    step: int, pages: int, tmp_path: Path, monkeypatch: Any
) -> None:
    read: Counter[tuple[Path, str]] = Counter()
    read_into = Checkpoint.read_into

    def counted(self: Checkpoint, name: str, *args: Any) -> int:
        count = read_into(self, name, *args)
        read[self.path, name] += count
        return count

    monkeypatch.setattr(Checkpoint, "read_into", counted)
    base, tuned = tensors(0), tensors(1)
    with opened(tmp_path, pages) as (pipeline, staged, writer):
        seen = []
        for loaded in pipeline.stream(parts(step)):
            part = loaded.part
            seen.append(part)
            for side, source in (("base", base), ("tuned", tuned)):
                if side in part.sides:
                    expected = source[part.name][part.begin : part.end].numpy().tobytes()
                    assert bytes(loaded.view(side)) == expected
            pipeline.write(loaded, "base")
        writer.drain()
        assert seen == parts(step)
        for source, inputs in (
            (base, pipeline._inputs["base"]),
            (tuned, pipeline._inputs["tuned"]),
        ):
            for name, tensor in source.items():
                hasher = TensorHasher("U8", tensor.shape)
                hasher.update(tensor)
                assert inputs.digests[name] == hasher.hexdigest()
                assert read[inputs.checkpoint.path, name] == len(tensor)
        staged.commit()
    assert not workers()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in base.items())


def test_reading_runs_ahead_as_far_as_the_ring_allows(tmp_path: Path) -> None:
    with opened(tmp_path, pages=6) as (pipeline, _, _):
        stream = pipeline.stream(parts(PAGE))
        first = next(stream)
        used = len(pipeline._ring._spans)
        assert used > len(first.spans)
        assert used <= 6
        pipeline.drop(first)


def test_a_write_waits_for_what_makes_its_bytes(tmp_path: Path) -> None:
    with opened(tmp_path, pages=100) as (pipeline, staged, writer):
        name, size = "t0", 3 * PAGE
        for loaded in pipeline.stream([Part(name, 0, size)]):
            made: Future[None] = Future()
            pipeline.write(loaded, "base", made)
            assert not pipeline._held[0][0].done()
            loaded.view("base")[:] = bytes(size)
            made.set_result(None)
        writer.drain()
        hasher = TensorHasher("U8", (size,))
        hasher.update(bytes(size))
        assert staged._shards[0].digests[name] == hasher.hexdigest()


def copy(
    folder: Path,
    *,
    pages: int = 30,
    before: Callable[[], object] = lambda: None,
    after: Callable[[Part], Future[None] | None] = lambda _part: None,
) -> None:
    """Copy everything; ``before`` is called when all is open."""
    with opened(folder, pages) as (pipeline, _, writer):
        before()
        for loaded in pipeline.stream(parts(PAGE)):
            pipeline.write(loaded, "base", after(loaded.part))
        writer.drain()


def test_a_tensor_is_written_when_its_words_have_arrived(tmp_path: Path) -> None:
    """The writer waits in its own thread; where they never arrive, the caller is told."""
    wanted, threads = tensors(7), list[str]()
    with opened(tmp_path, 16) as (_, staged, writer):
        for name, tensor in wanted.items():
            words = torch.zeros_like(tensor)

            def arrive(words: torch.Tensor = words, tensor: torch.Tensor = tensor) -> None:
                time.sleep(0.01)
                words.copy_(tensor)
                threads.append(threading.current_thread().name)

            writer.put(name, words, arrive)
        writer.drain()
        staged.commit()
    assert all(name.startswith("tailor-write") for name in threads)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_words_that_do_not_arrive_are_an_error(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("the device is lost")

    with opened(tmp_path, 16) as (_, _, writer):
        writer.put("t0", torch.zeros(3 * PAGE, dtype=torch.uint8), fail)
        with pytest.raises(RuntimeError, match="the device is lost"):
            writer.drain()


def test_an_input_that_ends_early_is_named_with_its_tensor(tmp_path: Path) -> None:
    path = tmp_path / "tuned.safetensors"

    def cut() -> None:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 3 * PAGE)

    with pytest.raises(TruncatedError, match=r"tuned\.safetensors: tensor 't\d': ends at byte"):
        copy(tmp_path, before=cut)
    assert not workers()
    assert sorted(found.name for found in tmp_path.iterdir()) == [
        "base.safetensors",
        "tuned.safetensors",
    ]


def test_an_error_of_the_system_has_file_and_tensor(tmp_path: Path, monkeypatch: Any) -> None:
    def broken(*_args: object) -> int:
        raise OSError(5, "Input/output error")

    with pytest.raises(
        TransferError, match=r"\.safetensors: tensor 't0': reading at byte .* failed"
    ):
        copy(tmp_path, before=lambda: monkeypatch.setattr("os.preadv", broken))


@pytest.mark.parametrize("where", ["write", "make"])
def test_the_first_error_behind_the_callers_back_is_raised(
    where: str, tmp_path: Path, monkeypatch: Any
) -> None:
    error = DiskFullError("the disk is full", path="x")

    def fail(_self: StagedCheckpoint, name: str, *_args: object) -> None:
        if name == "t2":
            raise error

    def make(part: Part) -> Future[None] | None:
        made: Future[None] = Future()
        made.set_exception(error)
        return made if part.name == "t2" else None

    options: dict[str, Any] = {"after": make}
    if where == "write":
        options = {"before": lambda: monkeypatch.setattr(StagedCheckpoint, "write", fail)}
    with pytest.raises(DiskFullError, match="the disk is full") as raised:
        copy(tmp_path, pages=6, **options)
    assert raised.value is error
    assert not workers()


def interrupted(folder: Path, before: Callable[[], object]) -> None:
    with opened(folder, pages=100) as (pipeline, _, _):
        before()
        for _ in pipeline.stream([Part("t1", 0, 100), Part("t2", 0, 5 * PAGE)]):
            raise KeyboardInterrupt


def test_a_stop_waits_for_one_piece_only(tmp_path: Path, monkeypatch: Any) -> None:
    read_into = Checkpoint.read_into
    begun: list[int] = []

    def slow(self: Checkpoint, *args: Any) -> int:
        begun.append(len(begun))
        time.sleep(0.05)
        return read_into(self, *args)

    monkeypatch.setattr(Worker.pieces, "__defaults__", (100,))
    with pytest.raises(KeyboardInterrupt):
        interrupted(tmp_path, lambda: monkeypatch.setattr(Checkpoint, "read_into", slow))
    assert len(begun) < 5 * PAGE // 100  # a quarter of the pieces of both inputs
    assert not workers()


def test_a_part_that_is_never_given_back_is_an_error(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="no room for a part of 't2'"),
        opened(tmp_path, pages=6) as (pipeline, _, _),
    ):
        for _ in pipeline.stream([Part("t0", 0, 3 * PAGE), Part("t2", 0, 5 * PAGE, ("base",))]):
            pass
