"""``tailor-fast calibrate``: a model's statistics on data, to a file."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailor_fast.cli.options import BatchOptions, DeviceOptions, Quietable

if TYPE_CHECKING:
    from tailor_fast.calibration import CalibrationReport


class Kind(StrEnum):
    """What is kept of each layer's inputs."""

    FULL = "full"
    DIAG = "diag"


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(BatchOptions, DeviceOptions, Quietable):
    """``MODEL --data DATA -o STATS``."""

    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Checkpoint or adapter directory.")]
    data: Annotated[
        Path,
        typer.Option(metavar="DATA", help="Samples to run through it: JSON lines or batches."),
    ]
    out: Annotated[Path, typer.Option("-o", "--out", metavar="STATS", help="File to write.")]
    base: Annotated[
        Path | None,
        typer.Option(metavar="BASE", help="The model that MODEL, a LoRA adapter, belongs to."),
    ] = None
    kind: Annotated[
        Kind, typer.Option(help="The whole Gram of each layer's inputs, or its diagonal.")
    ] = Kind.FULL


def calibrate(options: CalibrateOptions) -> None:
    """Take the statistics of MODEL's layers on data, once for any number of recipes."""
    from tailor_fast import calibration
    from tailor_fast.cli.progress import shown
    from tailor_fast.cli.settings import processes_of, run_options

    with processes_of(options) as processes:
        quiet = options.quiet or processes.rank > 0
        with shown(quiet) as progress:
            report = calibration.calibrate(
                options.model,
                options.data,
                options.out,
                kind=options.kind.value,
                base=options.base,
                options=run_options(options, processes),
                progress=progress,
                processes=processes,
            )
        if not quiet:
            _show(report, options.out)


def _show(report: CalibrationReport, out: Path) -> None:
    from tailor_fast.cli.tables import facts, show, shown_size

    show(
        facts(
            {
                "out": f"{out}, {shown_size(report.bytes)}",
                "layers": f"{report.layers} in {report.groups} groups with one input each",
                "uncalled": ", ".join(report.uncalled) or None,
                "data": f"{report.samples:,} samples, {report.tokens:,} tokens",
                "memory": report.planned and f"{shown_size(report.planned)} planned",
                "time": f"{report.seconds:.1f} s",
                "notes": "\n".join(report.notes) or None,
            }
        )
    )
