"""``tailor-fast inspect``: what a checkpoint or an output consists of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tailor_fast.cli.options import Options


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Options):
    """``PATH``."""

    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="Checkpoint file, directory, or output.")
    ]


def inspect(options: InspectOptions) -> None:
    """Show dtypes, sizes and files of a checkpoint, and of an output what was patched."""
    from tailor_fast.cli.tables import facts, show, shown_size, table
    from tailor_fast.patching.inspecting import inspect_path

    found = inspect_path(options.path)
    show(facts(found.facts))
    show("")
    show(
        table(
            ("dtype", "tensors", "elements", "size"),
            [(u.dtype, u.tensors, u.elements, shown_size(u.nbytes)) for u in found.dtypes],
        )
    )
    show("")
    show(
        table(
            ("file", "tensors", "size"),
            [(shard.name, shard.tensors, shown_size(shard.nbytes)) for shard in found.shards],
        )
    )
    if options.verbose:
        show("")
        show(
            table(
                ("tensor", "dtype", "shape", "file"),
                [(t.name, t.dtype, list(t.shape), t.shard) for t in found.tensors],
            )
        )
    for warning in found.warnings:
        show(f"warning: {warning}")
