"""The command line ``tailor-fast``: one file per command, which only reads options and prints.

Nothing heavier than typer is imported before a command runs.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: what follows the program's name; None takes the process's own.
    """
    from tailor_fast.cli.app import run

    return run(arguments)
