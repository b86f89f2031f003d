"""Several models in one run: what fails stays alone, what is done stays done."""

from __future__ import annotations

import csv
import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tailor_fast._core.errors import InputError, OutputError
from tailor_fast.batch import JobSpec, plan_batch, read_manifest, run_batch, runner
from tailor_fast.patching.checkpoints import patch_checkpoint
from tests.checkpoint.files import tree
from tests.cli.running import CommandLine
from tests.models.processors import text_tokenizer
from tests.patching.disk import llama, moved, save_pair, write_texts

Place = tuple[Path, list[JobSpec]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One base, two models tuned from it, and samples."""
    folder = tmp_path_factory.mktemp("models")
    base = llama(blocks=2)
    save_pair(folder, base, moved(base), text_tokenizer())
    other = moved(base, scale=0.5)
    other.save_pretrained(folder / "other", max_shard_size="20KB")
    text_tokenizer().save_pretrained(folder / "other")
    write_texts(folder / "new.jsonl", count=6)
    return folder


@pytest.fixture
def place(models: Path, tmp_path: Path) -> Place:
    """A manifest: one job with samples, one that fails, one without samples."""
    manifest = tmp_path / "jobs.yaml"
    manifest.write_text(
        f"""
defaults: {{base: {models}/base, recipe: {{density: 0.2}}}}
jobs:
  - {{tuned: {models}/tuned, out: first, calibration: {models}/new.jsonl, batch_size: 4}}
  - {{name: "no <b>such</b>", tuned: {models}/nowhere, out: second}}
  - {{tuned: {models}/other, out: third, recipe: {{scope: row}}}}
"""
    )
    return manifest, read_manifest(manifest)


class Cells(HTMLParser):
    """The text of a page's table cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.tags: set[str] = set()
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, _attributes: object) -> None:
        self.tags.add(tag)
        self._inside = tag == "td" or (self._inside and tag == "div")
        if tag == "td":
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.cells[-1] += data.strip()


def test_each_job_is_what_patch_gives(place: Place, tmp_path: Path) -> None:
    _, jobs = place
    states = run_batch(jobs, tmp_path / "report")
    assert [state.status for state in states] == ["done", "failed", "done"]
    assert states[1].exit_code == 65
    assert "nowhere" in states[1].error
    assert 0 < states[0].loss[0] <= states[0].loss[1] <= states[0].loss[2]
    assert states[0].loss_bare > states[0].loss[1]
    assert states[2].loss == ()
    for job in (jobs[0], jobs[2]):
        alone = tmp_path / "alone" / job.out.name
        alone.parent.mkdir(exist_ok=True)
        patch_checkpoint(
            job.base,
            job.tuned,
            alone,
            job.recipe,
            calibration=job.calibration,
            options=job.options(overwrite=False),
        )
        shards = sorted(path.name for path in alone.glob("*.safetensors"))
        assert shards
        for name in shards:
            assert (job.out / name).read_bytes() == (alone / name).read_bytes()


def test_the_tables_say_what_happened(place: Place, tmp_path: Path) -> None:
    _, jobs = place
    run_batch(jobs, tmp_path / "report")
    with (tmp_path / "report" / "batch.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["done", "failed", "done"]
    assert float(rows[0]["loss_median"]) < float(rows[0]["loss_bare_mask"]) < 1
    assert rows[2]["loss_median"] == ""
    assert int(rows[0]["kept"]) <= 0.2 * int(rows[0]["targeted"])
    page = (tmp_path / "report" / "batch.html").read_text()
    assert "2 of 3 models patched, 1 failed" in page
    found = Cells(page)
    assert "b" not in found.tags  # names are text
    assert {"svg", "table"} <= found.tags
    assert found.cells[6].startswith("no <b>such</b>")
    assert found.cells[7].startswith("failed")
    assert "nowhere" in found.cells[7]
    state = json.loads((tmp_path / "report" / "batch.json").read_text())
    assert [job["name"] for job in state["jobs"]] == [job.label for job in jobs]


def test_what_is_done_is_not_done_again(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, jobs = place
    report = tmp_path / "report"
    first = run_batch(jobs, report)
    ran: list[str] = []
    real = runner.patch_checkpoint

    def watched(base, tuned, out, *rest, **options):
        ran.append(Path(out).name)
        return real(base, tuned, out, *rest, **options)

    monkeypatch.setattr(runner, "patch_checkpoint", watched)
    again = run_batch(jobs, report)
    assert ran == []  # the second job has nothing to run on
    assert [again[0], again[2]] == [first[0], first[2]]
    ran.clear()
    changed = [jobs[0].model_copy(update={"samples": 3}), *jobs[1:]]
    states = run_batch(changed, report)
    assert ran == ["first"]
    assert states[0].exit_code == 73  # the output of other settings stands there
    ran.clear()
    assert run_batch(changed, report, overwrite=True)[0].status == "done"
    assert ran == ["first"]
    ran.clear()
    shutil.rmtree(jobs[2].out)
    assert run_batch(changed, report)[2].status == "done"
    assert ran == ["third"]


@pytest.mark.parametrize("what", ["input", "output"])
def test_what_has_changed_is_done_again(place: Place, tmp_path: Path, what: str) -> None:
    _, jobs = place
    jobs = [jobs[2].model_copy(update={"tuned": tmp_path / "tuned"})]
    shutil.copytree(place[1][2].tuned, tmp_path / "tuned")
    done = run_batch(jobs, tmp_path / "report")
    assert done[0].status == "done"
    if what == "input":
        os.utime(tmp_path / "tuned" / "config.json", ns=(1, 1))
    else:
        (jobs[0].out / "tailor_manifest.json").write_text("{}")
    state = run_batch(jobs, tmp_path / "report")[0]
    assert "exists already" in state.error


def test_an_unexpected_error_does_not_stop_the_others(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, jobs = place
    real = runner.patch_checkpoint

    def broken(base, tuned, out, *rest, **options):
        if Path(out).name == "first":
            raise RuntimeError("two\nlines")
        return real(base, tuned, out, *rest, **options)

    monkeypatch.setattr(runner, "patch_checkpoint", broken)
    states = run_batch(jobs, tmp_path / "report")
    assert [state.status for state in states] == ["failed", "failed", "done"]
    assert (states[0].error, states[0].exit_code) == ("unexpected RuntimeError: two lines", 1)


def test_a_stop_ends_the_batch_and_keeps_what_is_done(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, jobs = place
    real = runner.patch_checkpoint

    def stopped(base, tuned, out, *rest, **options):
        if Path(out).name == "third":
            raise KeyboardInterrupt
        return real(base, tuned, out, *rest, **options)

    monkeypatch.setattr(runner, "patch_checkpoint", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_batch(jobs, tmp_path / "report")
    rows = json.loads((tmp_path / "report" / "batch.json").read_text())["jobs"]
    assert [row["status"] for row in rows] == ["done", "failed", "waiting"]
    monkeypatch.undo()
    before = tree(jobs[0].out)
    states = run_batch(jobs, tmp_path / "report")
    assert [state.status for state in states] == ["done", "failed", "done"]
    assert tree(jobs[0].out) == before


def test_jobs_may_build_on_each_other(models: Path, tmp_path: Path) -> None:
    first = JobSpec(base=models / "base", tuned=models / "tuned", out=tmp_path / "a")
    second = JobSpec(base=tmp_path / "a", tuned=models / "other", out=tmp_path / "b")
    assert [s.status for s in run_batch([first, second], tmp_path / "report")] == ["done", "done"]


def test_plans(place: Place, tmp_path: Path) -> None:
    _, jobs = place
    before = tree(tmp_path)
    plans = [found for _, found in plan_batch(jobs)]
    assert isinstance(plans[1], InputError)
    assert plans[0].kept == plans[2].kept > 0
    assert tree(tmp_path) == before


def test_places_that_cannot_be_used(place: Place, tmp_path: Path) -> None:
    _, jobs = place
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be made: Not a directory"):
        run_batch(jobs, tmp_path / "file" / "report")
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "batch.json").write_text("[]")
    with pytest.raises(InputError, match="is not the table of a batch"):
        run_batch(jobs, tmp_path / "report")
    (tmp_path / "report" / "batch.json").write_text('{"jobs": [{"name": "a"}]}')
    with pytest.raises(InputError, match=r"its keys are name\); remove it to start anew"):
        run_batch(jobs, tmp_path / "report")


def test_the_command(place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, jobs = place
    tailor_fast = CommandLine(capsys)
    planned = tailor_fast("batch", manifest, "--dry-run")
    assert planned.code == 1
    assert "2 of 3 ready" in planned.out
    assert not jobs[0].out.exists()
    ran = tailor_fast("batch", manifest)
    assert ran.code == 1
    assert "job 2 of 3" in ran.err
    assert "first" in ran.out
    report = tmp_path / "jobs-report" / "batch.html"
    assert str(report) in ran.out
    assert report.is_file()
    again = tailor_fast("batch", manifest, "-q", "--report", tmp_path / "elsewhere")
    assert (again.code, again.out, again.err) == (1, "", "")
