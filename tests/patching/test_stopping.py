"""Ctrl-C and SIGTERM while threads read, solve and write: the process ends and leaves nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.patching.disk import llama_pair

# Every write of a tensor takes a second, so that the run is stopped while all threads are at work.
SCRIPT = """
import sys, time
from tailor_fast.checkpoint import StagedCheckpoint
write = StagedCheckpoint.write
def slow(self, name, *args):
    if ".layers." in name:
        print("writing", flush=True)
        time.sleep(1)
    write(self, name, *args)
StagedCheckpoint.write = slow
from tailor_fast.cli import main
sys.exit(main(["patch", "-q", *sys.argv[1:]]))
"""


@pytest.mark.parametrize(
    ("number", "code", "sentence"),
    [
        (signal.SIGINT, 130, "stopped by the user; nothing was written"),
        (signal.SIGTERM, 143, "terminated; nothing was written"),
    ],
)
def test_a_stopped_run_leaves_nothing(
    number: signal.Signals, code: int, sentence: str, tmp_path: Path
) -> None:
    base, tuned = llama_pair(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    run = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(base), str(tuned), "-o", str(tmp_path / "out")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert run.stdout is not None
        assert run.stdout.readline() == "writing\n"
        assert any(path.name.startswith(".out") for path in tmp_path.iterdir())
        run.send_signal(number)
        start = time.monotonic()
        _, error = run.communicate(timeout=60)
    finally:
        run.kill()
        run.wait()
    assert run.returncode == code
    assert error == f"tailor-fast: error: {sentence}\n"
    assert time.monotonic() - start < 15  # 27 tensors are left to write
    assert sorted(path.name for path in tmp_path.iterdir()) == before
