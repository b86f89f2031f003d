"""``stitch_checkpoints``: what is written, and that it is the best of its kind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tailor_fast._core.errors import InputError, OutputError, UsageError
from tailor_fast.calibration import calibrate
from tailor_fast.patchfile import diff_checkpoints
from tailor_fast.patching import Recipe, patch_checkpoint
from tailor_fast.patching.verify import verify_output
from tailor_fast.stitching import Support, Task, stitch_checkpoints
from tailor_fast.stitching.report import relative_losses
from tests.patching.disk import llava_pair, write_scenes, write_texts
from tests.stitching.disk import (
    OPTIONS,
    family,
    layer_errors,
    save,
    take_statistics,
    tuned_by,
    words,
)

SINGLE = Recipe(propagate="none")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Base, three fine-tunes, their samples and statistics, and statistics of unseen samples."""
    folder = tmp_path_factory.mktemp("family")
    _, tuned = family(folder, "abc", blocks=2)
    for index, (name, path) in enumerate(tuned.items()):
        take_statistics(path, folder / f"{name}.jsonl")
        take_statistics(path, write_texts(folder / f"{name}-unseen.jsonl", seed=40 + index))
    take_statistics(folder / "base", write_texts(folder / "old.jsonl", seed=60))
    return folder


def tasks_of(made: Path, names: str = "ab", **weights: float) -> dict[str, Task]:
    return {
        name: Task(
            made / f"tuned-{name}",
            statistics=made / f"{name}.safetensors",
            weight=weights.get(name, 1.0),
        )
        for name in names
    }


def single_patches(made: Path, folder: Path, names: str) -> list[dict[str, torch.Tensor]]:
    """Each task patched by itself, from the same statistics."""
    found = []
    for name in names:
        out = folder / f"single-{name}"
        patch_checkpoint(
            made / "base",
            made / f"tuned-{name}",
            out,
            SINGLE,
            statistics=made / f"{name}.safetensors",
            options=OPTIONS,
        )
        found.append(words(out))
    return found


def unseen_error(made: Path, model: dict[str, torch.Tensor], names: str) -> float:
    """Joint error on unseen samples, relative to the base model's, mean over tasks and layers."""
    base = words(made / "base")
    shares = []
    for name in names:
        tuned, sums = words(made / f"tuned-{name}"), made / f"{name}-unseen.safetensors"
        shares.append(layer_errors(model, tuned, sums) / layer_errors(base, tuned, sums))
    return torch.cat(shares).mean().item()


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_it_beats_every_other_use_of_the_same_patches(
    names: str, made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = stitch_checkpoints(made / "base", tasks_of(made, names), out, options=OPTIONS)
    base, stitched = words(made / "base"), words(out)
    singles = single_patches(made, tmp_path, names)
    deltas = {key: [single[key] - base[key] for single in singles] for key in base}
    total = {key: base[key] + sum(parts) for key, parts in deltas.items()}
    mean = {key: base[key] + sum(parts) / len(parts) for key, parts in deltas.items()}
    ours = unseen_error(made, stitched, names)
    others = [unseen_error(made, model, names) for model in (total, mean, *singles)]
    assert ours < 0.75 * min(others)

    for row in report.linears:
        union = sum(single[row.tensor] != base[row.tensor] for single in singles) > 0
        assert not bool((stitched[row.tensor] != base[row.tensor])[~union].any())
        assert row.kept == int(union.sum())
        assert row.loss < row.loss_undecorated
        assert row.loss < row.loss_reverted
    for name, share in relative_losses(report.linears).items():
        assert 0 < share < 0.75, name


def test_only_what_it_solved_differs_from_base_and_verify_finds_it_so(
    made: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = stitch_checkpoints(made / "base", tasks_of(made), out, options=OPTIONS)
    base, stitched = words(made / "base"), words(out)
    solved = {row.tensor for row in report.linears}
    assert len(solved) == 14
    for name, tensor in stitched.items():
        assert torch.equal(tensor, base[name]) == (name not in solved), name
    result = verify_output(out)
    assert result.ok
    assert result.checked["allowed"] == report.kept
    AutoModelForCausalLM.from_pretrained(out)
    written = json.loads((out / "tailor_report.json").read_text())
    assert written["recipe"]["weights"] == {"a": 1.0, "b": 1.0}
    assert written["tasks"]["b"] == {
        "weight": 1.0,
        "surrogate": False,
        "samples": 12,
        "data_sha256": written["tasks"]["b"]["data_sha256"],
    }
    manifest = json.loads((out / "tailor_manifest.json").read_text())
    assert set(manifest["inputs"]) == {"base", "a", "b"}
    assert all(record["root"] for record in manifest["inputs"].values())
    timed = {"tailor_report.json", "tailor_report.png"}  # two equal runs have one manifest
    assert timed.isdisjoint(manifest["output"]["files"])
    assert "tuned-a" in (out / "README.md").read_text()
    assert (out / "tailor_report.png").stat().st_size > 1000
    assert (out / "tokenizer.json").read_bytes() == (made / "base/tokenizer.json").read_bytes()


def test_verify_counts_against_the_densities_of_all_tasks(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stitch_checkpoints(made / "base", tasks_of(made), out, options=OPTIONS)
    path = out / "tailor_report.json"
    report = json.loads(path.read_text())
    report["recipe"]["weights"] = {"a": 1.0}  # one task's density does not allow so many
    path.write_text(json.dumps(report))
    assert any("density 0.1 allows" in line for line in verify_output(out).violations)


def test_one_task_is_a_patch(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stitch_checkpoints(made / "base", tasks_of(made, "a"), out, options=OPTIONS)
    (single,) = single_patches(made, tmp_path, "a")
    base, stitched = words(made / "base"), words(out)
    for name, tensor in single.items():
        assert torch.equal(stitched[name] != base[name], tensor != base[name]), name
        assert torch.allclose(stitched[name], tensor, rtol=0, atol=1e-5), name


def test_weights_decide_between_tasks(made: Path, tmp_path: Path) -> None:
    losses = {}
    for weight in (0.1, 1.0, 10.0):
        out = tmp_path / f"out-{weight}"
        tasks = tasks_of(made, "ab", a=weight)
        report = stitch_checkpoints(made / "base", tasks, out, options=OPTIONS)
        losses[weight] = relative_losses(report.linears)
    assert losses[0.1]["a"] > losses[1.0]["a"] > losses[10.0]["a"]
    assert losses[0.1]["b"] < losses[1.0]["b"] < losses[10.0]["b"]


def test_old_tasks_are_held_on_to(made: Path, tmp_path: Path) -> None:
    def old_error(weight: float) -> float:
        report = stitch_checkpoints(
            made / "base",
            tasks_of(made),
            tmp_path / f"out-{weight}",
            Recipe(retain_weight=weight),
            retain=made / "old.safetensors",
            options=OPTIONS,
        )
        assert all(task.old > 0 for row in report.linears for task in row.tasks.values())
        return sum(row.old for row in report.linears)

    assert old_error(3.0) < 0.7 * old_error(0.01)


@pytest.mark.parametrize("support", ["union", "best"])
def test_with_old_data_the_solve_chooses_as_many_weights_itself(
    support: Support, made: Path, tmp_path: Path
) -> None:
    reports = {}
    for refits in (0, None):
        out = tmp_path / f"out-{refits}"
        reports[refits] = stitch_checkpoints(
            made / "base",
            tasks_of(made),
            out,
            Recipe(refits=refits),
            support=support,
            retain=made / "old.safetensors",
            options=OPTIONS,
        )
        assert verify_output(out).ok
    by_score, chosen = reports[0], reports[None]
    assert (by_score.recipe["refits"], chosen.recipe["refits"]) == (0, 4)
    assert not any("refits" in note for note in by_score.notes)
    assert "the mask is chosen in 4 refits" in " ".join(chosen.notes)
    for before, after in zip(by_score.linears, chosen.linears, strict=True):
        assert after.kept == before.kept
        assert after.loss < before.loss
        assert after.loss_reverted == pytest.approx(before.loss_reverted)


def test_a_chosen_score_or_scope_leaves_the_mask_to_the_score(made: Path, tmp_path: Path) -> None:
    for index, recipe in enumerate((Recipe(sensitivity="diag"), Recipe(scope="row"))):
        report = stitch_checkpoints(
            made / "base",
            tasks_of(made),
            tmp_path / f"out-{index}",
            recipe,
            retain=made / "old.safetensors",
            options=OPTIONS,
        )
        assert report.recipe["refits"] == 0


def test_best_keeps_one_density(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = stitch_checkpoints(made / "base", tasks_of(made), out, support="best", options=OPTIONS)
    assert all(row.kept == row.rows * row.cols // 10 for row in report.linears)
    assert verify_output(out).ok


def test_samples_give_what_their_statistics_give(made: Path, tmp_path: Path) -> None:
    tasks = tasks_of(made)
    tasks["b"] = Task(made / "tuned-b", calibration=made / "b.jsonl")
    outs = [tmp_path / "given", tmp_path / "taken"]
    stitch_checkpoints(
        made / "base", tasks_of(made), outs[0], retain=made / "old.safetensors", options=OPTIONS
    )
    stitch_checkpoints(made / "base", tasks, outs[1], retain=made / "old.jsonl", options=OPTIONS)
    given, taken = map(words, outs)
    assert all(torch.equal(given[name], taken[name]) for name in given)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["given", "taken"]


def test_patch_files_are_the_surrogate(made: Path, tmp_path: Path) -> None:
    tasks, supports = {}, {}
    for name in "ab":
        single = tmp_path / f"single-{name}"
        patch_checkpoint(
            made / "base",
            made / f"tuned-{name}",
            single,
            SINGLE,
            statistics=made / f"{name}.safetensors",
            options=OPTIONS,
        )
        patch = tmp_path / f"{name}.tailor.safetensors"
        diff_checkpoints(made / "base", single, patch)
        tasks[name] = Task(patch=patch, statistics=made / f"{name}.safetensors")
        supports[name] = words(single)
    out = tmp_path / "out"
    report = stitch_checkpoints(made / "base", tasks, out, options=OPTIONS)
    assert any("surrogate for a, b" in note for note in report.notes)
    base, stitched = words(made / "base"), words(out)
    for row in report.linears:
        own = [single[row.tensor] != base[row.tensor] for single in supports.values()]
        assert row.kept == int((own[0] | own[1]).sum())
    assert verify_output(out).ok
    # It answers the fine-tuned models better than either patch, and worse than the real thing.
    exact = tmp_path / "exact"
    stitch_checkpoints(made / "base", tasks_of(made), exact, options=OPTIONS)
    surrogate = unseen_error(made, stitched, "ab")
    assert unseen_error(made, words(exact), "ab") < surrogate
    assert surrogate < min(unseen_error(made, single, "ab") for single in supports.values())


def test_layers_that_a_task_leaves_alone_take_none_of_its_support(
    made: Path, tmp_path: Path
) -> None:
    """They still hold on to the base model's answers on that task."""
    base = AutoModelForCausalLM.from_pretrained(made / "base")
    tuned = tuned_by(base, 77)
    kept = {k: v for k, v in base.state_dict().items() if "layers.0" in k}
    tuned.load_state_dict(kept, strict=False)
    tasks = tasks_of(made, "a")
    tasks["late"] = Task(save(tuned, tmp_path / "late"), calibration=made / "b.jsonl")
    report = stitch_checkpoints(made / "base", tasks, tmp_path / "out", options=OPTIONS)
    alone = stitch_checkpoints(
        made / "base", tasks_of(made, "a"), tmp_path / "alone", options=OPTIONS
    )
    for row, other in zip(report.linears, alone.linears, strict=True):
        if "layers.0." in row.name:
            assert row.kept == other.kept
            assert row.tasks["late"].base == 0
            assert row.tasks["late"].stitched > 0
            assert row.tasks["a"].stitched > other.tasks["a"].stitched
        else:
            assert row.kept > other.kept


def test_a_llava_with_two_tasks(tmp_path: Path) -> None:
    base, one = llava_pair(tmp_path)
    two = tmp_path / "two"
    two.mkdir()
    for path in one.iterdir():
        (two / path.name).write_bytes(path.read_bytes())
    tasks = {
        "one": Task(one, calibration=write_scenes(tmp_path / "one.jsonl")),
        "two": Task(two, calibration=write_scenes(tmp_path / "two.jsonl", seed=3)),
    }
    report = stitch_checkpoints(base, tasks, tmp_path / "out", options=OPTIONS)
    assert not any("vision_tower" in row.name for row in report.linears)
    assert any("projector" in row.name for row in report.linears)
    assert verify_output(tmp_path / "out").ok


WRONG = {
    "no task is given": {},
    "cannot be called 'base'": {"base": Task("x", statistics="s")},
    "expected a tuned checkpoint or a patch": {"a": Task(statistics="s")},
    "expected statistics or samples": {"a": Task("x")},
    "expected statistics that were taken on it": {"a": Task(patch="p", calibration="d")},
    "weight must be a finite number above 0; got 0": {"a": Task("x", statistics="s", weight=0)},
}


@pytest.mark.parametrize("message", WRONG)
def test_tasks_that_cannot_be(message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        stitch_checkpoints("base", WRONG[message], tmp_path / "out")


RECIPES = {
    "decorate 'obs' is for one task": Recipe(decorate="obs"),
    "propagate 'sequential' is for one task": Recipe(propagate="sequential"),
    "untouched 'tuned' is for one task": Recipe(untouched="tuned"),
    "refits choose the mask of a whole layer for all tasks; got scope 'row'": Recipe(
        refits=4, scope="row"
    ),
    "scope 'global' cannot be used": Recipe(scope="global"),
    "compares with old tasks; got no old-task data": Recipe(sensitivity="ratio"),
}


@pytest.mark.parametrize("message", RECIPES)
def test_recipes_for_one_task_are_refused(message: str, made: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        stitch_checkpoints(made / "base", tasks_of(made), tmp_path / "out", RECIPES[message])


def test_supports_are_checked(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="scope 'row' cannot be used with support 'best'"):
        stitch_checkpoints(
            made / "base", tasks_of(made), tmp_path / "out", Recipe(scope="row"), support="best"
        )
    with pytest.raises(UsageError, match="support must be 'union' or 'best'; got 'all'"):
        stitch_checkpoints(made / "base", tasks_of(made), tmp_path / "out", support="all")


def test_inputs_that_do_not_belong_together(made: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def stitch(task: Task, **options: object) -> None:
        tasks = {**tasks_of(made, "a"), "b": task}
        stitch_checkpoints(made / "base", tasks, out, options=OPTIONS, **options)

    wrong = Task(made / "tuned-b", statistics=made / "a.safetensors")
    with pytest.raises(InputError, match=r"of another model .* than task 'b'"):
        stitch(wrong)
    right = Task(made / "tuned-b", statistics=made / "b.safetensors")
    with pytest.raises(InputError, match=r"of another model .* than BASE"):
        stitch(right, retain=made / "a.safetensors")
    diff_checkpoints(made / "tuned-a", made / "tuned-b", tmp_path / "other.tailor.safetensors")
    other = Task(patch=tmp_path / "other.tailor.safetensors", statistics=made / "b.safetensors")
    with pytest.raises(InputError, match="is a patch of another base"):
        stitch(other)
    diff_checkpoints(made / "base", made / "tuned-b", tmp_path / "b.tailor.safetensors")
    bases = Task(patch=tmp_path / "b.tailor.safetensors", statistics=made / "old.safetensors")
    with pytest.raises(InputError, match="its statistics are of BASE"):
        stitch(bases)
    diag = tmp_path / "diag.safetensors"
    calibrate(made / "tuned-b", made / "b.jsonl", diag, kind="diag", options=OPTIONS)
    with pytest.raises(InputError, match="kind 'diag'; expected whole Grams"):
        stitch(Task(made / "tuned-b", statistics=diag))
    assert not out.exists()
    out.mkdir()
    with pytest.raises(OutputError, match="exists already"):
        stitch(right)


def test_too_little_memory_is_refused_before_anything_runs(made: Path, tmp_path: Path) -> None:
    tight = replace(OPTIONS, max_ram=10_000)
    with pytest.raises(UsageError, match="max_ram of 10000 bytes is too little"):
        stitch_checkpoints(made / "base", tasks_of(made), tmp_path / "out", options=tight)
    assert not list(tmp_path.iterdir())
