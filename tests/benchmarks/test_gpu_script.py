"""``gpu.sh`` itself: what it does before it starts python."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.source_tree import ROOT


def shell(
    folder: Path, script: str, *arguments: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run ``gpu.sh`` with a python that is a shell script."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    return subprocess.run(
        ["benchmarks/gpu.sh", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHON": str(python)} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_failed_build_goes_on_without_native(tmp_path: Path) -> None:
    script = 'if [ "$1" = setup.py ]; then echo no compiler; exit 1; fi; echo "ran $*"; exit 1'
    done = shell(tmp_path, script, "check", "--seed", "3")
    assert "no compiler\nthe C++ extension could not be built: going on without native" in (
        done.stdout
    )
    assert "ran -m benchmarks.gpu --seconds" in done.stdout
    assert done.stdout.endswith("check --seed 3\n")
    assert done.returncode == 1  # the part's own
    assert "no compiler" not in shell(tmp_path, script, "block").stdout  # which needs none


@pytest.mark.parametrize("given", [{}, {"TRITON_CACHE_DIR": "/chosen"}])
def test_a_home_that_cannot_be_written(tmp_path: Path, given: dict[str, str]) -> None:
    home = tmp_path / "file"
    home.touch()
    script = 'echo "$TRITON_CACHE_DIR"; test -d "$TRITON_CACHE_DIR"; echo $?'
    done = shell(tmp_path, script, "block", HOME=str(home), TRITON_HOME=str(home), **given)
    folder, exists = done.stdout.split()
    assert (folder == "/chosen", exists) == ((True, "1") if given else (False, "0"))
    assert folder == "/chosen" or not Path(folder).exists()  # taken away at the end


def test_a_part_that_does_not_exist(tmp_path: Path) -> None:
    done = shell(tmp_path, "echo ran", "bench")
    assert done.returncode == 2
    assert "benchmarks/gpu.sh check" in done.stdout
    assert "ran" not in done.stdout.split()
