"""A few of every fault, as ``python -m tests.faults.run`` meets all of them."""

import subprocess
import sys

import pytest

from tests.faults.run import SECTIONS
from tests.source_tree import ROOT


@pytest.mark.slow
def test_no_fault_does_harm() -> None:
    command = [sys.executable, "-m", "tests.faults.run", "--smoke"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("no C compiler for the shim")
    assert done.returncode == 0, done.stderr[-4000:]
    ran = {line.split(" | ")[0].removeprefix("| ") for line in done.stdout.splitlines()}
    assert ran == set(SECTIONS), done.stdout
