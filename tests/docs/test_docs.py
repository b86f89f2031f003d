"""The documentation: it builds, and every command and every code block in it runs."""

from __future__ import annotations

import importlib.util
import os
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tailor_fast.integrations import official
from tests.checkpoint.adapters import factors, save_adapter
from tests.cli.running import CommandLine
from tests.integrations.test_official import upstream_checkout
from tests.patching.disk import llama, llama_pair, write_texts
from tests.source_tree import ROOT
from tests.stitching.disk import save, tuned_by

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
IDS = [path.name for path in PAGES]
# Lines of a shell that set things up, or start what has tests of its own.
ELSEWHERE = re.compile(r"(pip install |make (demo|test|bench|docs|asan)\b)")
SPARSEGPT = "python -m tailor_fast.integrations.official "


class Block(NamedTuple):
    """One fenced block of a page."""

    language: str
    title: str | None
    text: str


def blocks(path: Path) -> Iterator[Block]:
    fence = re.compile(r'^```(\w*)(?: title="(.+?)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
    for match in fence.finditer(path.read_text(encoding="utf-8")):
        yield Block(*match.groups())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of: a base, fine-tunes, samples, a checkout of the authors' code."""
    folder = tmp_path_factory.mktemp("docs")
    base, tuned = llama_pair(folder, blocks=2)
    base.rename(folder / "BASE")
    tuned.rename(folder / "TUNED")
    save(tuned_by(llama(blocks=2), 3), folder / "TUNED2")
    write_texts(folder / "new.jsonl", count=8)
    write_texts(folder / "new2.jsonl", count=8, seed=11)
    write_texts(folder / "old.jsonl", count=8, seed=9)
    for name, seed in (("many-new", 12), ("many-old", 13)):
        write_texts(folder / f"{name}.jsonl", count=128, seed=seed)
    save_adapter(folder / "ADAPTER", factors("model.layers.0.self_attn.q_proj", 32, 32))
    upstream_checkout(folder)
    return folder


@pytest.fixture
def place(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the current directory."""
    folder = tmp_path / "place"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize("path", PAGES, ids=IDS)
def test_every_block_runs(path: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tailor_fast = CommandLine(capsys)
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(path):
        if block.title is not None:
            (place / block.title).write_text(block.text)
        elif block.language == "sh":
            for line in block.text.splitlines():
                run_line(line, tailor_fast)
        elif block.language == "python":
            if "model" not in names:
                names["model"] = _model()
            exec(compile(block.text, f"{path.name}", "exec"), names)
        else:
            assert block.language in {"json", "yaml", "text"}, f"{path}: which language?"


def run_line(line: str, tailor_fast: CommandLine) -> None:
    command = re.sub(r"\[.*?\]", "", line.partition(" #")[0]).strip()
    if not command or ELSEWHERE.match(command):
        return
    if command.startswith(SPARSEGPT):
        assert official.main(shlex.split(command.removeprefix(SPARSEGPT))) == 0
        return
    one = re.sub(r"torchrun --nproc-per-node \d+ ", "torchrun ", command)
    program, *arguments = shlex.split(one)
    if program == "torchrun" and arguments[0].endswith(".py"):
        run_script(arguments[0])
        return
    if program == "torchrun":  # in one process: with several it has tests of its own
        assert arguments[:2] == ["-m", "tailor_fast"], line
        program, *arguments = "tailor-fast", *arguments[2:]
    assert program == "tailor-fast", line
    ran = tailor_fast(*arguments)
    assert ran.code == 0, f"{line}\n{ran.out}\n{ran.err}"


def run_script(path: str) -> None:
    """A script under torchrun, in a group of one process."""
    with pytest.MonkeyPatch.context() as patch, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": port}.items():
            patch.setenv(name, str(value))
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        free.close()
        runpy.run_path(path, run_name="__main__")


def _model() -> object:
    """The base model, which the page on patch files speaks of as ``model``."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained("BASE")


def test_every_page_is_in_the_table_of_contents() -> None:
    listed = re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: pip install 'tailor_fast[docs]'")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "site" / "index.html").is_file()
