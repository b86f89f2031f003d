"""What statistics tell of many recipes, against models that were patched and run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tailor_fast._core.errors import InputError
from tailor_fast._core.progress import Silent
from tailor_fast.calibration.options import RunOptions
from tailor_fast.models.inputs import load_processor, make_batches
from tailor_fast.models.samples import read_samples
from tailor_fast.patching import grid
from tailor_fast.patching.grid import GridJob, choices_of, front_of
from tailor_fast.patching.job import Request
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.report import Point
from tailor_fast.patching.tailor import tailor_model
from tests.patching.disk import llama_pair, write_texts

OPTIONS = RunOptions(batch_size=4)


def points_of(folder: Path, pair: tuple[Path, Path], recipe: Recipe) -> list[Point]:
    new, old = (write_texts(folder / f"{name}.jsonl", 8, seed) for seed, name in enumerate("no"))
    job = GridJob(Request(*pair, folder / "out", recipe, new, None, old, OPTIONS), Silent())
    with job.opened() as (sources, layout):
        job.follow(sources, layout)
    return job.points()


def inputs(
    model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]
) -> dict[str, torch.Tensor]:
    """Counted inputs of every patched layer ``[tokens, cols]``."""
    found: dict[str, list[torch.Tensor]] = {}
    mask = torch.empty(0)

    def hook(name: str) -> Any:
        def keep(_module: object, args: tuple[torch.Tensor]) -> None:
            found.setdefault(name, []).append(args[0][mask].double())

        return keep

    layers = [(n, m) for n, m in model.named_modules() if ".layers." in n and hasattr(m, "weight")]
    for name, module in layers:
        module.register_forward_pre_hook(hook(name))
    for batch in batches:
        mask = batch["attention_mask"].bool()
        with torch.no_grad():
            model(**batch)
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("refits", [0, 4])
def test_errors_are_those_of_models_that_run(refits: int, tmp_path: Path) -> None:
    pair = llama_pair(tmp_path, blocks=2)
    asked = Recipe(retain_weight=0.3, refits=refits, densities={"mlp": 0.4})
    points = points_of(tmp_path, pair, asked)
    assert [point.density for point in points] == list(grid.DENSITIES)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path).eval() for path in pair)
    processor = load_processor(pair[0])
    new, old = (
        make_batches(
            read_samples(tmp_path / f"{name}.jsonl"), processor, batch_size=4, max_length=99
        )
        for name in "no"
    )
    seen, kept = inputs(theirs, list(new)), inputs(ours, list(old))
    point = points[3]
    recipe = asked.model_copy(update={"density": point.density, "propagate": "none"})
    made = dict(
        tailor_model(ours, theirs, new, recipe, retain_batches=old).model.named_parameters()
    )
    left, caused = [], []
    for name, module in ours.named_modules():
        if name not in seen or module.weight.dim() < 2:
            continue
        before, after, patched = (
            state[f"{name}.weight"].detach().double()
            for state in (dict(ours.named_parameters()), dict(theirs.named_parameters()), made)
        )
        x, y = seen[name].T, kept[name].T
        left.append(((after - patched) @ x).square().sum() / ((after - before) @ x).square().sum())
        caused.append(
            ((patched - before) @ y).square().sum() / ((after - before) @ y).square().sum()
        )
    assert len(left) == 14
    expected = torch.stack([torch.stack(left).mean(), torch.stack(caused).mean()])
    found = torch.tensor([point.left, point.caused], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0.0)


def test_what_is_chosen_is_not_searched() -> None:
    free = choices_of(Recipe())
    assert len({tuple(choice.values()) for choice in free}) == len(free)
    assert len(free) == len(grid.DENSITIES) * len(grid.RETAIN_WEIGHTS)
    assert {choice["density"] for choice in choices_of(Recipe(density=0.1))} == {0.1}
    assert len(choices_of(Recipe(density=0.1))) == len(grid.RETAIN_WEIGHTS)
    assert {choice["retain_weight"] for choice in choices_of(Recipe(retain_weight=0.1))} == {0.1}
    assert len(choices_of(Recipe(retain_weight=0.1))) == len(grid.DENSITIES)


def test_a_large_model_is_measured_on_some_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = llama_pair(tmp_path, blocks=2)
    solved: list[str] = []
    solve = grid.solve_layer

    def noted(target: Any, *rest: Any) -> Any:
        solved.append(target.name)
        return solve(target, *rest)

    monkeypatch.setattr(grid, "solve_layer", noted)
    monkeypatch.setattr(grid, "_MOST_LAYERS", 5)
    points = points_of(tmp_path, pair, Recipe(density=0.3))
    assert len(set(solved)) == 5
    assert len(solved) == 5 * len(points)
    left, caused = ([getattr(p, name) for p in points] for name in ("left", "caused"))
    assert left == sorted(left)  # the more the old tasks weigh, the less of the new one
    assert caused == sorted(caused, reverse=True)


def test_a_model_whose_layers_see_nothing_is_refused(tmp_path: Path) -> None:
    request = Request(*[tmp_path] * 3, Recipe(), tmp_path, None, tmp_path, OPTIONS)
    with pytest.raises(
        InputError, match="no layer that is patched sees tokens of the new task and"
    ):
        GridJob(request, Silent()).points()


POINTS = st.lists(
    st.builds(Point, st.just(0.1), st.just(0.1), st.floats(0, 1), st.floats(0, 1)), min_size=1
)


@settings(max_examples=50)
@given(POINTS)
def test_nothing_beats_a_point_of_the_front(points: list[Point]) -> None:
    front = front_of(points)
    for chosen in front:
        assert not any(p.left < chosen.left and p.caused < chosen.caused for p in points)
    for point in points:
        assert any(c.left <= point.left and c.caused <= point.caused for c in front)
    assert [p.caused for p in front] == sorted(p.caused for p in front)
    assert [p.left for p in front] == sorted((p.left for p in front), reverse=True)
