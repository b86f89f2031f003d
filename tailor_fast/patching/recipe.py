"""What a run is asked to do: one frozen, validated object for Python, YAML and the command line."""

from __future__ import annotations

import re
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tailor_fast.ops.decorate.api import MAX_ITERATIONS, TOL

Sensitivity = Literal["obs", "diag", "ratio", "weight"]
Normalize = Literal["row_block", "row", "tensor", "none"]
Scope = Literal["tensor", "block", "row", "layer", "global"]
Decorate = Literal["exact", "obs", "official", "none"]
Propagate = Literal["asymmetric", "sequential", "none"]

SCORE = {"salience_weight", "sensitivity", "normalize"}  # what a refitted mask does not depend on
DEFAULT_REFITS = 4  # with old-task data
DEFAULT_RETAIN = 0.1  # where it cannot be measured
MEASURED_RETAIN = 0.3  # where all that the base model said on old tasks has changed


class Recipe(BaseModel):
    """Every choice of the method, with its default.

    Attributes:
        density: share of each unit's weights that is kept, in [0, 1].
        densities: regular expression -> density of the layers whose name it finds; the first that
            does counts, ``density`` for the rest. For scopes within a layer.
        salience_weight: ω of the fused score ``ω z(|D|) + (1-ω) z(v)``, in [0, 1].
        sensitivity: how ``v`` is formed from the statistics.
        normalize: the set of weights over which ``z`` takes mean and std.
        scope: the unit over which the k best scores are kept.
        decorate: how the kept values are adjusted.
        propagate: whose inputs a layer is fitted on.
        retain_weight: β, weight of the term that keeps the base model's answers on old-task data.
            None measures it where there are samples: ``MEASURED_RETAIN`` times the share of the
            base model's words on their answers that the tuned model would not say; 0.1 elsewhere.
        refits: steps in which the exact solve chooses the mask itself, from its solution over every
            weight down to ``density``; 0 keeps the mask of the score. None is 4 with old-task data,
            unless a part of the score is chosen, and 0 without: there it reproduces the tuned
            model more closely, its forgetting included.
        percdamp: damping as a share of the Gram's mean diagonal.
        group: take statistics per input group, or per block (the authors' order).
        untouched: where parameters that are not patched come from.
        missing: whose set of tensors the output has, where one input lacks some of the other's;
            None refuses such a pair.
        targets: regular expression; only layers whose name it finds are patched.
        ignore: regular expression; layers whose name it finds are not patched.
        layers: range of block numbers, ``20-31`` or ``20-31,5``; layers outside blocks stay.
        tol: largest relative excess over the minimum at which the exact solve of a row may end.
        max_iterations: limit of the exact solve.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    density: float = Field(0.1, ge=0.0, le=1.0)
    densities: dict[str, Annotated[float, Field(ge=0.0, le=1.0)]] | None = None
    salience_weight: float = Field(0.5, ge=0.0, le=1.0)
    sensitivity: Sensitivity = "obs"
    normalize: Normalize = "row_block"
    scope: Scope = "tensor"
    decorate: Decorate = "exact"
    propagate: Propagate = "asymmetric"
    retain_weight: float | None = Field(None, ge=0.0, allow_inf_nan=False)
    refits: int | None = Field(None, ge=0)
    percdamp: float = Field(0.01, gt=0.0, allow_inf_nan=False)
    group: Literal["input", "block"] = "input"
    untouched: Literal["base", "tuned"] = "base"
    missing: Literal["base", "tuned"] | None = None
    targets: str | None = None
    ignore: str | None = None
    layers: str | None = None
    tol: float = Field(TOL, gt=0.0, lt=1.0)
    max_iterations: int = Field(MAX_ITERATIONS, ge=1)

    @field_validator("targets", "ignore")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from None
        return value

    @field_validator("densities")
    @classmethod
    def _all_compile(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        for pattern in value or ():
            cls._compiles(pattern)
        return value

    @field_validator("layers")
    @classmethod
    def _is_range(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", value):
            raise ValueError("not a list of block numbers and ranges such as 20-31 or 0,2-5")
        return value

    def selects(self, name: str) -> bool:
        """Whether the layer of module name ``name`` is to be patched."""
        if self.targets is not None and not re.search(self.targets, name):
            return False
        if self.ignore is not None and re.search(self.ignore, name):
            return False
        number = re.search(r"\.(\d+)\.", f".{name}.")
        if self.layers is None or number is None:
            return True
        bounds = (part.partition("-") for part in self.layers.split(","))
        block = int(number[1])
        return any(int(low) <= block <= int(high or low) for low, _, high in bounds)

    @property
    def selection(self) -> str:
        """What narrows the layers down, for messages."""
        given = {name: getattr(self, name) for name in ("targets", "layers", "ignore")}
        chosen = [f"{name} {value!r}" for name, value in given.items() if value is not None]
        return ", ".join(chosen) or "no `targets`, `layers` or `ignore`"

    @property
    def settled_retain_weight(self) -> float:
        """``retain_weight`` of a recipe that is run, where it is no longer open."""
        if self.retain_weight is None:
            raise RuntimeError("retain_weight is open; expected it to be settled before a solve")
        return self.retain_weight

    def of(self, name: str) -> Recipe:
        """The recipe for the layer of module name ``name``, with its own density."""
        for pattern, density in (self.densities or {}).items():
            if re.search(pattern, name):
                return self.model_copy(update={"density": density})
        return self

    @model_validator(mode="after")
    def _densities_are_of_layers(self) -> Self:
        if self.densities and self.scope in ("layer", "global"):
            raise ValueError(
                f"scope={self.scope!r} has one density for layers together; densities cannot be"
                " chosen with it"
            )
        return self

    @model_validator(mode="after")
    def _refits_choose(self) -> Self:
        if not self.refits:
            return self
        if self.decorate != "exact":
            raise ValueError(
                f"refits choose the mask by exact solves; decorate={self.decorate!r} has none;"
                " use decorate='exact' or leave refits out"
            )
        chosen = SCORE & self.model_fields_set
        if chosen:
            names = " and ".join(sorted(chosen))
            raise ValueError(f"refits choose the mask; {names} cannot be chosen with them")
        return self

    @model_validator(mode="after")
    def _official_is_fixed(self) -> Self:
        fixed = {"scope", "sensitivity"} & self.model_fields_set
        if self.decorate == "official" and fixed:
            names = " and ".join(sorted(fixed))
            raise ValueError(
                f"decorate='official' is the authors' algorithm to the letter; {names} cannot be"
                " chosen with it"
            )
        return self
