"""Who may import whom, and how little ``import tailor_fast`` loads.

The arrows are checked twice: in the source, where every new module is covered, and in a fresh
process, where imports made through ``importlib`` show too.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tailor_fast._core.backend import BACKENDS
from tests.source_tree import PACKAGE, ROOT, files, imported, name_of, parse

FLOOR = {"_core", "_version"}
OPS = FLOOR | {"ops", "_C"}
MIDDLE = OPS | {"checkpoint", "models"}
JOBS = MIDDLE | {"calibration", "patchfile", "patching", "stitching"}
# Every module of the package and what of the package it may import; "" is tailor_fast itself.
ALLOWED: dict[str, set[str]] = {
    "_C": set(),
    "_version": set(),
    "_core": {"_version"},
    "testing": set(),
    "errors": FLOOR,
    "bench": OPS,
    "batch": JOBS,
    "ops": OPS,
    "checkpoint": FLOOR,
    "models": FLOOR,
    "patchfile": MIDDLE,
    "calibration": MIDDLE,
    "patching": JOBS - {"stitching"},
    "stitching": JOBS,
    "evaluation": MIDDLE,
    "integrations": JOBS | {""},
    "cli": JOBS | {"", "batch", "bench", "evaluation", "integrations"},
    "__main__": {"cli"},
    "": JOBS,
}
HEAVY = {"triton", "transformers", "pydantic", "matplotlib", "typer", "rich", "tailor_fast._C"}
LIGHT = ["tailor_fast", "tailor_fast._core", "tailor_fast.ops", "tailor_fast.checkpoint"]
IMPLEMENTATIONS = set(BACKENDS) - {"auto"}

MODULES = files("tailor_fast")
IDS = [str(path.relative_to(PACKAGE)) for path in MODULES]


def top(name: str) -> str:
    """``tailor_fast.ops.gram`` gives ``ops``; ``tailor_fast`` gives the empty string."""
    return name.split(".")[1] if "." in name else ""


def own_imports(path: Path) -> list[str]:
    return [name for name in imported(path) if name.split(".")[0] == "tailor_fast"]


def implementation(name: str) -> tuple[str, ...] | None:
    """``(op, backend)`` of a module that implements an op, None for any other."""
    parts = name.split(".")
    found = parts[1:2] == ["ops"] and len(parts) > 3 and parts[3] in IMPLEMENTATIONS
    return tuple(parts[2:4]) if found else None


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_arrows(path: Path) -> None:
    here = top(name_of(path))
    assert here in ALLOWED, f"tailor_fast.{here} is missing from the table"
    wrong = [name for name in own_imports(path) if top(name) not in ALLOWED[here] | {here}]
    assert not wrong


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_implementations_are_reached_by_dispatch_alone(path: Path) -> None:
    here = implementation(name_of(path))
    wrong = [name for name in own_imports(path) if implementation(name) not in (None, here)]
    assert not wrong


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_only_triton_modules_import_triton(path: Path) -> None:
    here = implementation(name_of(path))
    if here is None or here[1] != "triton":
        assert "triton" not in {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", MODULES, ids=IDS)
def test_one_reader_of_the_environment(path: Path) -> None:
    readers = {"environ", "environb", "getenv", "getenvb", "putenv"}
    found = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            found.update(alias.name for alias in node.names)
    if path != PACKAGE / "_core" / "env.py":
        assert not found & readers


def test_the_source_reader_sees_every_kind_of_import(tmp_path: Path) -> None:
    """The tests above are worth what ``imported`` finds: every spelling must be seen."""
    path = PACKAGE / "ops" / "gram" / "probe.py"
    source = """
import tailor_fast.models
from tailor_fast import checkpoint, __version__
from ...patchfile import diff
from . import schema
def late():
    from tailor_fast.ops.codec.native import encode_patch
"""

    class Probe(type(path)):
        def read_text(self, *args, **kwargs) -> str:
            return source

    assert list(imported(Probe(path))) == [
        "tailor_fast.models",
        "tailor_fast.checkpoint",
        "tailor_fast",
        "tailor_fast.patchfile",
        "tailor_fast.ops.gram.schema",
        "tailor_fast.ops.codec.native",
    ]


FRESH = """
import json, os, sys
import torch
names = json.loads(sys.argv[1])
before = set(sys.modules)
for name in names:
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        __import__(name)
        print(json.dumps([name, sorted(set(sys.modules) - before)]), flush=True)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit("import failed: " + name)
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """What each package adds to ``sys.modules`` beyond torch, each in a process of its own."""
    packages = {path.parent for path in files("tailor_fast", "__init__.py")}
    single = [path for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")]
    names = sorted({name_of(path) for path in [*packages, *single]})
    done = subprocess.run(
        [sys.executable, "-c", FRESH, json.dumps(names)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {name: set(modules) for name, modules in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", LIGHT)
def test_light_packages_stay_light(loaded: dict[str, set[str]], name: str) -> None:
    heavy = {module for module in loaded[name] if module in HEAVY or module.split(".")[0] in HEAVY}
    assert not heavy


def test_ops_load_no_backend_before_a_call(loaded: dict[str, set[str]]) -> None:
    for name in loaded:
        if name.startswith("tailor_fast.ops.") and implementation(name) is None:
            assert not loaded[name] & HEAVY
            fast = {implementation(module) for module in loaded[name]} - {
                None,
                implementation(name),
            }
            assert not fast, name


def test_arrows_in_a_fresh_process(loaded: dict[str, set[str]]) -> None:
    for name, modules in loaded.items():
        reachable = {top(name)}
        for _ in ALLOWED:  # the closure of the arrows
            reachable |= {step for module in reachable for step in ALLOWED[module]}
        # Python imports tailor_fast before anything in it.
        own = {module for module in modules if module.split(".")[0] == "tailor_fast"}
        got = {top(module) for module in own - loaded["tailor_fast"]}
        assert got <= reachable, name
