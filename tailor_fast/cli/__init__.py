"""The command line ``tailor-fast``: one file per command, which only reads options and prints.

Nothing heavier than typer is imported before a command runs.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: what follows the program's name; None takes the process's own.
    """
    from tailor_fast.cli.app import run

    if arguments is not None:
        return run(arguments)
    # Torch makes a million objects that all stay: looking for garbage among them, while it is
    # imported and once more at the end, takes half a second.
    gc.set_threshold(100_000, 50, 50)
    try:
        return run(None)
    finally:
        gc.freeze()
