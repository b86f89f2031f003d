"""``tailor-fast plan``: what ``patch`` would do, from headers alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tailor_fast.cli.options import (
    BatchOptions,
    DataOptions,
    DeviceOptions,
    Quietable,
    RecipeOptions,
)

if TYPE_CHECKING:
    from tailor_fast.patching.plan import PatchPlan


@dataclass(frozen=True, kw_only=True)
class PlanOptions(RecipeOptions, DataOptions, BatchOptions, DeviceOptions, Quietable):
    """``BASE TUNED -o OUT`` and everything that decides what is done."""

    base: Annotated[Path, typer.Argument(metavar="BASE", help="Checkpoint before fine-tuning.")]
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="The same after fine-tuning.")]
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="OUT", help="Directory of the patched model.")
    ]
    target_old: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Search density and retain weight, where they are not given, for what keeps most"
            " of the new task while held-back samples of old ones keep this share: 0.99.",
            rich_help_panel="How it is adjusted",
        ),
    ] = None


def plan(options: PlanOptions) -> None:
    """Show what `patch` would do with the same options; no weight is read."""
    from tailor_fast.cli.settings import recipe_of, run_options
    from tailor_fast.patching.checkpoints import plan_patch

    recipe = recipe_of(options)
    planned = plan_patch(
        options.base,
        options.tuned,
        options.out,
        recipe,
        calibration=options.calibration,
        retain=options.retain,
        statistics=options.statistics,
        target_old=options.target_old,
        options=run_options(options),
    )
    if not options.quiet:
        _show(planned, options)


def _show(planned: PatchPlan, options: PlanOptions) -> None:
    from tailor_fast.cli.tables import facts, folded, share, show, shown_size, table

    rows = folded(
        (layer.name, f"{layer.rows} x {layer.cols}", (layer.rows * layer.cols, layer.kept))
        for layer in planned.layers
    )
    show(
        table(
            ("layers", "number", "shape", "weights", "kept", "share"),
            [
                (name, count, shape, *sums, share(sums[1], sums[0]))
                for name, count, shape, sums in rows
            ],
        )
    )
    recipe = ", ".join(
        f"{key} {value}" for key, value in planned.recipe.items() if value is not None
    )
    memory = (
        f"{shown_size(planned.ram)}: weights {shown_size(planned.ram_weights)}, statistics and"
        f" working copies {shown_size(planned.ram_solve)}"
    )
    if options.calibration is not None:
        memory += "; activations come on top"
    if planned.ahead:
        memory += f"; page-locked, for blocks on their way to the GPU, {shown_size(planned.ahead)}"
    device = None
    if planned.device is not None:
        stages = (f"{s.name} {shown_size(s.bytes)} ({s.layer})" for s in planned.device.stages)
        device = f"{shown_size(planned.device.largest.bytes)}: {', '.join(stages)}"
    show("")
    show(
        facts(
            {
                "out": options.out,
                "recipe": recipe,
                "kept": f"at most {planned.kept:,} of {planned.weights:,} weights",
                "memory": memory,
                "device": device,
                "disk": shown_size(planned.disk),
                "notes": "\n".join(planned.notes) or None,
            }
        )
    )
