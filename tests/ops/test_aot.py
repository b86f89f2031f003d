"""Every Triton kernel compiles for the cards that are supported, without spills, and can launch.

Compiled with the installed triton, and with the oldest one that is supported: ``make triton36``
puts that beside the environment, and ``make test`` does so first. A form takes 0.1 to 1 s for each
card, and nothing is run. Triton's cache stands in pytest's: a form that has not changed since the
last run is not compiled again (``pytest --cache-clear`` forgets them).
"""

import ast
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tailor_fast.ops import OPS
from tests.ops.aot.cards import CARDS, faults
from tests.source_tree import PACKAGE, ROOT, parse

pytest.importorskip("triton", reason="triton is not installed: there is no compiler to ask")

OLDEST = ROOT / ".venv-triton36"
FAULTY = "tests.ops.aot.faulty"
TRITONS = ("installed", "oldest")
Lines = list[dict[str, Any]]


@cache
def compiled(module: str, triton: str, cache_dir: Path) -> Lines:
    """What the forms of one module need, compiled in a process of its own."""
    before = [str(OLDEST)] if triton == "oldest" else []
    environment = {
        name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"
    } | {
        "PYTHONPATH": os.pathsep.join([*before, str(ROOT)]),
        "TRITON_CACHE_DIR": str(cache_dir),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.aot", module],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture
def cache_dir(request: pytest.FixtureRequest) -> Path:
    """Triton's cache. Its keys cover the sources, the options and the compiler itself."""
    return request.config.cache.mkdir("triton")


@pytest.fixture(params=TRITONS)
def triton_version(request: pytest.FixtureRequest) -> str:
    if request.param == "oldest" and not (OLDEST / ".installed").is_file():
        pytest.skip("the oldest supported triton is not here: make triton36 fetches it")
    return request.param


def told(lines: Lines) -> list[str]:
    """Faults; where integers are 1, as for a matrix of one column, a spill is none."""
    return [
        f"{line['form']} on sm_{line['capability']} with triton {line['triton']}: {fault}"
        for line in lines
        for fault in faults(line)
        if not (line["form"].endswith(", integers 1") and "spilled" in fault)
    ]


@pytest.mark.parametrize("op", OPS)
def test_every_form_compiles_and_can_launch(op: str, triton_version: str, cache_dir: Path) -> None:
    lines = compiled(f"tailor_fast.ops.{op}.triton", triton_version, cache_dir)
    assert not told(lines), "\n".join(told(lines))
    names = {line["form"] for line in lines}
    assert names
    assert len(lines) == len(names) * len(CARDS), "two forms of one name"


@pytest.mark.parametrize("op", OPS)
def test_every_kernel_has_a_form(op: str, cache_dir: Path) -> None:
    """A kernel is a ``triton.jit`` function that no other one calls."""
    folder = PACKAGE / "ops" / op
    jitted, called = set(), set()
    for path in [*folder.glob("triton.py"), *folder.glob("triton/**/*.py")]:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef) and jit(node):
                jitted.add(node.name)
                called |= {
                    call.func.id
                    for call in ast.walk(node)
                    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name)
                }
    lines = compiled(f"tailor_fast.ops.{op}.triton", "installed", cache_dir)
    assert jitted - called == {line["kernel"] for line in lines}


def jit(node: ast.FunctionDef) -> bool:
    return any(
        ast.unparse(decorator).split("(")[0] in ("triton.jit", "jit")
        for decorator in node.decorator_list
    )


def test_faults_are_found(triton_version: str, cache_dir: Path) -> None:
    """The checker is worth what it sees: a spill, too much shared memory, no compilation."""
    lines = compiled(FAULTY, triton_version, cache_dir)
    expected = {
        "fits": None,
        "near": None,
        "near, integers 1": None,
        "far": None,
        "method": None,
        "method, integers 1": "does not compile: CompilationError",
        "spills": "spilled to local memory",
        "shared": "bytes of shared memory, the card has",
        "broken": "does not compile: CompilationError",
        "misdescribed": "but the form describes ['z']",
    }
    assert len(lines) == len(expected) * len(CARDS)
    for line in lines:
        found, wanted = faults(line), expected[line["form"]]
        assert (found == []) if wanted is None else (wanted in found[0])


# Products of 32 bits that count tiles, of which there are no more than programs.
COUNTS_OF_TILES = {
    "_moment_kernel": 7,  # rows and columns of the triangle
    "classify_kernel": 1,  # the rest of a division: a segment of its row
    "list_mark_kernel": 1,  # likewise
    "digits_kernel": 1,  # histograms, of which all fit into memory
}


@pytest.mark.parametrize("op", OPS)
def test_addresses_are_not_multiplied_in_32_bits(
    op: str, triton_version: str, cache_dir: Path
) -> None:
    for line in compiled(f"tailor_fast.ops.{op}.triton", triton_version, cache_dir):
        allowed = COUNTS_OF_TILES.get(line["kernel"], 0)
        assert len(line["narrow"]) <= allowed, (line["form"], line["narrow"])


def test_a_narrow_address_is_found(triton_version: str, cache_dir: Path) -> None:
    lines = compiled(FAULTY, triton_version, cache_dir)
    found = {line["form"]: len(line["narrow"]) for line in lines if "narrow" in line}
    assert found["near"] == 1
    assert not found["far"] + found["fits"] + found["shared"]


def test_registers_limit_the_warps() -> None:
    line = {"capability": 90, "stack": 0, "local": 0, "shared": 0, "registers": 128}
    assert faults(line | {"warps": 16}) == []
    assert faults(line | {"warps": 32}) == ["128 registers cannot launch 32 warps"]
    # A warp gets 256 registers at a time: 65 per thread take as many as 72.
    assert faults(line | {"registers": 64, "warps": 32}) == []
    assert faults(line | {"registers": 65, "warps": 32}) != []


def test_the_oldest_triton_is_the_one_promised(cache_dir: Path) -> None:
    if not (OLDEST / ".installed").is_file():
        pytest.skip("the oldest supported triton is not here: make triton36 fetches it")
    lines = compiled(FAULTY, "oldest", cache_dir)
    promised = (ROOT / "pyproject.toml").read_text()
    version = lines[0]["triton"].removesuffix(".0")
    assert f'gpu = ["triton>={version}"]' in promised
