"""Options that several commands share, as fields of dataclasses.

A field that was not given is None: the defaults live in ``Recipe`` and ``RunOptions`` alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

_SELECT = "What is kept"
_DECORATE = "How it is adjusted"
_DATA = "Data"
_RUN = "The run"


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every command takes."""

    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Say more; show where an error happened.")
    ] = False


@dataclass(frozen=True, kw_only=True)
class Quietable(Options):
    """Commands that can be silent."""

    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Print nothing but errors.")] = False


@dataclass(frozen=True, kw_only=True)
class RecipeOptions:
    """The choices of the method; names and meanings are those of ``Recipe``."""

    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.yaml",
            help="Recipe with any of the choices below and tol, max_iterations; options override"
            " it.",
            rich_help_panel=_SELECT,
        ),
    ] = None
    density: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Share of the weights that is kept.",
            show_default="0.1",
            rich_help_panel=_SELECT,
        ),
    ] = None
    sparsity: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="The same as 1 - density.", rich_help_panel=_SELECT),
    ] = None
    densities: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RE=SHARE",
            help="Another density for layers whose name it finds; the first that does counts.",
            rich_help_panel=_SELECT,
        ),
    ] = None
    scope: Annotated[
        str | None,
        typer.Option(
            metavar="UNIT",
            help="Where the best scores are kept: tensor, block, row, layer or global.",
            show_default="tensor",
            rich_help_panel=_SELECT,
        ),
    ] = None
    salience_weight: Annotated[
        float | None,
        typer.Option(
            metavar="W",
            help="Weight of salience in the score, sensitivity has the rest.",
            show_default="0.5",
            rich_help_panel=_SELECT,
        ),
    ] = None
    sensitivity: Annotated[
        str | None,
        typer.Option(
            metavar="KIND",
            help="Sensitivity by obs, diag, ratio or weight.",
            show_default="obs",
            rich_help_panel=_SELECT,
        ),
    ] = None
    normalize: Annotated[
        str | None,
        typer.Option(
            metavar="SET",
            help="Scores are standardised over row_block, row, tensor or none.",
            show_default="row_block",
            rich_help_panel=_SELECT,
        ),
    ] = None
    targets: Annotated[
        str | None,
        typer.Option(
            metavar="RE",
            help="Patch only layers whose name this regular expression finds.",
            rich_help_panel=_SELECT,
        ),
    ] = None
    ignore: Annotated[
        str | None,
        typer.Option(
            metavar="RE", help="Leave layers whose name it finds.", rich_help_panel=_SELECT
        ),
    ] = None
    layers: Annotated[
        str | None,
        typer.Option(
            metavar="20-31", help="Patch only the blocks of these numbers.", rich_help_panel=_SELECT
        ),
    ] = None
    untouched: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Unpatched parameters are those of base or tuned.",
            show_default="base",
            rich_help_panel=_SELECT,
        ),
    ] = None
    missing: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Where one side lacks tensors, the output has those of base or tuned; else an"
            " error.",
            rich_help_panel=_SELECT,
        ),
    ] = None
    decorate: Annotated[
        str | None,
        typer.Option(
            metavar="MODE",
            help="Kept values are adjusted by exact, obs, official or none.",
            show_default="exact",
            rich_help_panel=_DECORATE,
        ),
    ] = None
    propagate: Annotated[
        str | None,
        typer.Option(
            metavar="MODE",
            help="Layers see patched inputs: asymmetric, sequential or none.",
            show_default="asymmetric",
            rich_help_panel=_DECORATE,
        ),
    ] = None
    retain_weight: Annotated[
        float | None,
        typer.Option(
            metavar="W",
            help="Weight of the base model's answers on old data; left out, it is measured.",
            rich_help_panel=_DECORATE,
        ),
    ] = None
    refits: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Steps in which the solve itself chooses the mask; 4 with old data, else 0: by"
            " score.",
            rich_help_panel=_DECORATE,
        ),
    ] = None
    group: Annotated[
        str | None,
        typer.Option(
            metavar="UNIT",
            help="Statistics are taken per input group or per block: input or block.",
            show_default="input",
            rich_help_panel=_DECORATE,
        ),
    ] = None
    percdamp: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="Damping as a share of the Gram's mean diagonal.",
            show_default="0.01",
            rich_help_panel=_DECORATE,
        ),
    ] = None


class Tokens(StrEnum):
    """Which tokens count."""

    ALL = "all"
    ANSWER = "answer"
    OFFICIAL = "official"


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How data files become batches, and where the model runs."""

    samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Use N samples of a data file, evenly spaced.",
            show_default="128",
            rich_help_panel=_DATA,
        ),
    ] = None
    max_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Refuse samples of more tokens.",
            show_default="2048",
            rich_help_panel=_DATA,
        ),
    ] = None
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Samples in one forward pass.",
            show_default="8",
            rich_help_panel=_DATA,
        ),
    ] = None
    tokens: Annotated[
        Tokens | None,
        typer.Option(
            help="Which tokens count: all but padding, those of the answers, or padding too, as in"
            " the authors' script (official).",
            show_default="all",
            rich_help_panel=_DATA,
        ),
    ] = None
    device: Annotated[
        str,
        typer.Option(metavar="auto|cpu|cuda:N", help="Where it is computed.", rich_help_panel=_RUN),
    ] = "auto"
    max_ram: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Memory for weights, statistics and activations: 2GiB.",
            show_default="no limit",
            rich_help_panel=_RUN,
        ),
    ] = None
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Replace an existing output.", rich_help_panel=_RUN),
    ] = False


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """How much of the device a run takes, for commands that bound it."""

    max_vram: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="The same on the GPU; on a CPU it rehearses a GPU of that size.",
            show_default="what is free",
            rich_help_panel=_RUN,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What a patch is fitted on, and the size of its files."""

    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="Samples of the new task: JSON lines, or prepared batches (.safetensors, or a"
            " directory of them).",
            rich_help_panel=_DATA,
        ),
    ] = None
    retain: Annotated[
        Path | None,
        typer.Option(
            metavar="OLD|STATS",
            help="Samples of old tasks in the same forms, or their statistics.",
            rich_help_panel=_DATA,
        ),
    ] = None
    statistics: Annotated[
        Path | None,
        typer.Option(
            metavar="STATS",
            help="What `calibrate` wrote for the tuned model, instead of --calibration.",
            rich_help_panel=_DATA,
        ),
    ] = None
    out_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Size of an output file.",
            show_default="5GB",
            rich_help_panel=_RUN,
        ),
    ] = None
