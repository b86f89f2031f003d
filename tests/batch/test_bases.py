"""Jobs with one base read it from disk once, where there is memory for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tailor_fast.batch import JobSpec, JobState, plan_batch, run_batch, runner
from tailor_fast.calibration.options import RunOptions
from tailor_fast.checkpoint import open_checkpoint, shown_size
from tailor_fast.patching import base_in_memory
from tailor_fast.patching.checkpoints import patch_checkpoint, plan_patch
from tailor_fast.patching.recipe import Recipe
from tests.batch.test_runner import models as models
from tests.checkpoint.reading import ReadBytes
from tests.cli.running import CommandLine
from tests.patching.disk import write_texts

# peft calls transformers by names that go.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
GIB = 1 << 30


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> ReadBytes:
    return ReadBytes(monkeypatch)


def base_bytes(models: Path) -> int:
    with open_checkpoint(models / "base") as base:
        return base.total_bytes


def jobs_of(models: Path, folder: Path, **options: object) -> list[JobSpec]:
    """Three models on one base."""
    given = {"base": models / "base", "recipe": Recipe(density=0.2), **options}
    names = ("tuned", "other", "tuned")
    return [
        JobSpec.model_validate({**given, "tuned": models / name, "out": folder / f"out-{number}"})
        for number, name in enumerate(names)
    ]


def check_bytes(jobs: list[JobSpec], states: list[JobState], folder: Path) -> None:
    """Each output has the bytes of a run on its own."""
    assert [state.status for state in states] == ["done"] * len(jobs)
    for job in jobs:
        alone = folder / "alone" / job.out.name  # the name is in the card
        alone.parent.mkdir(exist_ok=True)
        options = job.options(overwrite=False)
        data = {"calibration": job.calibration, "retain": job.retain}
        patch_checkpoint(job.base, job.tuned, alone, job.recipe, options=options, **data)
        names = sorted(path.name for path in alone.glob("*.safetensors*"))
        assert names
        for name in (*names, "tailor_manifest.json"):
            assert (job.out / name).read_bytes() == (alone / name).read_bytes(), name


@pytest.mark.parametrize("data", ["none", "samples", "old samples"])
def test_the_base_is_read_once(models: Path, tmp_path: Path, read: ReadBytes, data: str) -> None:
    given: dict[str, object] = {"batch_size": 4}
    if data != "none":
        given["calibration"] = models / "new.jsonl"
    if data == "old samples":
        given["retain"] = write_texts(tmp_path / "old.jsonl", count=4, seed=9)
    jobs = jobs_of(models, tmp_path, **given)
    states = run_batch(jobs, tmp_path / "report")
    assert read.of(models / "base") == base_bytes(models)
    assert read.of(models / "other") >= base_bytes(models)
    read.clear()
    check_bytes(jobs, states, tmp_path)
    assert read.of(models / "base") >= 3 * base_bytes(models)


def test_adapters_of_one_base(models: Path, tmp_path: Path, read: ReadBytes) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import LlamaForCausalLM

    config = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(models / "base"), config)
    model.save_pretrained(tmp_path / "adapter")
    jobs = jobs_of(models, tmp_path)
    jobs = [job.model_copy(update={"tuned": tmp_path / "adapter"}) for job in jobs]
    states = run_batch(jobs, tmp_path / "report")
    assert read.of(models / "base") == base_bytes(models)
    read.clear()
    check_bytes(jobs, states, tmp_path)


def test_a_failed_job_does_not_lose_the_base(
    models: Path, tmp_path: Path, read: ReadBytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = jobs_of(models, tmp_path)
    real = runner.patch_checkpoint

    def failing(base, tuned, out, *rest, **options):
        report = real(base, tuned, out, *rest, **options)
        if Path(out).name == "out-0":
            raise RuntimeError("after all is read")
        return report

    monkeypatch.setattr(runner, "patch_checkpoint", failing)
    states = run_batch(jobs, tmp_path / "report")
    assert [state.status for state in states] == ["failed", "done", "done"]
    assert read.of(models / "base") == base_bytes(models)
    monkeypatch.setattr(runner, "patch_checkpoint", real)
    read.clear()
    states = run_batch(jobs, tmp_path / "report", overwrite=True)  # the first alone
    assert read.of(models / "base") == base_bytes(models)
    check_bytes(jobs, states, tmp_path)


def test_without_room_each_job_reads_it(
    models: Path, tmp_path: Path, read: ReadBytes, capsys: pytest.CaptureFixture[str]
) -> None:
    size = base_bytes(models)
    need = plan_patch(models / "base", models / "tuned", tmp_path / "no").ram
    narrow = str(need + 2 * size - 2)
    jobs = jobs_of(models, tmp_path, max_ram=narrow)
    jobs[2] = jobs[2].model_copy(update={"max_ram": str(need + 2 * size)})
    states = run_batch(jobs, tmp_path / "report")
    assert read.of(models / "base") == 3 * size
    sentence = f"the base is not kept in memory for other jobs: it takes {shown_size(size)}, and "
    for state, without in zip(states, (True, True, False), strict=True):
        report = json.loads((Path(state.out) / "tailor_report.json").read_text())
        assert any(note.startswith(sentence) for note in report["notes"]) == without
    check_bytes(jobs, states, tmp_path)

    manifest = tmp_path / "jobs.yaml"
    lines = [f"  - {{tuned: {models}/tuned, out: new-{n}, max_ram: {narrow}}}" for n in range(2)]
    lines += [f"  - {{tuned: {models}/tuned, out: new-{n}}}" for n in range(2, 5)]
    manifest.write_text(f"defaults: {{base: {models}/base}}\njobs:\n" + "\n".join(lines))
    planned = CommandLine(capsys)("batch", manifest, "--dry-run")
    assert planned.code == 0
    out = " ".join(planned.out.split())
    assert f"2 jobs: {sentence}" in out
    assert (
        f"3 jobs: the base is read once for 5 jobs and kept in memory ({shown_size(size)})" in out
    )
    planned = CommandLine(capsys)("batch", manifest, "--dry-run", "--ray", "local")
    assert "the base is" not in planned.out


def test_what_was_kept_is_given_back_to_a_job_that_needs_the_room(
    models: Path, tmp_path: Path, read: ReadBytes
) -> None:
    size = base_bytes(models)
    need = plan_patch(models / "base", models / "tuned", tmp_path / "no").ram
    jobs = jobs_of(models, tmp_path)
    jobs[1] = jobs[1].model_copy(update={"max_ram": str(need)})
    run_batch(jobs, tmp_path / "report")
    assert read.of(models / "base") == 3 * size


def test_plans_count_the_base_in(models: Path, tmp_path: Path) -> None:
    jobs = jobs_of(models, tmp_path)
    alone = plan_patch(jobs[0].base, jobs[0].tuned, jobs[0].out, jobs[0].recipe)
    shared = [plan for _, plan in plan_batch(jobs)]
    assert [plan.ram - alone.ram for plan in shared] == [base_bytes(models)] * 3
    apart = [plan for _, plan in plan_batch(jobs, cluster=True)]
    assert [plan.ram for plan in apart] == [alone.ram] * 3
    (single,) = (plan for _, plan in plan_batch(jobs[:1]))
    assert single == alone


def test_half_of_what_is_left(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_patch(models / "base", models / "tuned", tmp_path / "out")
    plan = replace(plan, ram_weights=GIB, ram_solve=0)
    monkeypatch.setattr(base_in_memory, "memory", lambda: (plan.ram_peak + 4 * GIB, 64 * GIB))
    assert base_in_memory.room_for_base(plan, RunOptions()) == 2 * GIB
    assert base_in_memory.room_for_base(plan, RunOptions(), held=2 * GIB) == 3 * GIB
    assert base_in_memory.room_for_base(plan, RunOptions(max_ram=3 * GIB)) == GIB
    monkeypatch.setattr(base_in_memory, "memory", lambda: (0, 64 * GIB))
    assert base_in_memory.room_for_base(plan, RunOptions()) == 0
