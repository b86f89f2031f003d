"""``tailor-fast bench``: how fast are the ops here?"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailor_fast.cli.options import Options

if TYPE_CHECKING:
    from tailor_fast.bench import Row

FAILED = 1


@dataclass(frozen=True, kw_only=True)
class BenchOptions(Options):
    """Which ops, at which size, where."""

    op: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="gram, select, decorate or codec; may be given several times.",
            show_default="all",
        ),
    ] = None
    size: Annotated[
        str,
        typer.Option(
            metavar="SIZE", help="small, medium (both may fit in the cache) or large (4096x4096)."
        ),
    ] = "medium"
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu or cuda:N.")] = "auto"
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, help="Timed calls; the median is shown.")
    ] = 5
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Write the table there too.")
    ] = None


def bench(options: BenchOptions) -> int:
    """Time every backend of every op on this machine, each after a correctness gate.

    Exit code 1 when a backend gives a wrong answer.
    """
    import torch

    from tailor_fast import bench as benches
    from tailor_fast.cli.settings import device_name
    from tailor_fast.cli.tables import show
    from tailor_fast.ops import OPS

    device = torch.device(device_name(options.device))
    ceilings = benches.measure_ceilings(device)
    show(
        f"copy {ceilings.bytes_per_second / 1e9:.1f} GB/s (read and written), matrix product"
        f" {ceilings.flops_per_second / 1e9:,.0f} GFLOP/s\n"
    )
    rows = list(
        benches.run_bench(
            device,
            ceilings,
            ops=tuple(options.op or OPS),
            size=options.size,
            rounds=options.rounds,
        )
    )
    _show(rows)
    if options.csv is not None:
        _write(options.csv, rows)
    return FAILED if any(row.problem for row in rows) else 0


def _show(rows: Sequence[Row]) -> None:
    from tailor_fast.cli.tables import show, table

    head = ("op", "work", "shape", "backend", "ms", "floor ms", "of floor", "vs reference")
    lines = [(row.op, row.work, row.shape, row.backend, *_numbers(row)) for row in rows]
    show(table(head, lines))
    for row in rows:
        if row.problem:
            show(f"wrong: {row.op} {row.work} by {row.backend}: {row.problem}")


def _numbers(row: Row) -> tuple[str, str, str, str]:
    floor = f"{1e3 * row.floor:.2f}"
    if row.seconds is None or row.speedup is None:
        return "-", floor, "-", "-"
    share = f"{100 * row.floor / row.seconds:.0f}%"
    return f"{1e3 * row.seconds:.2f}", floor, share, f"{row.speedup:.1f}"


def _write(path: Path, rows: Sequence[Row]) -> None:
    from tailor_fast._core.errors import OutputError

    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(rows[0])])
            writer.writeheader()
            writer.writerows(asdict(row) for row in rows)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
