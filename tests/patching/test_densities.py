"""A density per pattern: the same on every path, checked by ``verify``, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from tailor_fast.calibration.options import RunOptions
from tailor_fast.ops.select import kept_count
from tailor_fast.patching import memory
from tailor_fast.patching.checkpoints import patch_checkpoint, plan_patch
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.verify import verify_output
from tests.cli.running import CommandLine
from tests.patching.disk import llama_pair, write_texts
from tests.patching.test_checkpoints import words

OPTIONS = RunOptions(batch_size=4)
DENSITIES = {r"layers\.1\.mlp\.up": 0.5, "mlp": 0.02, "up_proj": 0.9, "o_proj": 0.01}


def expected(name: str) -> float:
    if "layers.1.mlp.up" in name:
        return 0.5
    if "mlp" in name:
        return 0.02
    return 0.01 if "o_proj" in name else 0.1


@pytest.mark.parametrize("how", ["free", "small ring", "samples", "official"])
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_each_layer_has_its_own(
    how: str, scope: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "small ring":
        for name, size in (("RING_BYTES", 16 << 10), ("LEAST_RING_BYTES", 16 << 10), ("_PARTS", 2)):
            monkeypatch.setattr(memory, name, size)
        monkeypatch.setattr(memory, "COPY_BYTES", 4 << 10)
    if how == "official" and scope == "row":
        pytest.skip("the authors' algorithm has no scope")
    choices: dict[str, Any] = {"scope": scope, "densities": DENSITIES}
    if how == "official":
        choices = {"decorate": "official", "densities": DENSITIES}
    base, tuned = llama_pair(tmp_path, blocks=2, width=64)
    data = how in ("samples", "official")
    given = {"calibration": write_texts(tmp_path / "new.jsonl", 6)} if data else {}
    out, recipe = tmp_path / "out", Recipe(**choices)
    plan = plan_patch(base, tuned, out, recipe, options=OPTIONS, **given)
    report = patch_checkpoint(base, tuned, out, recipe, options=OPTIONS, **given)
    kept = {row.name: row.kept for row in report.linears}
    assert len(kept) == 14
    if how != "official":
        assert kept == {layer.name: layer.kept for layer in plan.layers} or scope == "row"
    before, after = words(base), words(out)
    for row in report.linears:
        count = kept_count(row.rows * row.cols, expected(row.name))
        assert int((before[row.tensor] != after[row.tensor]).sum()) <= row.kept
        if scope == "tensor" and how != "official":
            assert row.kept == count, row.name
        assert abs(row.kept - count) <= (
            row.rows if how != "official" else 0.02 * row.rows * row.cols
        )
    found = verify_output(out)
    assert found.ok, found.violations


def test_verify_counts_each_layer(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path, blocks=2)
    patch_checkpoint(base, tuned, tmp_path / "out", Recipe(densities={"mlp": 0.5}))
    path = tmp_path / "out" / "tailor_report.json"
    report = json.loads(path.read_text())
    report["recipe"]["densities"] = {"mlp": 0.4}
    path.write_text(json.dumps(report))
    found = [v for v in verify_output(tmp_path / "out").violations if "density 0.4 allows" in v]
    assert len(found) == 1


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        ({"densities": {"(": 0.1}}, "not a regular expression"),
        ({"densities": {"mlp": 1.5}}, "less than or equal to 1"),
        ({"densities": {"mlp": 0.1}, "scope": "global"}, "scope='global' has one density for laye"),
        ({"densities": {"mlp": 0.1}, "scope": "layer"}, "densities cannot be chosen with it"),
    ],
)
def test_densities_that_are_refused(choices: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Recipe(**choices)


def test_the_command_line_takes_them_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tailor_fast = CommandLine(capsys)
    llama_pair(tmp_path, blocks=2)
    monkeypatch.chdir(tmp_path)
    options = ("--densities", "up_proj=0.5", "--densities", "mlp=0.02", "-q")
    ran = tailor_fast("patch", "base", "tuned", "-o", "out", *options)
    assert ran.code == 0, ran.err
    report = json.loads((tmp_path / "out" / "tailor_report.json").read_text())
    assert report["recipe"]["densities"] == {"up_proj": 0.5, "mlp": 0.02}
    shares = {row["name"].rpartition(".")[2]: round(row["density"], 2) for row in report["linears"]}
    assert shares["up_proj"] == 0.5
    assert shares["down_proj"] == 0.02
    assert shares["q_proj"] == 0.1
    ran = tailor_fast("patch", "base", "tuned", "-o", "other", "--densities", "mlp")
    assert ran.code == 2
    assert "--densities must be RE=SHARE, as in mlp=0.05; got 'mlp'" in ran.err
    ran = tailor_fast("patch", "base", "tuned", "-o", "other", "--densities", "mlp=7")
    assert ran.code == 2
    assert "--densities: Input should be less than or equal to 1; got 7.0" in ran.err


def test_a_density_of_every_layer_is_that_density(tmp_path: Path) -> None:
    base, tuned = llama_pair(tmp_path, blocks=2)
    patch_checkpoint(base, tuned, tmp_path / "one", Recipe(density=0.3))
    patch_checkpoint(base, tuned, tmp_path / "two", Recipe(densities={"": 0.3}))
    one, two = words(tmp_path / "one"), words(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in one)
