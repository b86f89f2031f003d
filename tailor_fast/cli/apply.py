"""``tailor-fast apply``: a checkpoint and a patch in, the patched checkpoint out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailor_fast.cli.diff import Overwriting

if TYPE_CHECKING:
    from tailor_fast.patchfile import Applied


@dataclass(frozen=True, kw_only=True)
class SwitchOptions(Overwriting):
    """What ``apply`` and ``revert`` share: ``PATCH -o OUT``."""

    patch: Annotated[Path, typer.Argument(metavar="PATCH", help="What `diff` wrote.")]
    out: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="OUT", help="Directory; a file if the input is one."),
    ]
    out_shard_size: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Size of an output file.", show_default="5GB")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ApplyOptions(SwitchOptions):
    """``BASE PATCH -o OUT``."""

    base: Annotated[
        Path, typer.Argument(metavar="BASE", help="Checkpoint that the patch was made from.")
    ]


def apply(options: ApplyOptions) -> None:
    """Write the checkpoint that PATCH makes of BASE, bit for bit."""
    from tailor_fast.patchfile import apply_patch

    switch(options, options.base, apply_patch, "is what the patch makes already")


def switch(options: SwitchOptions, source: Path, run: Callable[..., Applied], already: str) -> None:
    """Run ``apply_patch`` or ``revert_patch`` and say what was done."""
    from tailor_fast.checkpoint import parse_size
    from tailor_fast.cli.progress import shown
    from tailor_fast.cli.tables import facts, show, shown_size

    size = options.out_shard_size
    with shown(options.quiet) as progress:
        done = run(
            source,
            options.patch,
            options.out,
            overwrite=options.overwrite,
            max_shard_bytes=None if size is None else parse_size(size),
            progress=progress,
        )
    if options.quiet:
        return
    if not done.written:
        show(f"{source}: {already}; nothing was written")
        return
    changed = f"{done.words:,} weights in {done.tensors:,} tensors"
    show(facts({"out": f"{options.out}, {shown_size(done.nbytes)}", "changed": changed}))
