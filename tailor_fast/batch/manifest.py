"""The manifest: what each job reads, does and writes, settled before the first one starts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator

from tailor_fast._core.errors import UsageError
from tailor_fast._core.yaml_file import read_mapping
from tailor_fast.calibration.options import RunOptions
from tailor_fast.checkpoint import is_hub_name, parse_size
from tailor_fast.patching.recipe import Recipe

_OWN = ("name", "out")  # what jobs cannot share
_MODELS = ("base", "tuned")  # what may be named as the hub does


class JobSpec(BaseModel):
    """One job: the arguments of ``patch_checkpoint``. Relative paths start at the manifest.

    Attributes:
        name: for the table; without one, the name of ``out``.
        base: checkpoint before fine-tuning: a path, or the hub name of a model in the local cache.
        tuned: the same after it.
        out: directory to make.
        recipe: choices of the method.
        calibration: samples of the new task.
        statistics: what ``calibrate`` wrote, instead of samples.
        retain: samples or statistics of old tasks.
        device: ``cpu`` or ``cuda:N``.
        max_ram: a size such as ``4GiB``.
        out_shard_size: a size such as ``5GB``.
        batch_size: samples in one forward pass.
        samples: at most so many samples of each data file.
        max_length: longest sample in tokens.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field("", pattern=r"^[^\x00-\x1f]*$")
    base: Path
    tuned: Path
    out: Path
    recipe: Recipe = Recipe()
    calibration: Path | None = None
    statistics: Path | None = None
    retain: Path | None = None
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$")
    max_ram: str | None = None
    out_shard_size: str | None = None
    batch_size: int = Field(RunOptions.batch_size, ge=1)
    samples: int | None = Field(RunOptions.samples, ge=1)
    max_length: int = Field(RunOptions.max_length, ge=1)

    @field_validator("base", "tuned", "out", "calibration", "statistics", "retain")
    @classmethod
    def _from_the_manifest(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        folder: Path = (info.context or {}).get("folder", Path())
        if value is None:
            return None
        path = folder / value.expanduser()
        if info.field_name in _MODELS and not path.exists() and is_hub_name(value):
            return value
        return path

    @field_validator("max_ram", "out_shard_size", mode="before")
    @classmethod
    def _bytes_may_be_a_number(cls, value: Any) -> Any:
        return str(value) if type(value) is int else value

    @field_validator("max_ram", "out_shard_size")
    @classmethod
    def _is_a_size(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                parse_size(value)
            except UsageError as error:
                raise ValueError(str(error)) from None
        return value

    @property
    def label(self) -> str:
        """Name in the table."""
        return self.name or self.out.name

    def options(self, *, overwrite: bool) -> RunOptions:
        """How the job is carried out."""
        ram, shard = self.max_ram, self.out_shard_size
        return RunOptions(
            device=self.device,
            max_ram=None if ram is None else parse_size(ram),
            max_shard_bytes=RunOptions.max_shard_bytes if shard is None else parse_size(shard),
            overwrite=overwrite,
            batch_size=self.batch_size,
            samples=self.samples,
            max_length=self.max_length,
        )


def read_manifest(path: Path) -> list[JobSpec]:
    """Read the jobs of a manifest; ``defaults`` stands for what a job leaves out.

    A job's ``recipe`` adds to that of the defaults, key by key.

    Raises:
        InputError: the file cannot be read.
        UsageError: a key or value is wrong, no job, or two jobs with one name or one output.
    """
    body = read_mapping(path, ("defaults", "jobs"), "a manifest")
    defaults, given = body.get("defaults") or {}, body.get("jobs")
    if not isinstance(given, list) or not given:
        raise UsageError(f"{path}: jobs must be a list of at least one job; got {given!r}")
    if not isinstance(defaults, dict):
        raise UsageError(f"{path}: defaults must be keys and values; got {defaults!r}")
    shared = [name for name in _OWN if name in defaults]
    if shared:
        raise UsageError(f"{path}: defaults: {shared[0]} belongs to each job alone")
    jobs = [_job(path, number, defaults, job) for number, job in enumerate(given, 1)]
    _check_apart(path, "name", [job.label for job in jobs])
    _check_apart(path, "out", [str(job.out.resolve()) for job in jobs])
    return jobs


def _job(path: Path, number: int, defaults: dict[str, Any], job: Any) -> JobSpec:
    where = f"{path}: job {number}"
    if not isinstance(job, dict):
        raise UsageError(f"{where}: expected keys and values; got {job!r}")
    merged = {**defaults, **job}
    recipes = [part["recipe"] for part in (defaults, job) if part.get("recipe") is not None]
    if recipes and all(isinstance(recipe, dict) for recipe in recipes):
        merged["recipe"] = {key: value for recipe in recipes for key, value in recipe.items()}
    try:
        return JobSpec.model_validate(merged, context={"folder": path.absolute().parent})
    except ValidationError as error:
        raise UsageError(f"{where}: {_sentence(error)}") from None


def _sentence(error: ValidationError) -> str:
    """The first complaint: which key, what was expected, what it is."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    problem = first["msg"].removeprefix("Value error, ")
    if first["type"] == "missing":
        return f"{key} is missing"
    if first["type"] == "extra_forbidden":
        of, model = ("job", JobSpec) if len(first["loc"]) == 1 else ("recipe", Recipe)
        return f"unknown key {key!r}; the keys of a {of} are {', '.join(model.model_fields)}"
    return f"{key}: {problem}; got {first['input']!r}"


def _check_apart(path: Path, key: str, values: list[str]) -> None:
    value, count = Counter(values).most_common(1)[0]
    if count > 1:
        raise UsageError(f"{path}: {count} jobs have {key} {value}; expected one each")
