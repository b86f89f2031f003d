"""``stitch`` refuses what cannot work from headers alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tailor_fast._core.errors import InputError, OutputError, UsageError
from tailor_fast.calibration import RunOptions
from tailor_fast.checkpoint import Checkpoint
from tailor_fast.stitching import Task, stitch_checkpoints
from tests.patching.disk import write_texts
from tests.stitching.disk import OPTIONS, family


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Task]:
    _, tuned = family(tmp_path, "ab", blocks=1)
    samples = {name: write_texts(tmp_path / f"{name}.jsonl", 2) for name in tuned}
    return {name: Task(path, calibration=samples[name]) for name, path in tuned.items()}


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of tensors of which anything was read."""
    names: list[str] = []
    monkeypatch.setattr(Checkpoint, "read_into", lambda self, name, *_: names.append(name))
    return names


def test_places_and_memory(tmp_path: Path, tasks: dict[str, Task], reads: list[str]) -> None:
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.iterdir())
    cases: list[tuple[Path, RunOptions, type[Exception], str]] = [
        (tmp_path / "there", OPTIONS, OutputError, "exists already"),
        (tmp_path / "none" / "out", OPTIONS, OutputError, "make it first"),
        (tmp_path / "tuned-a" / "out", OPTIONS, OutputError, "is, or lies in, the input"),
        (Path("/proc/out"), OPTIONS, OutputError, "making the lock file is not possible"),
        (tmp_path / "out", replace(OPTIONS, max_ram=1000), UsageError, "is too little"),
        (tmp_path / "out", replace(OPTIONS, max_ram=10**18), UsageError, "more than the memory of"),
        (tmp_path / "out", replace(OPTIONS, max_vram=1), UsageError, "expected max_vram None"),
    ]
    for out, options, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            stitch_checkpoints(tmp_path / "base", tasks, out, options=options)
    assert reads == []
    assert sorted(tmp_path.iterdir()) == before


def test_a_disk_without_room(
    tmp_path: Path, tasks: dict[str, Task], reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(total=2, free=1_000))
    with pytest.raises(OutputError, match=r"needs .* of disk, 1\.00 kB are free; make room"):
        stitch_checkpoints(tmp_path / "base", tasks, tmp_path / "out", options=OPTIONS)
    assert reads == []
    assert sorted(tmp_path.iterdir()) == before


def test_models_that_do_not_match(tmp_path: Path, tasks: dict[str, Task], reads: list[str]) -> None:
    shard = min((tmp_path / "tuned-b").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"tuned-b/{shard.name}: must have the .* bytes"):
        stitch_checkpoints(tmp_path / "base", tasks, tmp_path / "out", options=OPTIONS)
    assert reads == []
