"""``tailor-fast diff``: what turns one checkpoint into another, to a patch file."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from tailor_fast.cli.options import Quietable


@dataclass(frozen=True, kw_only=True)
class Overwriting(Quietable):
    """Commands that write one output from files alone."""

    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = (
        False
    )


class Digest(StrEnum):
    """Algorithms of the digests in a patch file."""

    XXH3 = "xxh3-128"
    SHA256 = "sha256"


@dataclass(frozen=True, kw_only=True)
class DiffOptions(Overwriting):
    """``BASE TUNED -o PATCH``."""

    base: Annotated[Path, typer.Argument(metavar="BASE", help="Checkpoint that the patch is for.")]
    tuned: Annotated[
        Path, typer.Argument(metavar="TUNED", help="Checkpoint that it makes of BASE.")
    ]
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="PATCH", help="File to write: NAME.tailor.safetensors"),
    ]
    digest: Annotated[
        Digest, typer.Option(help="Digest of each tensor; sha256 is slower, withstands forgery.")
    ] = Digest.XXH3


def diff(options: DiffOptions) -> None:
    """Write what turns BASE into TUNED and back, bit for bit, to PATCH."""
    from tailor_fast.cli.progress import shown
    from tailor_fast.cli.tables import facts, share, show, shown_size
    from tailor_fast.patchfile import diff_checkpoints

    with shown(options.quiet) as progress:
        plan = diff_checkpoints(
            options.base,
            options.tuned,
            options.out,
            overwrite=options.overwrite,
            digest=options.digest.value,
            progress=progress,
        )
    if options.quiet:
        return
    show(
        facts(
            {
                "out": f"{options.out}, {shown_size(plan.file_bytes)}",
                "changed": f"{share(plan.changed, plan.words)}, {plan.changed:,} of"
                f" {plan.words:,} weights in {sum(1 for _ in plan.stored):,} of"
                f" {len(plan.entries):,} tensors",
            }
        )
    )
