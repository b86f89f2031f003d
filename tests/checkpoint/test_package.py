"""What the package is made of: its public names, what it imports, what it never does."""

import ast
import re
import sys
import tracemalloc
from pathlib import Path

import tailor_fast.checkpoint as package
from tailor_fast._core.errors import InputError, OutputError, StorageError, TailorError
from tailor_fast.checkpoint import errors

SOURCES = sorted(Path(package.__file__).parent.glob("*.py"))


def test_public_names_exist() -> None:
    assert all(hasattr(package, name) for name in package.__all__)
    assert len(set(package.__all__)) == len(package.__all__)


def imported(path: Path) -> set[str]:
    """Every module that a file imports, inside functions too."""
    found = set[str]()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found.add(node.module or "")
    return found


def test_it_stands_on_the_core_alone() -> None:
    for path in SOURCES:
        for name in imported(path):
            ours = name.startswith(("tailor_fast.checkpoint", "tailor_fast._core"))
            top = name.split(".")[0]
            theirs = ("torch", "xxhash", *(["huggingface_hub"] if path.name == "hub.py" else []))
            allowed = ours or top in sys.stdlib_module_names or top in theirs
            assert allowed, f"{path.name} imports {name}"


def test_it_never_loads_pickles_nor_maps_files() -> None:
    assert len(SOURCES) > 10
    for path in SOURCES:
        text = path.read_text()
        assert not re.search(r"torch\.load|import pickle|import mmap|os\.environ", text), path


def test_every_error_has_one_exit_code() -> None:
    families = (InputError, OutputError, StorageError)
    found = [value for value in vars(errors).values() if isinstance(value, type)]
    concrete = [e for e in found if issubclass(e, errors.CheckpointError)]
    concrete.remove(errors.CheckpointError)
    assert len(concrete) == 16
    for error in concrete:
        assert sum(issubclass(error, family) for family in families) == 1
        assert error("x").exit_code in (65, 73, 74)


def test_sentences_stay_printable() -> None:
    error = errors.MalformedError(
        "is wrong", path=b"/a\xff\n".decode("utf-8", "surrogateescape"), tensor="t\n" * 500
    )
    text = str(error)
    assert isinstance(error, TailorError)
    text.encode()
    assert "\n" not in text
    assert len(text) < 200
    assert text.startswith("/a\\\\xff\\n: tensor 't\\nt\\n")
    assert text.endswith(": is wrong")


def test_a_long_text_is_cut_before_it_is_escaped() -> None:
    """Escaped whole, a character that cannot be printed takes ten times its place."""
    long = "\U0001f600\0" * 10**6
    tracemalloc.start()
    shown = errors.quoted(long)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert shown.startswith("'\\U0001f600\\x00")
    assert len(shown) < 100
    assert peak < 100_000
