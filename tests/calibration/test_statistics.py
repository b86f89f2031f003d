"""Statistics files: the same patch as from samples, and refusals of what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tailor_fast._core.errors import InputError, OutputError, UsageError
from tailor_fast.calibration import CalibrationReport, RunOptions, calibrate
from tailor_fast.calibration.statfile import open_statistics
from tailor_fast.checkpoint import Checkpoint
from tailor_fast.patching.checkpoints import patch_checkpoint
from tailor_fast.patching.recipe import Recipe
from tests.patching.disk import llama_pair, llava_pair, write_scenes, write_texts
from tests.simulated import least

OPTIONS = RunOptions(batch_size=4)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def place(tmp_path: Path) -> dict[str, Path]:
    """A pair, samples of the new task and of old tasks."""
    base, tuned = llama_pair(tmp_path)
    return {
        "base": base,
        "tuned": tuned,
        "new": write_texts(tmp_path / "new.jsonl"),
        "old": write_texts(tmp_path / "old.jsonl", seed=9),
        "stats": tmp_path / "new.safetensors",
        "old_stats": tmp_path / "old.safetensors",
        "out": tmp_path / "out",
        "other": tmp_path / "other",
    }


def patch(place: dict[str, Path], out: str, recipe: Recipe | None = None, **data: Any) -> Any:
    return patch_checkpoint(
        place["base"], place["tuned"], place[out], recipe, options=OPTIONS, **data
    )


@pytest.mark.parametrize("scope", ["tensor", "layer", "global"])
def test_statistics_give_the_patch_of_the_samples(place: dict[str, Path], scope: str) -> None:
    report = calibrate(place["tuned"], place["new"], place["stats"], options=OPTIONS)
    assert (report.groups, report.layers, report.samples) == (12, 21, 12)
    patch(place, "out", Recipe(scope=scope), statistics=place["stats"])
    sampled = Recipe(scope=scope, propagate="none")
    patch(place, "other", sampled, calibration=place["new"])
    ours, theirs = weights(place["out"]), weights(place["other"])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_old_statistics_give_the_retention_of_old_samples(place: dict[str, Path]) -> None:
    calibrate(place["tuned"], place["new"], place["stats"], options=OPTIONS)
    calibrate(place["base"], place["old"], place["old_stats"], options=OPTIONS)
    patch(place, "out", statistics=place["stats"], retain=place["old_stats"])
    recipe = Recipe(propagate="none", retain_weight=0.1)  # as of statistics
    patch(place, "other", recipe, calibration=place["new"], retain=place["old"])
    ours, theirs = weights(place["out"]), weights(place["other"])
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_old_statistics_beside_samples_are_said_in_the_report(place: dict[str, Path]) -> None:
    calibrate(place["base"], place["old"], place["old_stats"], options=OPTIONS)
    report = patch(place, "out", calibration=place["new"], retain=place["old_stats"])
    assert any("taken to be the base model's" in note for note in report.notes)
    assert all(row.retain_scale > 0 for row in report.linears)


def test_diagonals_select_and_decorate_nothing(place: dict[str, Path]) -> None:
    full = calibrate(place["tuned"], place["new"], place["old_stats"], options=OPTIONS)
    diag = calibrate(place["tuned"], place["new"], place["stats"], kind="diag", options=OPTIONS)
    assert diag.bytes < full.bytes / 3
    report = patch(place, "out", statistics=place["stats"])
    assert any("nothing decorated" in note for note in report.notes)
    recipe = Recipe(sensitivity="diag", decorate="none")
    patch(place, "other", recipe, statistics=place["old_stats"])
    ours, theirs = weights(place["out"]), weights(place["other"])
    same = [float((ours[name] == theirs[name]).float().mean()) for name in theirs]
    assert min(same) > 0.99  # the two diagonals differ by rounding, and so may the last word kept


def test_images_are_calibrated_too(tmp_path: Path) -> None:
    _, tuned = llava_pair(tmp_path)
    data = write_scenes(tmp_path / "new.jsonl")
    report = calibrate(tuned, data, tmp_path / "s.safetensors", options=OPTIONS)
    assert report.uncalled == ()
    with open_statistics(tmp_path / "s.safetensors") as statistics:
        text = statistics.moments("model.language_model.layers.0.mlp.up_proj", torch.device("cpu"))
        image = statistics.moments("model.multi_modal_projector.linear_1", torch.device("cpu"))
    assert text.tokens == report.tokens
    assert image.tokens == 4 * 10


def test_a_budget_does_not_change_the_sums(place: dict[str, Path]) -> None:
    calibrate(place["tuned"], place["new"], place["stats"], options=OPTIONS)

    def tight(limit: int) -> CalibrationReport:
        options = RunOptions(batch_size=4, max_ram=limit)
        return calibrate(place["tuned"], place["new"], place["old_stats"], options=options)

    needed = least(tight)
    assert not place["old_stats"].exists()
    assert tight(needed).planned == needed
    assert place["stats"].read_bytes() == place["old_stats"].read_bytes()


def test_statistics_of_another_model_are_refused(place: dict[str, Path]) -> None:
    calibrate(place["base"], place["new"], place["stats"], options=OPTIONS)
    with pytest.raises(InputError, match=r"are of another model .* than TUNED"):
        patch(place, "out", statistics=place["stats"])
    calibrate(place["tuned"], place["new"], place["old_stats"], options=OPTIONS)
    with pytest.raises(InputError, match=r"are of another model .* than BASE"):
        patch(place, "out", calibration=place["new"], retain=place["old_stats"])
    assert not place["out"].exists()


@pytest.mark.parametrize(
    ("recipe", "data", "message"),
    [
        ({"propagate": "asymmetric"}, {"statistics": "stats"}, "needs samples; got statistics"),
        ({}, {"statistics": "stats", "calibration": "new"}, "expected one of the two"),
        ({}, {"statistics": "stats", "retain": "old"}, "expected retain statistics"),
        ({}, {"retain": "old"}, "without data of the new task"),
        ({"decorate": "exact"}, {"statistics": "diag"}, "needs Grams"),
        ({"sensitivity": "obs"}, {"statistics": "diag"}, "needs Grams"),
        ({}, {"calibration": "new", "retain": "diag"}, "decorate 'exact' needs the whole Gram"),
        ({"sensitivity": "ratio"}, {"statistics": "stats"}, "got no old-task data"),
        ({"decorate": "exact"}, {}, "decorate 'exact' needs data"),
    ],
)
def test_what_runs_for_which_input(
    recipe: dict[str, Any], data: dict[str, str], message: str, place: dict[str, Path]
) -> None:
    place["diag"] = place["stats"].with_name("diag.safetensors")
    used = set(data.values())
    if "stats" in used:
        calibrate(place["tuned"], place["new"], place["stats"], options=OPTIONS)
    if "diag" in used:
        calibrate(place["tuned"], place["new"], place["diag"], kind="diag", options=OPTIONS)
    with pytest.raises(UsageError, match=message):
        patch(place, "out", Recipe(**recipe), **{key: place[name] for key, name in data.items()})


def test_a_layer_that_the_statistics_lack_is_left_at_base(place: dict[str, Path]) -> None:
    calibrate(place["tuned"], place["new"], place["stats"], options=OPTIONS)
    with open_statistics(place["stats"]) as statistics:
        header = statistics.header
    metadata = header.metadata()
    metadata["groups"] = metadata["groups"].replace(
        "layers.2.mlp.down_proj", "layers.9.mlp.down_proj"
    )
    save_file(load_file(place["stats"]), place["stats"], metadata)
    report = patch(place, "out", statistics=place["stats"])
    row = next(row for row in report.linears if row.name == "model.layers.2.mlp.down_proj")
    assert row.kept == 0
    assert "the statistics have no entry" in row.note
    name = "model.layers.2.mlp.down_proj.weight"
    shards = [load_file(path) for path in place["base"].glob("*.safetensors")]
    original = next(shard[name] for shard in shards if name in shard)
    assert torch.equal(weights(place["out"])[name], original)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tailor_format", "something", "expected 'tailor-statistics/1'"),
        ("groups", "[1", "incomplete or malformed"),
        ("groups", '[["a"]]', "its tensors are not those"),
        ("samples", "many", "incomplete or malformed"),
    ],
)
def test_malformed_statistics_are_refused(
    key: str, value: str, message: str, place: dict[str, Path]
) -> None:
    calibrate(place["tuned"], place["new"], place["stats"], kind="diag", options=OPTIONS)
    with open_statistics(place["stats"]) as statistics:
        metadata = statistics.header.metadata()
    save_file(load_file(place["stats"]), place["stats"], {**metadata, key: value})
    with pytest.raises(InputError, match=message):
        patch(place, "out", statistics=place["stats"])


def test_sums_that_are_not_finite_are_refused(place: dict[str, Path]) -> None:
    calibrate(place["tuned"], place["new"], place["stats"], options=OPTIONS)
    with open_statistics(place["stats"]) as statistics:
        metadata = statistics.header.metadata()
    tensors = load_file(place["stats"])
    tensors["g0.gram"][0, 0] = float("nan")
    save_file(tensors, place["stats"], metadata)
    with pytest.raises(InputError, match=r"g0\.gram is not finite"):
        patch(place, "out", statistics=place["stats"])


def test_what_cannot_work_is_refused_before_a_weight_is_read(
    place: dict[str, Path], monkeypatch: Any
) -> None:
    reads: list[str] = []
    monkeypatch.setattr(Checkpoint, "read_into", lambda self, name, *_: reads.append(name))
    there = place["stats"]
    there.write_bytes(b"old")
    cases = [
        (place["stats"], OPTIONS, OutputError, "exists already"),
        (there.parent / "none" / "s.safetensors", OPTIONS, OutputError, "make it first"),
        (place["tuned"] / "s.safetensors", OPTIONS, OutputError, "is, or lies in, the input"),
        (Path("/proc/s.safetensors"), OPTIONS, OutputError, "making the lock file is not possible"),
        (place["old_stats"], RunOptions(max_ram=10**18), UsageError, "more than the memory of"),
        (
            place["old_stats"],
            RunOptions(max_vram=1),
            UsageError,
            "max_vram of 1 bytes is too little",
        ),
        (place["old_stats"], RunOptions(max_ram=1), UsageError, "max_ram of 1 bytes is too little"),
    ]
    for out, options, error, sentence in cases:
        with pytest.raises(error, match=sentence):
            calibrate(place["tuned"], place["new"], out, options=options)
    assert reads == []
    assert there.read_bytes() == b"old"


def test_the_file_is_whole_or_not_there(place: dict[str, Path], monkeypatch: Any) -> None:
    with pytest.raises(UsageError, match=r"ends in \.safetensors"):
        calibrate(place["tuned"], place["new"], place["out"], options=OPTIONS)
    calls = 0

    def fail(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("tailor_fast.calibration.job.write_group", fail)
    before = sorted(path.name for path in place["stats"].parent.iterdir())
    with pytest.raises(KeyboardInterrupt):
        calibrate(place["tuned"], place["new"], place["stats"], options=OPTIONS)
    assert sorted(path.name for path in place["stats"].parent.iterdir()) == before
    monkeypatch.undo()
    calibrate(place["tuned"], place["new"], place["stats"], options=OPTIONS)
    with pytest.raises(OutputError, match="exists already"):
        calibrate(place["tuned"], place["new"], place["stats"], options=OPTIONS)
