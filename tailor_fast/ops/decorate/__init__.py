"""The values of the patch: exact minimiser, OBS sweep, and the authors' sweep to the letter."""

from tailor_fast.ops.decorate.api import (
    decorate_exact,
    decorate_exact_,
    decorate_obs,
    decorate_obs_,
    decorate_official,
    decorate_official_,
    factor_obs,
)
from tailor_fast.ops.decorate.results import (
    Decorated,
    DecorationLosses,
    ObsFactor,
    OfficialResult,
)

__all__ = [
    "Decorated",
    "DecorationLosses",
    "ObsFactor",
    "OfficialResult",
    "decorate_exact",
    "decorate_exact_",
    "decorate_obs",
    "decorate_obs_",
    "decorate_official",
    "decorate_official_",
    "factor_obs",
]
