"""``--max-vram``: what ``plan`` and ``calibrate`` show of a device, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.backends import needs_native
from tests.cli.running import CommandLine
from tests.patching.disk import llama_pair, write_texts


@pytest.fixture
def arguments(tmp_path: Path) -> tuple[object, ...]:
    base, tuned = llama_pair(tmp_path)
    new = write_texts(tmp_path / "new.jsonl")
    return base, tuned, "-o", tmp_path / "out", "--calibration", new


def test_plan_shows_the_largest_stages(
    tailor_fast: CommandLine, arguments: tuple[object, ...]
) -> None:
    shown = re.compile(r"^device +\S+ \w+: statistics ", re.MULTILINE)
    plain = tailor_fast("plan", *arguments)
    assert plain.code == 0
    assert not shown.search(plain.out)
    limited = tailor_fast("plan", *arguments, "--max-vram", "1GiB")
    assert limited.code == 0, limited.err
    assert shown.search(limited.out), limited.out
    assert re.search(r"solve \S+ \w+\s+\(model\.layers\.", limited.out)


@needs_native
def test_the_least_is_named_and_enough(
    tailor_fast: CommandLine, arguments: tuple[object, ...], tmp_path: Path
) -> None:
    for command in ("plan", "patch"):
        refused = tailor_fast(command, *arguments, "--max-vram", "1KiB")
        assert refused.code == 2
        assert "max_vram of 1024 bytes is too little" in refused.err
        assert "expected at least that, a smaller batch_size" in refused.err
    assert not (tmp_path / "out").exists()
    needed = re.search(r" takes (\d+);", refused.err)
    assert needed is not None
    done = tailor_fast("patch", *arguments, "--max-vram", needed[1], "-q")
    assert done.code == 0, done.err
    assert tailor_fast("verify", tmp_path / "out").code == 0


@needs_native
def test_calibrate_keeps_to_it(
    tailor_fast: CommandLine, arguments: tuple[object, ...], tmp_path: Path
) -> None:
    _, tuned, *_, new = arguments
    stats = tmp_path / "new.safetensors"
    command = ("calibrate", tuned, "--data", new, "-o", stats)
    refused = tailor_fast(*command, "--max-vram", "1KiB")
    assert refused.code == 2
    assert "max_vram of 1024 bytes is too little: statistics of model.layers." in refused.err
    assert "expected at least that, or a smaller batch_size" in refused.err
    assert not stats.exists()
    needed = re.search(r" take (\d+);", refused.err)
    assert needed is not None
    done = tailor_fast(*command, "--max-vram", needed[1])
    assert done.code == 0, done.err
    assert re.search(r"^memory +\S+ \w+ planned", done.out, re.MULTILINE), done.out
    stats.unlink()
    plain = tailor_fast(*command)
    assert plain.code == 0, plain.err
    assert "planned" not in plain.out
