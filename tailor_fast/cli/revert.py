"""``tailor-fast revert``: a patched checkpoint and its patch in, the base out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tailor_fast.cli.apply import SwitchOptions, switch


@dataclass(frozen=True, kw_only=True)
class RevertOptions(SwitchOptions):
    """``PATCHED PATCH -o OUT``."""

    patched: Annotated[
        Path, typer.Argument(metavar="PATCHED", help="Checkpoint that the patch made.")
    ]


def revert(options: RevertOptions) -> None:
    """Take PATCH off PATCHED and write the checkpoint that it was made from, bit for bit."""
    from tailor_fast.patchfile import revert_patch

    switch(options, options.patched, revert_patch, "is what the patch was made from already")
