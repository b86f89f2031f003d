"""``plan`` says how much memory a run takes: measured in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pairs import Shape, write_pair
from tailor_fast._core.errors import UsageError
from tailor_fast.calibration.options import RunOptions
from tailor_fast.patching import solving
from tailor_fast.patching.checkpoints import plan_patch
from tailor_fast.patching.recipe import Recipe
from tests.models.processors import text_tokenizer
from tests.patching.disk import write_texts

MIB = 1 << 20
# A first run, of a tiny pair, loads whatever a run loads; the second is measured from there.
SCRIPT = """
import gc, json, re, sys
from pathlib import Path
from tailor_fast.calibration.options import RunOptions
from tailor_fast.patching import solving
from tailor_fast.patching.checkpoints import patch_checkpoint
from tailor_fast.patching.recipe import Recipe
def kib(field):
    return int(re.search(field + r":\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
options = RunOptions(**json.loads(sys.argv[1]))
recipe = Recipe(**json.loads(sys.argv[2]))
solving.SOLVED_AT_ONCE["cpu"] = int(sys.argv[3])
for folder in map(Path, sys.argv[4:]):
    gc.collect()
    before = kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    data = folder / "new.jsonl"
    patch_checkpoint(
        folder / "base",
        folder / "tuned",
        folder / "out",
        recipe,
        calibration=data if data.exists() else None,
        options=options,
    )
print((kib("VmHWM") - before) * 1024)
"""
TINY = Shape(2, 64, 128, 4, 4, 10**8, vocabulary=1000)


def make(folder: Path, shape: Shape, *, samples: bool) -> Path:
    folder.mkdir()
    for path in write_pair(folder, shape):
        text_tokenizer().save_pretrained(path)
    if samples:
        write_texts(folder / "new.jsonl", count=8)
    return folder


def measured(folders: list[Path], options: dict[str, Any], **recipe: str) -> int:
    """Peak of the last run in bytes, above what was resident before it."""
    at_once = str(solving.SOLVED_AT_ONCE["cpu"])
    given = json.dumps(options), json.dumps(recipe), at_once, *map(str, folders)
    command = [sys.executable, "-c", SCRIPT, *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "clear_refs" in done.stderr:
        pytest.skip("the system does not let a process reset its peak")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_without_data(tmp_path: Path) -> None:
    tiny = make(tmp_path / "tiny", TINY, samples=False)
    pair = make(
        tmp_path / "pair", Shape(5, 1024, 2816, 16, 16, 10**9, vocabulary=8000), samples=False
    )
    options: dict[str, Any] = {"max_ram": 128 * MIB}
    plan = plan_patch(pair / "base", pair / "tuned", tmp_path / "x", options=RunOptions(**options))
    assert plan.ram <= 128 * MIB
    # Where the machine is busy the ring may never be full: the larger of two runs counts.
    used = max(measured([tiny, pair], options | {"overwrite": True}) for _ in range(2))
    assert used <= 144 * MIB  # fixed buffers do not count
    assert 0.85 * used <= plan.ram_peak <= 1.15 * used, (plan.ram_peak / MIB, used / MIB)


@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_tensors_that_are_larger_than_the_limit(scope: str, tmp_path: Path) -> None:
    """Three of 80 MiB in each file: the keys of their thresholds must not add up."""
    tiny = make(tmp_path / "tiny", TINY, samples=False)
    pair = make(
        tmp_path / "pair", Shape(1, 2048, 20480, 16, 16, 10**9, vocabulary=1000), samples=False
    )
    options = {"max_ram": 64 * MIB}
    plan = plan_patch(
        pair / "base",
        pair / "tuned",
        tmp_path / "x",
        Recipe(scope=scope),
        options=RunOptions(**options),
    )
    assert plan.ram <= 64 * MIB
    used = measured([tiny, pair], options, scope=scope)
    # Fixed buffers of 16 MiB do not count; a fifth for the heap, which threads under load divide.
    assert used <= 96 * MIB
    assert 0.85 * used <= plan.ram_peak <= 1.15 * used, (plan.ram_peak / MIB, used / MIB)


@pytest.mark.parametrize(("at_once", "words"), [(1 << 19, 1000), (1 << 23, 32000)])
def test_with_samples(
    at_once: int, words: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(solving.SOLVED_AT_ONCE, "cpu", at_once)
    tiny = make(tmp_path / "tiny", TINY, samples=True)
    pair = make(
        tmp_path / "pair", Shape(1, 1024, 2048, 16, 16, 10**9, vocabulary=words), samples=True
    )
    plan = plan_patch(pair / "base", pair / "tuned", tmp_path / "x", calibration=pair / "new.jsonl")
    used = measured([tiny, pair], {})
    assert 0.85 * used <= plan.ram_peak <= 1.15 * used, (plan.ram_peak / MIB, used / MIB)


def test_what_passes_hold_stays_within_the_limit(tmp_path: Path) -> None:
    """A batch takes more than the layers do; suspended, all of them take three times as much."""
    tiny = make(tmp_path / "tiny", TINY, samples=True)
    pair = make(tmp_path / "pair", Shape(1, 256, 512, 8, 8, 10**9, vocabulary=1000), samples=True)
    line = json.dumps({"prompt": "a b c d " * 150, "answer": "a b"})
    (pair / "new.jsonl").write_text(f"{line}\n" * 24)

    def planned(limit: int | None) -> int:
        return plan_patch(
            pair / "base",
            pair / "tuned",
            tmp_path / "x",
            calibration=pair / "new.jsonl",
            options=RunOptions(max_ram=limit),
        ).ram

    least = planned(None)
    assert planned(least) == least
    with pytest.raises(UsageError, match=f"is too little: the largest block and .* take {least}"):
        planned(least - 1)
    limit = 60 * MIB
    assert 40 * MIB < least < limit  # layers alone take 20
    used = measured([tiny, pair], {"max_ram": limit})
    assert used <= limit + 60 * MIB  # work buffers do not count
