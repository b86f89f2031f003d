"""Run the authors' script, unchanged, on this library.

    python -m tailor_fast.integrations.official main_model_tailor.py --output_dir out ...

Both modules of theirs that define ``SparseGPT`` are replaced before anything can import them:
``llava.sparsegpt`` (weights 0.5/0.5, four return values) and ``llava.train.sparsegpt`` (0.8/0.2,
none). Everything else is theirs.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import get_args

from torch import nn

from tailor_fast._core.backend import BACKENDS, Backend
from tailor_fast.integrations.sparsegpt import Mode, SparseGPT, TrainingSparseGPT

REPLACED: Mapping[str, type[SparseGPT]] = {
    "llava.sparsegpt": SparseGPT,
    "llava.train.sparsegpt": TrainingSparseGPT,
}


def _configured(kind: type[SparseGPT], mode: Mode, backend: Backend) -> type[SparseGPT]:
    """The class with the authors' constructor, which takes the two layers alone."""

    class Configured(kind):  # type: ignore[misc, valid-type]  # a base class in a variable
        def __init__(self, layer: nn.Module, pretrain_layer: nn.Module) -> None:
            super().__init__(layer, pretrain_layer, mode=mode, backend=backend)

    Configured.__name__ = Configured.__qualname__ = "SparseGPT"
    return Configured


class _Replacement(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the replaced modules, and makes them, with the class as their only name.

    Attributes:
        made: names of the modules that were imported.
    """

    def __init__(self, classes: Mapping[str, type[SparseGPT]]) -> None:
        self._classes = classes
        self.made: list[str] = []

    def find_spec(
        self, fullname: str, _path: object, _target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self._classes:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, origin=__name__)

    def create_module(self, _spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["SparseGPT"] = self._classes[module.__name__]
        self.made.append(module.__name__)


@contextmanager
def replaced(*, mode: Mode = "official", backend: Backend = "auto") -> Iterator[list[str]]:
    """Replace the authors' classes for imports made within the block.

    Args:
        mode: of the classes; see ``SparseGPT``.
        backend: of the classes.

    Yields:
        The names of the replaced modules that were imported, filled as they are.

    Raises:
        RuntimeError: one of the modules is imported already, so that its class is in use.
    """
    taken = [name for name in REPLACED if name in sys.modules]
    if taken:
        raise RuntimeError(f"{taken[0]} is imported already; replace it before the first import")
    classes = {name: _configured(kind, mode, backend) for name, kind in REPLACED.items()}
    finder = _Replacement(classes)
    sys.meta_path.insert(0, finder)
    try:
        yield finder.made
    finally:
        sys.meta_path.remove(finder)
        for name in finder.made:
            sys.modules.pop(name, None)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a script with the classes replaced; returns the exit code.

    Args:
        arguments: options, the script, and its own arguments; None takes the process's.
    """
    options = _parser().parse_args(arguments)
    script = Path(options.script)
    if not script.is_file():
        sys.stderr.write(f"{script}: no such script; give the path of the authors' script\n")
        return 65
    sys.argv = [str(script), *options.arguments]
    sys.path.insert(0, str(script.resolve().parent))
    with replaced(mode=options.mode, backend=options.backend) as made:
        runpy.run_path(str(script), run_name="__main__")
    if not made:
        names = " nor ".join(REPLACED)
        sys.stderr.write(f"{script}: imported neither {names}; nothing was replaced\n")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tailor_fast.integrations.official",
        description="Run a script of the Model Tailor repository with its class replaced.",
    )
    parser.add_argument("--mode", choices=get_args(Mode), default="official")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("script", metavar="SCRIPT", help="for example main_model_tailor.py")
    parser.add_argument(
        "arguments", metavar="ARGS", nargs=argparse.REMAINDER, help="what the script takes"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
