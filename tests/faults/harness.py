"""Trials: a job in a process of its own that goes wrong at one moment, and what must hold then.

Everything is imported once; a trial is a fork. The preloaded ``shim.c`` counts the calls by which
the job changes its folder and lets the n-th of them fail, fall short, or kill the process.
"""

from __future__ import annotations

import ctypes
import enum
import faulthandler
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tailor_fast.cli import main
from tailor_fast.patching import checkpoints

SOURCE = Path(__file__).with_name("shim.c")
PATIENCE = 60.0  # seconds of watching after which a job counts as hung
TIMED = ("tailor_report.json", "tailor_report.png")  # hold times: not compared


class Kind(enum.IntEnum):
    """Calls that are counted, as in ``shim.c``."""

    OPEN = 0
    WRITE = 1
    SYNC = 2
    RENAME = 3
    UNLINK = 4
    MKDIR = 5
    ALLOCATE = 6
    LOCK = 7
    READ = 8
    TRUNCATE = 9
    MODE = 10


class Action(enum.IntEnum):
    """What becomes of the n-th call."""

    COUNT = 0
    KILL_BEFORE = 1
    KILL_AFTER = 2
    FAIL = 3
    SHORTEN = 4
    FAIL_ALWAYS = 5
    SKIP = 6


CHANGES = tuple(kind for kind in Kind if kind is not Kind.READ)


def build_shim(folder: Path) -> Path | None:
    """Compile the shim; None without a compiler."""
    library = folder / "shim.so"
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return None
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter"]
    subprocess.run([compiler, *flags, "-o", library, SOURCE, "-ldl"], check=True)
    return library


def shim() -> ctypes.CDLL:
    """The preloaded shim."""
    library = ctypes.CDLL(None)
    library.shim_arm.argtypes = (ctypes.c_char_p, ctypes.c_uint, ctypes.c_long, *[ctypes.c_int] * 2)
    for name in ("shim_calls", "shim_calls_of"):
        getattr(library, name).restype = ctypes.c_long
    return library


@dataclass(frozen=True)
class Fault:
    """What goes wrong: the ``moment``-th call of ``kinds`` inside the folder."""

    kinds: Sequence[Kind] = CHANGES
    moment: int = 0
    action: Action = Action.COUNT
    code: int = 0

    def arm(self, folder: Path) -> None:
        mask = sum(1 << kind for kind in self.kinds)
        shim().shim_arm(os.fsencode(folder), mask, self.moment, self.action, self.code)


@dataclass(frozen=True)
class Ended:
    """How a job ended: its exit code, or None if it was killed; what it said; seconds."""

    code: int | None
    said: str
    seconds: float


def start(work: Callable[[], int], said: Path, fault: Fault | None, folder: Path) -> int:
    """Run ``work`` in a fork whose stderr goes to the file ``said``; returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        fd = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(fd, 2)
        faulthandler.enable()  # to say where, if it hangs
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if fault is not None:
            fault.arm(folder)
        code = work()
        sys.stderr.flush()
    except BaseException as error:  # noqa: BLE001  a trial must end here, whatever it meets
        os.write(2, f"escaped: {error!r}".encode())
        os._exit(120)
    os._exit(code)


def wait(child: int, said: Path, began: float) -> Ended:
    """Wait for a fork; one that hangs is an error of its own."""
    watched, last = 0.0, time.monotonic()
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        now = time.monotonic()
        watched += min(now - last, 0.1)  # no longer: both may have been stopped meanwhile
        last = now
        if watched > PATIENCE:
            os.kill(child, signal.SIGABRT)
            os.waitpid(child, 0)
            raise AssertionError(f"the job hung: {said.read_text()}")
        time.sleep(0.001)
    code = None if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    return Ended(code, said.read_text() if said.exists() else "", time.monotonic() - began)


def files(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but those that hold times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in TIMED
    }


def digest(*places: Path) -> str:
    """One digest of all files below some folders or files."""
    total = hashlib.sha256()
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file():
                total.update(str(path).encode())
                total.update(path.read_bytes())
    return total.hexdigest()


@dataclass
class Lab:
    """A folder for trials of one command, and what it must write.

    Attributes:
        inputs: folder with everything that is read; must never change.
        folder: where trials write, beside ``inputs``; emptied for each.
        arguments: of the command line; ``OUT`` stands for the output.
        old: content that OUT has before; None for an absent OUT.
        golden: what OUT must hold in the end.
        counts: how many trials met what.
    """

    inputs: Path
    folder: Path
    arguments: tuple[str, ...]
    old: Path | None = None
    golden: dict[str, bytes] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checkpoints.draw_report = lambda _report: b"a picture"
        self.before = digest(self.inputs)
        self.reset()
        ended = self.run()
        assert ended.code == 0, ended.said
        self.golden = self.content()
        self.seconds = ended.seconds
        self.by_kind: dict[Kind, int] = {}

    @property
    def out(self) -> Path:
        """The output; its name is part of the model card."""
        return self.folder / ("out.safetensors" if self.is_file else "out")

    @property
    def is_file(self) -> bool:
        return self.arguments[0] == "diff"

    def reset(self) -> None:
        """Empty the folder, but for the old output."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        if self.old is not None:
            shutil.copytree(self.old, self.out)

    def content(self) -> dict[str, bytes]:
        return {"": self.out.read_bytes()} if self.is_file else files(self.out)

    def work(self, *more: str) -> int:
        """The job itself."""
        given = [str(self.out) if word == "OUT" else word for word in self.arguments]
        if self.old is not None:
            given.append("--overwrite")
        return main([*given, "-q", *more])

    def begin(self, fault: Fault | None = None, *more: str) -> int:
        return start(lambda: self.work(*more), self.said, fault, self.folder.parent)

    @property
    def said(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.stderr")

    def run(self, fault: Fault | None = None, *more: str) -> Ended:
        """Run the job to its end."""
        began = time.monotonic()
        return wait(self.begin(fault, *more), self.said, began)

    def state(self) -> str:
        """What OUT is: ``absent``, ``old`` or ``complete``; anything else is an error."""
        if not self.out.exists():
            assert self.old is None, "the old output is gone"
            return "absent"
        found = self.content()
        if found == self.golden:
            return "complete"
        half = f"half an output: {sorted(found)}"
        assert self.old is not None, half
        assert found == files(self.old), half
        return "old"

    def recover(self) -> str:
        """Check OUT after a failure, run again, check that it is golden and stands alone."""
        state = self.state()
        if state != "complete":
            ended = self.run()
            assert ended.code == 0, ended.said
        elif self.old is not None or self.leftovers():
            self.run()  # clears what is left, or refuses because OUT exists
        assert self.state() == "complete"
        assert self.leftovers() == [], self.leftovers()
        assert digest(self.inputs) == self.before, "an input changed"
        self.counts[state] = self.counts.get(state, 0) + 1
        return state

    def leftovers(self) -> list[str]:
        """What stands beside OUT."""
        return sorted(path.name for path in self.folder.iterdir() if path != self.out)

    def calls(self, kinds: Sequence[Kind] = CHANGES) -> int:
        """How many calls a whole run makes."""
        if not self.by_kind:
            self._count()
        return sum(self.by_kind[kind] for kind in kinds)

    def _count(self) -> None:
        self.reset()
        with tempfile.NamedTemporaryFile() as counted:

            def work() -> int:
                code = self.work()
                calls = [shim().shim_calls_of(kind) for kind in Kind]
                Path(counted.name).write_text(" ".join(map(str, calls)))
                return code

            child = start(work, self.said, Fault(tuple(Kind)), self.folder.parent)
            ended = wait(child, self.said, time.monotonic())
            assert ended.code == 0, ended.said
            calls = map(int, Path(counted.name).read_text().split())
            self.by_kind = dict(zip(Kind, calls, strict=True))
