"""Other people's programs for the tests, each in a folder of its own (``make integrations``)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.source_tree import ROOT

FOLDERS = ROOT / ".venv-integrations"


def environment(name: str) -> dict[str, str]:
    """The environment in which Python finds the packages of ``NAME.txt`` before its own.

    Skips the test where they are not installed.
    """
    folder = FOLDERS / name
    if not (folder / ".installed").is_file():
        pytest.skip(f"{name} is not installed: make integrations")
    path = [str(folder), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "PYTHONWARNINGS": "ignore",  # those are other people's
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "1000",  # their logs break no sentence
    }


_FORKS = """
import importlib, json, os, sys, traceback
modules, jobs = json.loads(sys.argv[1])
for name in modules:
    importlib.import_module(name)
for number, (main, arguments) in enumerate(jobs):
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_WRONLY | os.O_CREAT, 0o666), stream)
        module, _, function = main.partition(":")
        try:
            code = getattr(importlib.import_module(module), function)(arguments)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code or 0)
    with open("codes", "a") as codes:  # other people print on any stream
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=codes)
"""


class Ran(NamedTuple):
    """What became of one command."""

    code: int
    out: str
    err: str


def run_all(
    name: str, modules: Sequence[str], jobs: Sequence[tuple[str, Sequence[object]]], cwd: Path
) -> list[Ran]:
    """Run commands one after the other, each in a process of its own, in the environment ``name``.

    Args:
        name: of the environment.
        modules: imported once, before the first command: that takes longer than all the rest.
        jobs: ``module:function`` and the list of arguments that it takes.
        cwd: an empty directory.
    """
    told = json.dumps([list(modules), [(main, list(map(str, given))) for main, given in jobs]])
    done = subprocess.run(
        [sys.executable, "-c", _FORKS, told],
        env=environment(name),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    codes = (cwd / "codes").read_text().split()
    return [
        Ran(int(code), (cwd / f"{n}.out").read_text(), (cwd / f"{n}.err").read_text())
        for n, code in enumerate(codes)
    ]
