"""Options as the library takes them, a ``Recipe`` and ``RunOptions``, or one clear sentence."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tailor_fast._core.errors import UsageError
from tailor_fast._core.processes import ALONE, Processes
from tailor_fast._core.yaml_file import read_mapping
from tailor_fast.cli.options import BatchOptions, DataOptions, DeviceOptions, RecipeOptions

if TYPE_CHECKING:
    from pydantic import ValidationError

    from tailor_fast.calibration.options import RunOptions
    from tailor_fast.patching.recipe import Recipe


def recipe_of(options: RecipeOptions) -> Recipe:
    """The recipe file, if there is one, with the options given on top.

    Raises:
        InputError: the file cannot be read.
        UsageError: a key or value is not one of a recipe, or options contradict each other.
    """
    from pydantic import ValidationError

    from tailor_fast.patching.recipe import Recipe

    given = {
        field.name: getattr(options, field.name)
        for field in fields(RecipeOptions)
        if getattr(options, field.name) is not None
    }
    file = given.pop("recipe", None)
    if "sparsity" in given:
        if "density" in given:
            raise UsageError("--density and --sparsity say the same; expected one of them")
        given["density"] = _density(given.pop("sparsity"))
    if "densities" in given:
        given["densities"] = dict(_density_of(text) for text in given["densities"])
    read = {} if file is None else read_mapping(file, tuple(Recipe.model_fields), "a recipe")
    try:
        return Recipe(**{**read, **given})
    except ValidationError as error:
        raise UsageError(_sentence(error, file, given.keys())) from None


def processes_of(options: BatchOptions) -> AbstractContextManager[Processes]:
    """The processes that torchrun started to do the command together; one without torchrun."""
    import torch

    from tailor_fast._core.distributed import launched

    return launched(cuda=options.device != "cpu" and torch.cuda.is_available())


def run_options(options: BatchOptions, processes: Processes = ALONE) -> RunOptions:
    """How the run is carried out.

    Raises:
        UsageError: a size or a device that is none, or one device for several processes.
    """
    from tailor_fast.calibration.options import RunOptions
    from tailor_fast.checkpoint import parse_size

    given: dict[str, Any] = {
        "samples": options.samples,
        "max_length": options.max_length,
        "batch_size": options.batch_size,
        "tokens": options.tokens and options.tokens.value,
        "max_ram": options.max_ram and parse_size(options.max_ram),
    }
    if isinstance(options, DeviceOptions):
        given["max_vram"] = options.max_vram and parse_size(options.max_vram)
    if isinstance(options, DataOptions):
        given["max_shard_bytes"] = options.out_shard_size and parse_size(options.out_shard_size)
    chosen = {name: value for name, value in given.items() if value is not None}
    device = device_name(options.device)
    if processes.count > 1:
        if options.device not in ("auto", "cpu"):
            raise UsageError(
                f"--device {options.device} is one device for {processes.count} processes; expected"
                " auto, which gives each a card of its own, or cpu"
            )
        device = str(processes.device)
    return RunOptions(device=device, overwrite=options.overwrite, **chosen)


def _density_of(text: str) -> tuple[str, float]:
    pattern, _, share = text.rpartition("=")
    try:
        return pattern, float(share)
    except ValueError:
        raise UsageError(f"--densities must be RE=SHARE, as in mlp=0.05; got {text!r}") from None


def _density(sparsity: float) -> float:
    if not 0 <= sparsity <= 1:
        raise UsageError(f"--sparsity must be in [0, 1]; got {sparsity}")
    return float(1 - Decimal(repr(sparsity)))  # as written: 1 - 0.9 is 0.1, not 0.09999999999999998


def _sentence(error: ValidationError, file: Path | None, options: Any) -> str:
    """The first complaint: where the value comes from, what was expected, what it is."""
    first = error.errors()[0]
    problem = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # about several fields
        return problem
    name = str(first["loc"][0])
    where = f"--{name.replace('_', '-')}" if name in options else f"{file}: {name}"
    return f"{where}: {problem}; got {first['input']!r}"


def device_name(text: str) -> str:
    """``auto``, ``cpu`` or ``cuda:N`` as a device that is there.

    Raises:
        UsageError: another kind of device, or one that this machine does not have.
    """
    import torch

    if text == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device must be auto, cpu or cuda:N; got {text!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"--device {text} is not there; this machine has {torch.cuda.device_count()} CUDA"
            " devices; use --device cpu"
        )
    return text
