"""``tailor-fast verify``: is an output what it claims to be?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailor_fast.cli.options import Quietable

if TYPE_CHECKING:
    from tailor_fast.patching.verify import VerifyResult

VIOLATED = 1
_MOST_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Quietable):
    """``DIR``."""

    out: Annotated[Path, typer.Argument(metavar="DIR", help="Output of `patch`.")]
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="BASE",
            help="Checkpoint that it was made from.",
            show_default="where it was then",
        ),
    ] = None


def verify(options: VerifyOptions) -> int:
    """Prove that every word that was not patched is BASE's, and files, index and k hold.

    Exit code 0 when everything holds, 1 when something is violated.
    """
    from tailor_fast.cli.progress import shown
    from tailor_fast.cli.tables import show
    from tailor_fast.patching.verify import verify_output

    with shown(options.quiet) as progress:
        result = verify_output(options.out, base=options.base, progress=progress)
    if not options.quiet:
        _show(result)
    listed = result.violations if options.verbose else result.violations[:_MOST_SHOWN]
    for violation in listed:
        show(f"violated: {violation}")
    if len(listed) < len(result.violations):
        show(f"and {len(result.violations) - len(listed)} more; -v lists all")
    return 0 if result.ok else VIOLATED


def _show(result: VerifyResult) -> None:
    from tailor_fast.cli.tables import facts, folded, share, show, shown_size, table

    rows = folded(
        (tensor.name, "", (tensor.size, tensor.allowed, tensor.changed))
        for tensor in result.patched
    )
    if rows:
        show(
            table(
                ("patched tensors", "number", "weights", "allowed", "changed", "share"),
                [(name, count, *sums, share(sums[2], sums[0])) for name, count, _, sums in rows],
            )
        )
        show("")
    checked = result.checked
    changed, weights = checked.get("changed", 0), checked.get("weights", 0)
    show(
        facts(
            {
                "verdict": "holds" if result.ok else f"{len(result.violations)} violations",
                "changed": f"{share(changed, weights)}, {changed:,} of {weights:,} weights",
                "untouched": f"{checked.get('untouched', 0):,} of {checked.get('tensors', 0):,}"
                " tensors compared bit for bit",
                "read": f"{checked.get('files', 0)} files, {shown_size(checked.get('bytes', 0))}",
            }
        )
    )
