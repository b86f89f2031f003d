"""The project's own files, for the tests that read source instead of running it."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "tailor_fast"


def files(folder: str, pattern: str = "*.py") -> list[Path]:
    """Files below a folder of the project, sorted."""
    return sorted((ROOT / folder).rglob(pattern))


def name_of(path: Path) -> str:
    """``tailor_fast/ops/gram/api.py`` gives ``tailor_fast.ops.gram.api``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def parse(path: Path) -> ast.Module:
    """Syntax tree of one file."""
    return ast.parse(path.read_text(), filename=str(path))


def imported(path: Path) -> Iterator[str]:
    """Full names of what a file imports anywhere in it, functions included.

    ``from a import b`` gives ``a.b`` when that is a module of the project, else ``a``.
    """
    package = name_of(path) if path.stem == "__init__" else name_of(path).rpartition(".")[0]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(part for part in (above, node.module) if part)
            for alias in node.names:
                inner = f"{source}.{alias.name}"
                yield inner if _is_module(inner) else source


def _is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    ends = (".py", ".pyi", "/__init__.py")
    return any(Path(f"{path}{end}").exists() for end in ends)
