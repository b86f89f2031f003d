"""The departures from the defaults that ``benchmarks.quality.defaults`` measures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.quality.cells import setting_text
from benchmarks.quality.protocols import NEW_SAMPLES


@dataclass(frozen=True)
class Choice:
    """One departure from the defaults.

    Attributes:
        title: in words, for the table.
        changed: fields of the recipe.
        samples: scenes of the new task and of each old one.
    """

    title: str
    changed: Mapping[str, Any] = field(default_factory=dict)
    samples: int = NEW_SAMPLES


def _each(name: str, values: Sequence[Any]) -> list[Choice]:
    return [Choice(f"`{name}` {value}", {name: value}) for value in values]


_SAMPLES = [Choice(f"{count} scenes a task", samples=count) for count in (16, 32, 64, 256)]
_SOLVE = [
    *_each("propagate", ("none", "sequential")),
    *_each("group", ("block",)),
    *_each("percdamp", (0.001, 0.1)),
    *_each("tol", (0.1, 0.01, 1e-6)),
    *_SAMPLES,
]
DEFAULTS = Choice("**defaults**")
# Without old data a score chooses the mask; with it the solution does, in steps.
CHOICES: Mapping[bool, Sequence[Choice]] = {
    False: (
        DEFAULTS,
        *_each("sensitivity", ("diag", "weight")),
        *_each("salience_weight", (0.0, 0.25, 0.75, 1.0)),
        *_each("normalize", ("row", "tensor", "none")),
        *_each("scope", ("row", "block", "layer", "global")),
        *_each("decorate", ("obs", "none")),
        *_each("refits", (4,)),
        *_SOLVE,
    ),
    True: (
        DEFAULTS,
        *_each("retain_weight", (0.01, 0.03, 0.1, 0.2, 0.3, 1.0)),
        *_each("refits", (0, 1, 2, 8)),
        Choice("`refits` 0, `sensitivity` ratio", {"refits": 0, "sensitivity": "ratio"}),
        *_each("scope", ("row", "layer", "global")),
        *_SOLVE,
    ),
}


def row(retain: bool) -> str:
    """Name of the half of the table."""
    return "old data" if retain else "new data only"


def setting(choice: Choice) -> str:
    """The departure as canonical JSON."""
    return setting_text({**choice.changed, "samples": choice.samples})
