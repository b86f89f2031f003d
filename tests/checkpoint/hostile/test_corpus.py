"""Every hostile file, as BASE and as TUNED: one exact error, one sentence, and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.checkpoint.files import raw_file
from tests.checkpoint.hostile import framing, names, sharded, tensors, text
from tests.checkpoint.hostile.cases import Case
from tests.checkpoint.hostile.legal import LEGAL, Legal

CASES = [*framing.CASES, *text.CASES, *names.CASES, *tensors.CASES, *sharded.CASES]
MOST_SECONDS = 2.0  # of processor time, so that a busy machine fails no test
MOST_BYTES = 150_000_000
SOME = [case for case in CASES if case.name in {
    *("empty file", "git-lfs pointer", "claims 100 GB", "deep objects", "zip of torch.save"),
    *("name with a terminal command", "dtype 'F128'", "shape [-2]", "index is a list"),
    *("shard '../secret.safetensors'", "shard is a pipe", "more shards than a process may open"),
}]  # fmt: skip


class Worker:
    """The other end of ``worker``."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.checkpoint.hostile.worker"]
        root = Path(__file__).parents[3]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=root,
            env=environment,
        )

    def __call__(self, run: str, *arguments: object) -> dict[str, Any]:
        """Run one case in a process of its own."""
        request = {"run": run, "arguments": [str(argument) for argument in arguments]}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=300)


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    started = Worker()
    yield started
    started.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that goes at once: some cases have 100 MB."""
    with TemporaryDirectory() as name:
        for part in ("hostile", "work"):
            (Path(name) / part).mkdir()
        fields = {"layer.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
        (Path(name) / "good.safetensors").write_bytes(raw_file(fields, bytes(16)))
        yield Path(name)


def pairs(folder: Path, hostile: Path) -> list[tuple[Path, Path]]:
    good = folder / "good.safetensors"
    return [(hostile, good), (good, hostile)]


def test_there_are_enough() -> None:
    titles = [case.name for case in CASES]
    assert len(titles) == len(set(titles))
    assert len(titles) >= 300
    assert len(SOME) == 12


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_refused(case: Case, folder: Path, worker: Worker) -> None:
    hostile = case.write(folder / "hostile")
    for base, tuned in pairs(folder, hostile):
        ran = worker("patch", base, tuned, folder / "work" / "out")
        message = ran["message"]
        assert (ran["error"], ran["exit_code"]) == (case.error, case.exit_code), message
        assert ran["path"].startswith(str(hostile)), message
        assert ran["tensor"] == case.tensor, message
        for piece in case.says:
            assert piece in message
        assert ran["remedy"]
        assert message.endswith(f"; {ran['remedy']}")
        assert message.isprintable()
        assert len(message) < 800
        assert ran["seconds"] < MOST_SECONDS
        assert ran["grown"] < MOST_BYTES
        assert list((folder / "work").iterdir()) == []


@pytest.mark.parametrize("case", LEGAL, ids=[case.name for case in LEGAL])
def test_opened(case: Legal, folder: Path, worker: Worker) -> None:
    ran = worker("open", case.write(folder / "hostile"))
    assert ran["tensors"] == case.tensors
    assert len(ran["warnings"]) == bool(case.warns)
    assert case.warns in "".join(ran["warnings"])
    assert ran["seconds"] < MOST_SECONDS
    assert ran["grown"] < MOST_BYTES


NAMES = [
    "a$\\frac{$",
    "[/red]x",
    "../../outside",
    "/outside",
    "..",
    "<b>",
    "`|`",
    "%s{0}",
    "-rf",
    "\u202e",
]


def test_names_never_become_paths(folder: Path, worker: Worker) -> None:
    """What a tensor is called reaches tables, a picture and a card, but no file of that name."""
    fields = {
        f"{name}.weight": {"dtype": "F32", "shape": [2, 2], "data_offsets": [16 * i, 16 * i + 16]}
        for i, name in enumerate(NAMES)
    }
    base, tuned = folder / "hostile" / "base.safetensors", folder / "hostile" / "tuned.safetensors"
    base.write_bytes(raw_file(fields, bytes(16 * len(NAMES))))
    tuned.write_bytes(raw_file(fields, bytes.fromhex("0000803f") * 4 * len(NAMES)))
    before = {path for path in folder.rglob("*") if path.is_file()}
    out, patch = folder / "work" / "out", folder / "work" / "p.tailor.safetensors"
    assert worker("command", "patch", base, tuned, "-o", out)["exit_code"] == 0
    assert worker("command", "inspect", out)["exit_code"] == 0
    assert worker("command", "diff", base, tuned, "-o", patch)["exit_code"] == 0
    again = out.with_name("again.safetensors")
    assert worker("command", "apply", base, patch, "-o", again)["exit_code"] == 0
    made = {path for path in folder.rglob("*") if path.is_file()} - before
    report = ("README.md", "tailor_manifest.json", "tailor_report.json", "tailor_report.png")
    assert made == {patch, again, *(out / name for name in ("model.safetensors", *report))}


@pytest.mark.parametrize("case", SOME, ids=[case.name for case in SOME])
@pytest.mark.parametrize("command", ["patch", "plan", "diff"])
def test_on_the_command_line(command: str, case: Case, folder: Path, worker: Worker) -> None:
    hostile = case.write(folder / "hostile")
    out = folder / "work" / ("out.tailor.safetensors" if command == "diff" else "out")
    both = pairs(folder, hostile)
    for base, tuned in both if command == "patch" else both[:1]:
        ran = worker("command", command, base, tuned, "-o", out)
        assert ran["exit_code"] == case.exit_code, ran["message"]
        assert ran["message"].startswith("tailor-fast: error: ")
        assert ran["message"].count("\n") == 1
        for piece in case.says:
            assert piece in ran["message"]
        assert list((folder / "work").iterdir()) == []


@pytest.mark.parametrize("length", [0x3C, 0x7B, 0x0280, 0x0480])
def test_a_cut_header_is_called_cut_whatever_its_length_looks_like(
    length: int, folder: Path, worker: Worker
) -> None:
    """Little-endian, these begin like a web page, a JSON text and two pickles."""
    cut = folder / "hostile" / "model.safetensors"
    cut.write_bytes(length.to_bytes(8, "little") + b'{"a":{"dtype":"U8"')
    ran = worker("patch", cut, cut, folder / "work" / "out")
    assert ran["error"] == "TruncatedError"
    assert f"needs {8 + length}" in ran["message"]
