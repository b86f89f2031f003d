"""``tailor-mergekit`` runs mergekit itself; its output is that of ``tailor-fast patch``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tailor_fast import Recipe, RunOptions, calibrate, patch_checkpoint
from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.integrations.mergekit import register
from tailor_fast.integrations.mergekit.command import main
from tailor_fast.integrations.mergekit.method import Settings
from tailor_fast.integrations.tensorwise import TensorwisePatch, recipe_from
from tests.integrations.packages import Ran, run_all
from tests.models.processors import text_tokenizer
from tests.patching.disk import llama, moved, save_pair, write_texts

MAIN = "tailor_fast.integrations.mergekit.command:main"
TWICE = "tests.integrations.test_mergekit:register_twice"
PRELOADED = ["mergekit.scripts.run_yaml", "tests.integrations.test_mergekit"]
ROLES = {"statistics": "new", "retain": "old"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BASE and TUNED with biases, statistics of both, and those without one layer."""
    folder = tmp_path_factory.mktemp("mergekit")
    base = llama(blocks=2)
    base, tuned = save_pair(folder, base, moved(base), text_tokenizer())
    data = write_texts(folder / "new.jsonl"), write_texts(folder / "old.jsonl", seed=9)
    calibrate(tuned, data[0], folder / "new.safetensors")
    calibrate(base, data[1], folder / "old.safetensors")
    calibrate(tuned, data[0], folder / "diag.safetensors", options=RunOptions(), kind="diag")
    return folder


def register_twice(_arguments: list[str]) -> None:
    register()
    register()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    return found


def configuration(pair: Path, path: Path, *, second: bool = False, **parameters: Any) -> Path:
    models = [pair / "tuned", pair / "base" / ".." / "tuned"] if second else [pair / "tuned"]
    body = {
        "merge_method": "model_tailor",
        "base_model": str(pair / "base"),
        "models": [{"model": str(path)} for path in models],
        "parameters": parameters,
    }
    path.write_text(yaml.safe_dump(body))
    return path


def check_equal(made: Path, expected: Path) -> None:
    ours, theirs = tensors(made), tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name


@pytest.fixture(scope="module")
def ran_0_1_5(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ran]]:
    folder = tmp_path_factory.mktemp("0.1.5")
    text = {role: str(pair / f"{name}.safetensors") for role, name in ROLES.items()}
    values = {"density": 0.2, "salience_weight": 0.3, "decorate": "exact"}
    full = configuration(pair, folder / "full.yaml", **values, **text)
    each = [{"filter": "mlp", "value": 0.3}, {"value": 0.05}]
    filtered = configuration(pair, folder / "filtered.yaml", density=each)
    wrong = configuration(pair, folder / "wrong.yaml", density=2.0)
    three = configuration(pair, folder / "three.yaml", second=True, density=0.1)
    out = iter(folder / name for name in ("full", "filtered", "wrong", "three", "none"))
    configs = (full, filtered, wrong, three, folder / "nowhere.yaml")
    jobs = [(MAIN, [config, next(out)]) for config in configs]
    return folder, run_all("mergekit-0.1.5", PRELOADED, [*jobs, (TWICE, [])], folder)


@pytest.fixture(scope="module")
def ran_0_1_4(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ran]]:
    folder = tmp_path_factory.mktemp("0.1.4")
    config = configuration(pair, folder / "c.yaml", density=0.2)
    three = configuration(pair, folder / "three.yaml", second=True, density=0.1)
    (folder / "recipe.yaml").write_text("decorate: none\nscope: row\ndensity: 0.9\n")
    options = ["--statistics", pair / "new.safetensors", "--recipe", folder / "recipe.yaml"]
    jobs = [(MAIN, [*options, config, folder / "out"]), (MAIN, [three, folder / "three"])]
    return folder, run_all("mergekit-0.1.4", PRELOADED, [*jobs, (TWICE, [])], folder)


def test_0_1_5_gives_what_patch_gives(
    ran_0_1_5: tuple[Path, list[Ran]], pair: Path, tmp_path: Path
) -> None:
    folder, (ran, *_) = ran_0_1_5
    assert ran.code == 0, ran.err
    recipe = Recipe(density=0.2, salience_weight=0.3)
    files = {role: pair / f"{name}.safetensors" for role, name in ROLES.items()}
    report = patch_checkpoint(pair / "base", pair / "tuned", tmp_path / "ours", recipe, **files)
    check_equal(folder / "full", tmp_path / "ours")
    assert f"kept {report.kept} of {report.targeted} weights" in ran.err
    config = yaml.safe_load((folder / "full" / "mergekit_config.yml").read_text())
    assert config["merge_method"] == "model_tailor"


def test_0_1_4_gives_what_patch_gives(
    ran_0_1_4: tuple[Path, list[Ran]], pair: Path, tmp_path: Path
) -> None:
    """Its configurations hold numbers only: files and words come from the command line."""
    folder, (ran, *_) = ran_0_1_4
    assert ran.code == 0, ran.err
    recipe = Recipe(density=0.2, decorate="none", scope="row")
    statistics = pair / "new.safetensors"
    patch_checkpoint(
        pair / "base", pair / "tuned", tmp_path / "ours", recipe, statistics=statistics
    )
    check_equal(folder / "out", tmp_path / "ours")


def test_a_density_for_each_tensor(ran_0_1_5: tuple[Path, list[Ran]], pair: Path) -> None:
    folder, (_, ran, *_) = ran_0_1_5
    assert ran.code == 0, ran.err
    made, base = tensors(folder / "filtered"), tensors(pair / "base")
    for name in (n for n in made if "proj" in n):
        share = float((made[name] != base[name]).float().mean())
        density = 0.3 if "mlp" in name else 0.05
        assert density - 0.01 < share <= density, name


def test_refusals_reach_the_user_as_one_sentence(ran_0_1_5: tuple[Path, list[Ran]]) -> None:
    """Through mergekit's runner, which plans and runs tasks in its own way."""
    _, (_, _, wrong, _, nowhere, _) = ran_0_1_5
    assert wrong.code == 2
    assert "Traceback" not in wrong.err
    last = wrong.err.strip().splitlines()[-1]
    assert last.startswith("error: merge_method model_tailor, parameters: density: Input should be")
    assert last.endswith("; got 2.0")
    assert nowhere.code != 0


def test_a_second_tuned_model_is_refused(
    ran_0_1_4: tuple[Path, list[Ran]], ran_0_1_5: tuple[Path, list[Ran]]
) -> None:
    old, new = ran_0_1_4[1][1], ran_0_1_5[1][3]
    assert old.code == 2
    assert old.err.endswith("got 2; expected base_model and one model under `models`\n")
    assert new.code != 0
    assert "requires exactly 1 non-base inputs" in new.err  # mergekit's own words


def test_a_second_registration_is_refused(
    ran_0_1_4: tuple[Path, list[Ran]], ran_0_1_5: tuple[Path, list[Ran]]
) -> None:
    for _, (*_, ran) in (ran_0_1_4, ran_0_1_5):
        assert ran.code == 1
        assert "UsageError: mergekit knows 'model_tailor' already; expected one" in ran.err


# What follows needs no mergekit: one tensor after the other, as it calls.


@pytest.mark.parametrize(
    ("fields", "files"),
    [
        ({}, {}),
        ({"density": 0.05, "scope": "row", "untouched": "tuned"}, {}),
        ({"decorate": "obs", "sensitivity": "weight"}, {"statistics": "new"}),
        ({"decorate": "official"}, {"statistics": "new"}),
        ({"density": 0.3, "targets": "mlp"}, {"statistics": "new", "retain": "old"}),
        ({"sensitivity": "diag"}, {"statistics": "diag"}),
    ],
)
def test_tensors_by_themselves(
    pair: Path, tmp_path: Path, fields: dict[str, Any], files: dict[str, str]
) -> None:
    paths = {role: pair / f"{name}.safetensors" for role, name in files.items()}
    recipe = Recipe(**fields)
    report = patch_checkpoint(pair / "base", pair / "tuned", tmp_path / "ours", recipe, **paths)
    base, tuned, expected = (tensors(f) for f in (pair / "base", pair / "tuned", tmp_path / "ours"))
    with TensorwisePatch(pair / "base", pair / "tuned", recipe, **paths) as job:
        for name in reversed(base):  # in any order
            made = job.patch(name, base[name], tuned[name])
            assert torch.equal(made, expected[name]), name
        assert job.report.kept == report.kept


def test_a_missing_entry_is_refused(pair: Path, tmp_path: Path) -> None:
    path = tmp_path / "less.safetensors"
    recipe = Recipe(targets="mlp")
    full = pair / "new.safetensors"
    with safe_open(full, "pt") as file:
        metadata = dict(file.metadata())
    groups = json.loads(metadata["groups"])
    at = next(i for i, group in enumerate(groups) if "model.layers.1.mlp.down_proj" in group)
    groups[at] = ["model.layers.1.mlp.another"]
    save_file(load_file(full), path, {**metadata, "groups": json.dumps(groups)})
    with pytest.raises(InputError, match=r"no entry for model\.layers\.1\.mlp\.down_proj; .*again"):
        TensorwisePatch(pair / "base", pair / "tuned", recipe, statistics=path)
    left = Recipe(ignore=r"layers\.1\.mlp\.down_proj")
    TensorwisePatch(pair / "base", pair / "tuned", left, statistics=path).close()


def test_statistics_of_another_model_are_refused(pair: Path) -> None:
    new, old = pair / "new.safetensors", pair / "old.safetensors"
    base, tuned = pair / "base", pair / "tuned"
    with pytest.raises(InputError, match=r"of another model .* than TUNED .* calibrate again"):
        TensorwisePatch(base, tuned, Recipe(), statistics=old)
    with pytest.raises(InputError, match=r"of another model .* than BASE .* calibrate again"):
        TensorwisePatch(base, tuned, Recipe(), statistics=new, retain=new)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_scopes_over_several_tensors_are_refused(pair: Path, scope: Any) -> None:
    with pytest.raises(UsageError, match=f"scope '{scope}' compares tensors .*`tailor-fast patch`"):
        TensorwisePatch(pair / "base", pair / "tuned", Recipe(scope=scope))


def test_a_tensor_of_another_name_is_refused(pair: Path) -> None:
    job = TensorwisePatch(pair / "base", pair / "tuned", Recipe())
    with job, pytest.raises(InputError, match="has no tensor 'lm'; expected the names of the file"):
        job.patch("lm", torch.zeros(2), torch.zeros(2))


def test_pairs_are_opened_once(pair: Path) -> None:
    settings = Settings({"salience_weight": 1.0})
    folders = pair / "base", pair / "tuned"
    base, tuned = map(tensors, folders)
    name = "model.layers.0.mlp.up_proj.weight"
    for density in (0.1, 0.2):
        made = settings.merge(name, (base[name], tuned[name]), folders, {"density": density})
        assert int((made != base[name]).sum()) == int(density * made.numel())
    assert len(settings._jobs) == 1
    made = settings.merge(name, (base[name], tuned[name]), folders, {"layers": 1})
    assert torch.equal(made, base[name])
    assert len(settings._jobs) == 2
    settings.close()


def test_values_that_are_none_of_a_recipe() -> None:
    with pytest.raises(UsageError, match=r"^x: decorate: Input should be .*; got 'fast'$"):
        recipe_from({"decorate": "fast"}, "x")
    with pytest.raises(UsageError, match=r"^x: decorate='official' is the authors' .*scope"):
        recipe_from({"decorate": "official", "scope": "row"}, "x")
    assert recipe_from({"density": 0.3, "scope": None}, "x") == Recipe(density=0.3)


def test_the_command_without_mergekit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "mergekit", None)
    assert main([str(tmp_path / "c.yaml"), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: mergekit cannot be imported")
    assert error.endswith("pip install 'tailor_fast[mergekit]'\n")
    (tmp_path / "recipe.yaml").write_text("dense: 0.1\n")
    assert main(["--recipe", str(tmp_path / "recipe.yaml"), "c.yaml", "out"]) == 2
    assert "'dense'" in capsys.readouterr().err


def test_another_api_of_mergekit(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("mergekit", "mergekit.merge_methods"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    pattern = r"mergekit .* is installed, whose API is neither .*; pip install 'mergekit==0\.1\.5'"
    with pytest.raises(UsageError, match=pattern):
        register()
