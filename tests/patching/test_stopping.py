"""Ctrl-C and SIGTERM while threads read, solve and write: the process ends where it can go on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tailor_fast.calibration.options import RunOptions
from tests.cli.running import CommandLine
from tests.patching.disk import llama_pair, write_texts
from tests.patching.test_resuming import golden, lasting

# Every write of a tensor takes a while, so that the run is stopped while all threads are at work.
SCRIPT = """
import sys, time
from tailor_fast.checkpoint import StagedCheckpoint
write = StagedCheckpoint.write
seconds = float(sys.argv[1])
def slow(self, name, *args):
    if ".layers." in name:
        print("writing", flush=True)
        time.sleep(seconds)
    write(self, name, *args)
StagedCheckpoint.write = slow
from tailor_fast.cli import main
sys.exit(main(["patch", "-q", *sys.argv[2:]]))
"""


def stopped(
    number: signal.Signals, times: int, seconds: float, *arguments: object
) -> tuple[int, str]:
    """Send a signal when something is being written, again soon after; exit code and stderr."""
    command = [sys.executable, "-c", SCRIPT, str(seconds), *map(str, arguments)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert run.stdout is not None
        for _ in range(3):
            assert run.stdout.readline() == "writing\n"
        for _ in range(times):
            run.send_signal(number)
            time.sleep(0.2)
        rest, error = run.communicate(timeout=300)
    finally:
        run.kill()
        run.wait()
    assert rest.count("writing") <= 2  # of two blocks: what was at work is ended, no more begins
    return run.returncode, error


@pytest.mark.parametrize(
    ("number", "code", "sentence"),
    [
        (signal.SIGINT, 130, "stopped by the user; nothing was written"),
        (signal.SIGTERM, 143, "terminated; nothing was written"),
    ],
)
def test_a_run_that_is_never_resumed_leaves_nothing(
    number: signal.Signals, code: int, sentence: str, tmp_path: Path
) -> None:
    base, tuned = llama_pair(tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())
    out = ("-o", tmp_path / "out", "--resume", "never")
    ended = stopped(number, 1, 1.0, base, tuned, *out)
    assert ended == (code, f"tailor-fast: error: {sentence}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_a_stopped_run_says_how_to_go_on(
    number: signal.Signals,
    times: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, tuned = llama_pair(tmp_path)
    new = write_texts(tmp_path / "new.jsonl")
    out = tmp_path / "out"
    job = (base, tuned, "-o", out, "--calibration", new, "--device", "cpu")
    code, error = stopped(number, times, 0.3, *job)
    assert code == 75, error
    assert error.startswith("tailor-fast: error: stopped; ")
    assert f"tensors of {out} are finished and kept; run the same again to go on" in error
    assert error.count("\n") == 1
    assert not out.exists()
    ran = CommandLine(capsys)("patch", *job, "--resume", "required")
    assert ran.code == 0, ran.err
    assert "tensors were finished by an earlier run" in ran.out
    assert lasting(out) == golden(base, tuned, calibration=new, options=RunOptions())
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
