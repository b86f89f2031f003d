"""``tailor-fast inspect``: what a checkpoint, an output or a patch file consists of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailor_fast.cli.options import Options

if TYPE_CHECKING:
    from tailor_fast.patchfile import PatchInspection
    from tailor_fast.patching.inspecting import Inspection


@dataclass(frozen=True, kw_only=True)
class InspectOptions(Options):
    """``PATH``."""

    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="Checkpoint file, directory, output, or patch file."),
    ]
    json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False


def inspect(options: InspectOptions) -> None:
    """Show what a checkpoint, an output or a patch file consists of."""
    from tailor_fast.patchfile import inspect_patch, is_patch

    if is_patch(options.path):
        patch = inspect_patch(options.path)
        _show_json(patch) if options.json else _show_patch(patch, verbose=options.verbose)
        return
    from tailor_fast.patching.inspecting import inspect_path

    found = inspect_path(options.path)
    _show_json(found) if options.json else _show_checkpoint(found, verbose=options.verbose)


def _show_json(found: Inspection | PatchInspection) -> None:
    from json import dumps

    from tailor_fast.cli.tables import show

    show(dumps(asdict(found), indent=2, ensure_ascii=False, default=str))


def _show_patch(found: PatchInspection, *, verbose: bool) -> None:
    from tailor_fast.cli.tables import facts, folded, share, show, shown_size, table

    show(facts(found.facts))
    show("")
    tensors = [
        (t.name, f"{t.dtype} {list(t.shape)}", (t.words, t.changed, t.nbytes))
        for t in found.tensors
    ]
    rows = [(name, 1, form, sums) for name, form, sums in tensors]
    show(
        table(
            ("tensors", "number", "form", "weights", "changed", "share", "size"),
            [
                (name, count, form, words, changed, share(changed, words), shown_size(nbytes))
                for name, count, form, (words, changed, nbytes) in (
                    rows if verbose else folded(tensors)
                )
            ],
        )
    )


def _show_checkpoint(found: Inspection, *, verbose: bool) -> None:
    from tailor_fast.cli.tables import facts, show, shown_size, table

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
    if verbose:
        show("")
        show(
            table(
                ("tensor", "dtype", "shape", "file"),
                [(t.name, t.dtype, list(t.shape), t.shard) for t in found.tensors],
            )
        )
    for warning in found.warnings:
        show(f"warning: {warning}")
