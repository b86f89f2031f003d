"""A process that runs each hostile case in a fork of itself and says what became of it.

Requests and answers are lines of JSON. The fork is what makes the figures the case's own: its peak
memory begins at what it inherits, its processor time at nothing, and what it breaks ends with it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tailor_fast import patch_checkpoint
from tailor_fast.checkpoint import open_checkpoint
from tailor_fast.cli import main

HANG_SECONDS = 60
_ROOM = 1 << 30  # of address space; what asks for more gets MemoryError instead of the machine's
_OPEN_FILES = 256


def _status(field: str) -> int:
    """A line of /proc/self/status that counts kB, in bytes."""
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"{field}:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) * 1024


def _patch(base: str, tuned: str, out: str) -> dict[str, Any]:
    try:
        patch_checkpoint(base, tuned, out)
    except Exception as error:  # noqa: BLE001  whatever it is, the test judges it
        fields = ("exit_code", "path", "tensor", "remedy")
        said = {name: getattr(error, name, None) for name in fields}
        return {"error": type(error).__name__, "message": str(error), **said}
    return {"error": None}


def _command(*arguments: str) -> dict[str, Any]:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
        code = main(list(arguments))
    return {"exit_code": code, "message": errors.getvalue()}


def _open(path: str) -> dict[str, Any]:
    with open_checkpoint(path) as checkpoint:
        return {"tensors": len(checkpoint.tensors), "warnings": list(checkpoint.warnings)}


RUNS: dict[str, Callable[..., dict[str, Any]]] = {
    "patch": _patch,
    "command": _command,
    "open": _open,
}


def _run(request: dict[str, Any]) -> dict[str, Any]:
    signal.alarm(HANG_SECONDS)
    space = _status("VmSize") + _ROOM
    resource.setrlimit(resource.RLIMIT_AS, (space, space))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
    before, start = _status("VmRSS"), time.process_time()
    done = RUNS[request["run"]](*request["arguments"])
    seconds = time.process_time() - start
    return done | {"seconds": seconds, "grown": _status("VmHWM") - before}


def _forked(request: dict[str, Any]) -> dict[str, Any]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = json.dumps(_run(request), ensure_ascii=True).encode()
            with open(writer, "wb") as pipe:  # noqa: PTH123  a descriptor, not a path
                pipe.write(answer)
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:  # noqa: PTH123
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not answer:
        return {"error": f"ended by {os.waitstatus_to_exitcode(status)}", "message": ""}
    found: dict[str, Any] = json.loads(answer)
    return found


if __name__ == "__main__":
    for line in sys.stdin:
        sys.stdout.write(json.dumps(_forked(json.loads(line))) + "\n")
        sys.stdout.flush()
