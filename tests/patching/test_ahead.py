"""Blocks that are read ahead: the same bytes, each read once, two groups in memory at a time."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tailor_fast import Recipe, patch_checkpoint
from tailor_fast._core.errors import InputError
from tailor_fast.calibration.job import calibrate
from tailor_fast.calibration.options import RunOptions
from tailor_fast.checkpoint import Hashed, open_checkpoint
from tailor_fast.patching import ahead, job
from tailor_fast.patching.ahead import Ahead, plan_ahead
from tailor_fast.patching.inputs import Given
from tailor_fast.patching.plan import PatchPlan, host_bytes
from tailor_fast.patching.sources import Sources, open_sources
from tests.patching.disk import llama_pair, write_texts

OPTIONS = RunOptions(batch_size=4, max_shard_bytes=40_000)
SAMPLES = Given(samples=True)


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def groups_of(source: Hashed) -> list[list[str]]:
    """LLaMA's blocks, by their names on disk."""
    names = [name for name in source.checkpoint.tensors if ".layers." in name]
    numbers = sorted({name.split(".layers.")[1].split(".")[0] for name in names})
    return [[n for n in names if f".layers.{number}." in n] for number in numbers]


@pytest.fixture
def source(tmp_path: Path) -> Any:
    with open_checkpoint(llama_pair(tmp_path, blocks=4)[1]) as checkpoint:
        yield Hashed(checkpoint)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often the first byte of each tensor is read in the thread that reads ahead."""
    count = Counter[str]()
    plain = Hashed.read_into

    def read_into(self: Hashed, name: str, buffer: object, begin: int = 0, end: Any = None) -> int:
        if begin == 0 and threading.current_thread().name.startswith("tailor-ahead"):
            count[name] += 1
        return plain(self, name, buffer, begin, end)

    monkeypatch.setattr(Hashed, "read_into", read_into)
    return count


@pytest.mark.parametrize(
    ("recipe", "retains"),
    [
        (Recipe(), True),
        (Recipe(propagate="none"), False),
        (Recipe(scope="global", density=0.2), False),
        (Recipe(untouched="tuned", group="block"), False),
    ],
)
def test_the_output_is_the_same(
    recipe: Recipe,
    retains: bool,
    tmp_path: Path,
    counted: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, tuned = llama_pair(tmp_path)
    given: dict[str, Any] = {"calibration": write_texts(tmp_path / "new.jsonl"), "options": OPTIONS}
    given["retain"] = write_texts(tmp_path / "old.jsonl", seed=9) if retains else None
    patch_checkpoint(base, tuned, tmp_path / "plain", recipe, **given)
    assert not counted
    monkeypatch.setattr(job, "plan_ahead", lambda _sources, plan, *_: replace(plan, ahead=1))
    patch_checkpoint(base, tuned, tmp_path / "ahead", recipe, **given)
    assert bytes_of(tmp_path / "ahead") == bytes_of(tmp_path / "plain")
    assert counted
    # One pass finds the groups, one takes statistics, and one may score before; of both inputs.
    passes = 2 + (recipe.scope == "global")
    assert max(counted.values()) <= 2 * passes, counted


def test_from_statistics(
    tmp_path: Path, counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, tuned = llama_pair(tmp_path)
    calibrate(
        tuned, write_texts(tmp_path / "new.jsonl"), tmp_path / "new.safetensors", options=OPTIONS
    )
    given: dict[str, Any] = {"statistics": tmp_path / "new.safetensors", "options": OPTIONS}
    patch_checkpoint(base, tuned, tmp_path / "plain", **given)
    monkeypatch.setattr(job, "plan_ahead", lambda _sources, plan, *_: replace(plan, ahead=1))
    patch_checkpoint(base, tuned, tmp_path / "ahead", **given)
    assert bytes_of(tmp_path / "ahead") == bytes_of(tmp_path / "plain")
    assert set(counted.values()) == {2}, "once of each input"


def test_the_next_group_is_read_while_this_one_is_used(source: Hashed) -> None:
    groups = groups_of(source)
    reader = Ahead(source, groups, locked=False)
    first = reader.read(groups[0][0])
    next_ones = [reader._reads[name] for name in groups[1]]
    assert all(read.result(10) is not None for read in next_ones)  # asked for by nobody
    assert not set(groups[2]) & reader._reads.keys()
    assert torch.equal(first, source.checkpoint.read(groups[0][0]))
    dropped = weakref.ref(first)
    del first
    reader.read(groups[1][0])
    assert dropped() is None
    assert set(reader._reads) == {*groups[1], *groups[2]}
    assert reader.read(groups[1][0]) is next_ones[0].result()
    reader.close()


def test_any_order_gives_the_words_and_their_digests(source: Hashed) -> None:
    groups = groups_of(source)
    known = {name: Hashed(source.checkpoint).digest(name, bytearray(999)) for name in groups[2]}
    reader = Ahead(source, groups, locked=False)
    for name in (groups[3][0], groups[0][1], *groups[2], "model.norm.weight", groups[0][1]):
        assert torch.equal(reader.read(name), source.checkpoint.read(name))
        size, part = source.checkpoint.tensors[name].nbytes, torch.zeros(8, dtype=torch.uint8)
        assert reader.read_into(name, part, 4, 12) == 8
        whole = source.checkpoint.read(name).view(-1).view(torch.uint8)
        assert torch.equal(part, whole[4:12])
        assert size == len(whole)
    reader.close()
    assert {name: source.digests[name] for name in groups[2]} == known


def test_what_cannot_be_read_is_said_where_it_is_asked_for(
    source: Hashed, monkeypatch: pytest.MonkeyPatch
) -> None:
    groups = groups_of(source)
    reader, plain = Ahead(source, groups, locked=False), type(source.checkpoint).read_into

    def read_into(checkpoint: Any, name: str, *args: Any) -> int:
        if name == groups[1][2]:
            raise InputError("the disk is gone")
        return plain(checkpoint, name, *args)

    monkeypatch.setattr(type(source.checkpoint), "read_into", read_into)
    for name in groups[0] + groups[1][:2]:
        reader.read(name)
    with pytest.raises(InputError, match="the disk is gone"):
        reader.read(groups[1][2])
    reader.close()


def test_the_plan_counts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "memory", lambda: (1 << 40, 1 << 41))
    plan = PatchPlan((), {}, 0, 0, 0, ram_weights=1000, ram_solve=0, notes=())
    on_card = SimpleNamespace(device="cuda:0", max_ram=None)
    with open_sources(*llama_pair(tmp_path, blocks=3), Recipe(), runs_model=True) as sources:
        assert plan_ahead(sources, plan, SAMPLES, RunOptions()) == plan
        planned = plan_ahead(sources, plan, SAMPLES, on_card)
        # Of TUNED two blocks, of BASE their layers: 32 columns, 4-byte words, hidden size 64.
        layers = 4 * (4 * 32 * 32 + 3 * 32 * 64)
        assert planned.ahead == 2 * (2 * layers + 2 * 4 * 32)
        assert host_bytes(planned, torch.device("cuda:0")) == 1000 + planned.ahead
        assert held_at_most(sources) <= planned.ahead
        old = plan_ahead(sources, plan, Given(samples=True, old_samples=True), on_card)
        assert old.ahead == planned.ahead + 2 * 2 * 4 * 32
        one = plan_ahead(sources, plan, Given(statistics="full"), on_card)
        assert one.ahead == 2 * 4 * (2 * 32 * 64)
        on_card.max_ram = 16 << 20
        none = plan_ahead(sources, plan, SAMPLES, on_card)
        assert none.ahead == 0
        assert "blocks are read when they are needed, not ahead" in none.notes[-1]


def held_at_most(sources: Sources) -> int:
    """Bytes that two walks over the blocks hold at once."""
    most = 0
    readers = [Ahead(*side, locked=False) for side in ahead._sides(sources, SAMPLES)]
    for step in range(3):
        for reader in readers:
            reader.read(reader._groups[step][0])
        held = (r.result().nbytes for reader in readers for r in reader._reads.values())
        most = max(most, sum(held))
    for reader in readers:
        reader.close()
    return most
