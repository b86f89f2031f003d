"""The program on real files: every exit code that a run can have, and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.patching.disk import llama_pair, llava_pair, write_scenes, write_texts

PROGRAM = [sys.executable, "-m", "tailor_fast"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*PROGRAM, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr behind progress, without a traceback."""
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("tailor-fast: error: ")
    assert "Traceback" not in done.stderr
    return lines[-1]


def test_a_llava_is_patched_verified_and_inspected(tmp_path: Path) -> None:
    base, tuned = llava_pair(tmp_path)
    new, old = write_scenes(tmp_path / "new.jsonl"), write_scenes(tmp_path / "old.jsonl", seed=3)
    out = tmp_path / "out"
    arguments = (base, tuned, "-o", out, "--calibration", new, "--retain", old)
    planned = run("patch", *arguments, "--dry-run", "--out-shard-size", "300KB")
    assert planned.returncode == 0
    assert not out.exists()
    done = run("patch", *arguments, "--out-shard-size", "300KB")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert "kept     10.00%" in done.stdout
    report = json.loads((out / "tailor_report.json").read_text())
    assert str(report["kept"]) in done.stdout.replace(",", "")
    assert len(list(out.glob("model-*.safetensors"))) > 1
    verified = run("verify", out)
    assert verified.returncode == 0, verified.stderr
    assert "holds" in verified.stdout
    assert "tailor_fast" in run("inspect", out).stdout

    shard = next(out.glob("model-00001-*.safetensors"))
    tensors = load_file(shard)
    name = next(name for name in tensors if "vision_tower" in name or "embed" in name)
    tensors[name].view(-1)[0] += 1.0
    save_file(tensors, shard, {"format": "pt"})
    broken = run("verify", out)
    assert broken.returncode == 1
    assert name in broken.stdout + broken.stderr


def test_statistics_are_taken_once_and_used(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path)
    stats = tmp_path / "stats.safetensors"
    data = write_texts(tmp_path / "new.jsonl")
    assert run("calibrate", tuned, "--data", data, "-o", stats).returncode == 0
    for density in (0.05, 0.2):
        out = tmp_path / f"out-{density}"
        done = run("patch", base, tuned, "-o", out, "--statistics", stats, "--density", density)
        assert done.returncode == 0, done.stderr
        assert "propagate 'none'" in done.stdout
        assert run("verify", out).returncode == 0
    refused = run(
        *("patch", base, tuned, "-o", tmp_path / "no", "--statistics", stats),
        *("--propagate", "asymmetric"),
    )
    assert refused.returncode == 2
    assert "needs samples; got statistics" in sentence(refused)


def test_each_failure_has_its_code_and_leaves_nothing(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path)
    new = write_texts(tmp_path / "new.jsonl")
    out = tmp_path / "out"
    shard = sorted(tuned.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    before = sorted(path.name for path in tmp_path.iterdir())

    shard.write_bytes(whole[:-5])
    truncated = run("patch", base, tuned, "-o", out)
    assert truncated.returncode == 65
    assert shard.name in sentence(truncated)
    shard.write_bytes(b"\xff" * 100 + whole[100:])
    assert run("patch", base, tuned, "-o", out).returncode == 65
    shard.unlink()
    missing = run("patch", base, tuned, "-o", out)
    assert missing.returncode == 65
    assert shard.name in sentence(missing)
    tensors = {name: torch.zeros(3, dtype=torch.float32) for name in load_names(whole)}
    save_file(tensors, shard, {"format": "pt"})
    assert run("patch", base, tuned, "-o", out).returncode == 65
    shard.write_bytes(whole)

    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"\n')
    bad = run("patch", base, tuned, "-o", out, "--calibration", tmp_path / "bad.jsonl")
    assert bad.returncode == 65
    assert "bad.jsonl" in sentence(bad)
    (tmp_path / "bad.jsonl").unlink()
    (tmp_path / "recipe.yaml").write_text("densty: 0.1\n")
    unknown = run("patch", base, tuned, "-o", out, "--recipe", tmp_path / "recipe.yaml")
    assert unknown.returncode == 2
    assert "densty" in sentence(unknown)
    (tmp_path / "recipe.yaml").unlink()
    both = run("patch", base, tuned, "-o", out, "--density", "0.1", "--sparsity", "0.9")
    assert both.returncode == 2
    nowhere = run("patch", base, tuned, "-o", tmp_path / "no" / "out", "--calibration", new)
    assert nowhere.returncode == 73
    taken = run("patch", base, tuned, "-o", base)
    assert taken.returncode == 73
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def load_names(shard: bytes) -> list[str]:
    size = int.from_bytes(shard[:8], "little")
    return [name for name in json.loads(shard[8 : 8 + size]) if name != "__metadata__"]


def begin(tmp_path: Path) -> tuple[subprocess.Popen[str], list[str], list[object]]:
    """A run with samples, what stood beside its output before it, and its arguments."""
    base, tuned = llama_pair(tmp_path, blocks=8)
    new = write_texts(tmp_path / "new.jsonl", count=96)
    before = sorted(path.name for path in tmp_path.iterdir())
    arguments = ["patch", base, tuned, "-o", tmp_path / "out", "--calibration", new]
    command = [*PROGRAM, *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    return process, before, arguments


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_run_that_is_stopped_at_once_leaves_nothing(
    number: int, code: int, tmp_path: Path
) -> None:
    process, before, _ = begin(tmp_path)
    deadline = time.monotonic() + 300
    while sorted(path.name for path in tmp_path.iterdir()) == before:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == code
    assert errors.strip().splitlines()[-1].endswith("nothing was written")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_in_the_walk_goes_on_later(number: int, tmp_path: Path) -> None:
    process, before, arguments = begin(tmp_path)
    with process:
        assert process.stderr is not None
        while not re.match(r"\d+/\d+ ", line := process.stderr.readline()):
            assert line, "the run ended before its first group"
        process.send_signal(number)
        errors = process.stderr.read()
    assert process.returncode == 75
    assert "run the same again to go on from there" in errors.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()
    done = run(*arguments, "--resume", "required")
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, "out"])
