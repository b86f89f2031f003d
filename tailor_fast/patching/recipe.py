"""What a run is asked to do: one frozen, validated object for Python, YAML and the command line."""

from __future__ import annotations

import re
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tailor_fast.ops.decorate.api import MAX_ITERATIONS, TOL

Sensitivity = Literal["obs", "diag", "ratio", "weight"]
Normalize = Literal["row_block", "row", "tensor", "none"]
Scope = Literal["tensor", "block", "row", "layer", "global"]
Decorate = Literal["exact", "obs", "official", "none"]
Propagate = Literal["asymmetric", "sequential", "none"]


class Recipe(BaseModel):
    """Every choice of the method, with its default.

    Attributes:
        density: share of each unit's weights that is kept, in [0, 1].
        salience_weight: ω of the fused score ``ω z(|D|) + (1-ω) z(v)``, in [0, 1].
        sensitivity: how ``v`` is formed from the statistics.
        normalize: the set of weights over which ``z`` takes mean and std.
        scope: the unit over which the k best scores are kept.
        decorate: how the kept values are adjusted.
        propagate: whose inputs a layer is fitted on.
        retain_weight: β, weight of the term that keeps the base model's answers on old-task data.
        percdamp: damping as a share of the Gram's mean diagonal.
        group: take statistics per input group, or per block (the authors' order).
        untouched: where parameters that are not patched come from.
        targets: regular expression; only layers whose name it finds are patched.
        ignore: regular expression; layers whose name it finds are not patched.
        layers: range of block numbers, ``20-31`` or ``20-31,5``; layers outside blocks stay.
        tol: largest relative excess over the minimum at which the exact solve of a row may end.
        max_iterations: limit of the exact solve.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    density: float = Field(0.1, ge=0.0, le=1.0)
    salience_weight: float = Field(0.5, ge=0.0, le=1.0)
    sensitivity: Sensitivity = "obs"
    normalize: Normalize = "row_block"
    scope: Scope = "tensor"
    decorate: Decorate = "exact"
    propagate: Propagate = "asymmetric"
    retain_weight: float = Field(0.1, ge=0.0, allow_inf_nan=False)
    percdamp: float = Field(0.01, gt=0.0, allow_inf_nan=False)
    group: Literal["input", "block"] = "input"
    untouched: Literal["base", "tuned"] = "base"
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
