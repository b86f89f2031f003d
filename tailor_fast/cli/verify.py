"""``tailor-fast verify``: is an output, or a patch file, what it claims to be?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailor_fast._core.errors import UsageError
from tailor_fast.cli.options import Quietable

if TYPE_CHECKING:
    from tailor_fast.patchfile import PatchVerification
    from tailor_fast.patching.verify import VerifyResult

VIOLATED = 1
_MOST_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Quietable):
    """``DIR|PATCH``."""

    out: Annotated[
        Path, typer.Argument(metavar="DIR|PATCH", help="Output of `patch`, or a patch file.")
    ]
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="BASE",
            help="Checkpoint that it was made from.",
            show_default="where it was then; of a patch file: not compared",
        ),
    ] = None
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Look at files and headers only; needs no BASE."),
    ] = False


def verify(options: VerifyOptions) -> int:
    """Prove that every word that was not patched is BASE's, and files, index and k hold.

    Of a patch file: that its structure, counts and digests hold, and with --base that it turns BASE
    into its target. With --quick, what can be told without reading weights. Exit code 0 when
    everything holds, 1 when something is violated.
    """
    if options.quick and options.base is not None:
        raise UsageError(
            "--quick reads no weights, so that it compares none with --base; expected one of them"
        )
    if options.out.is_file():
        return _verify_patch(options)
    from tailor_fast.cli.progress import shown
    from tailor_fast.patching.verify import verify_output

    with shown(options.quiet) as progress:
        result = verify_output(
            options.out, base=options.base, deep=not options.quick, progress=progress
        )
    if not options.quiet:
        _show(result, options)
    return _list(result.violations, options)


def _verify_patch(options: VerifyOptions) -> int:
    from tailor_fast.cli.progress import shown
    from tailor_fast.patchfile import verify_patch

    with shown(options.quiet) as progress:
        result = verify_patch(
            options.out, base=options.base, deep=not options.quick, progress=progress
        )
    if not options.quiet:
        _show_patch(result, options)
    return _list(result.violations, options)


def _list(violations: Sequence[str], options: VerifyOptions) -> int:
    """Print the violations and return the exit code."""
    from tailor_fast.cli.tables import show

    listed = violations if options.verbose else violations[:_MOST_SHOWN]
    for violation in listed:
        show(f"violated: {violation}")
    if len(listed) < len(violations):
        show(f"and {len(violations) - len(listed)} more; -v lists all")
    return VIOLATED if violations else 0


def _verdict(violations: Sequence[str]) -> str:
    return f"{len(violations)} violations" if violations else "holds"


def _show_quick(violations: Sequence[str]) -> None:
    from tailor_fast.cli.tables import facts, show

    show(facts({"verdict": _verdict(violations), "weights": "not read"}))


def _show_patch(result: PatchVerification, options: VerifyOptions) -> None:
    from tailor_fast.cli.tables import facts, show, shown_size

    if options.quick:
        _show_quick(result.violations)
        return
    reached = "the patch turns it into its target, bit for bit" if result.reached else None
    show(
        facts(
            {
                "verdict": _verdict(result.violations),
                "base": reached,
                "read": f"{shown_size(result.nbytes)}, {result.words:,} stored weights in"
                f" {result.tensors:,} tensors",
            }
        )
    )


def _show(result: VerifyResult, options: VerifyOptions) -> None:
    from tailor_fast.cli.tables import facts, folded, share, show, shown_size, table

    if options.quick:
        _show_quick(result.violations)
        return
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
                "verdict": _verdict(result.violations),
                "changed": f"{share(changed, weights)}, {changed:,} of {weights:,} weights",
                "untouched": f"{checked.get('untouched', 0):,} of {checked.get('tensors', 0):,}"
                " tensors compared bit for bit",
                "read": f"{checked.get('files', 0)} files, {shown_size(checked.get('bytes', 0))}",
            }
        )
    )
