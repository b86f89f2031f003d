"""Jobs on a real Ray: two workers on this machine, one of them killed in the middle of a job."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tailor_fast._core.errors import UsageError
from tailor_fast.batch import JobSpec, run_batch
from tailor_fast.batch.cluster import Cluster
from tailor_fast.patching.checkpoints import patch_checkpoint
from tests.checkpoint.files import tree
from tests.cli.running import CommandLine
from tests.patching.disk import llama_pair, write_texts

needs_ray = pytest.mark.skipif(
    find_spec("ray") is None, reason="ray is not installed: make ray installs it"
)
DEADLINE = 90.0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    llama_pair(folder, blocks=4)
    write_texts(folder / "new.jsonl", count=64)
    return folder


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster("local", cpus=1) as cluster:
        yield cluster


def job(models: Path, out: Path, **options: object) -> JobSpec:
    given = {"base": models / "base", "tuned": models / "tuned", "out": out, **options}
    return JobSpec.model_validate(given)


def holder_of_lock(folder: Path) -> int | None:
    """The process that holds a lock on a file in a staging directory of ``folder``."""
    inodes = {str(file.stat().st_ino) for file in folder.rglob("*") if file.is_file()}
    inodes |= {str(place.stat().st_ino) for place in folder.rglob("*") if place.is_dir()}
    for line in Path("/proc/locks").read_text().splitlines():
        fields = line.split()
        if fields[5].rpartition(":")[2] in inodes:
            return int(fields[4])
    return None


class Killer(threading.Thread):
    """Kills the first process that has begun to write into ``folder``."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder = folder
        self.killed: int | None = None

    def run(self) -> None:
        end = time.monotonic() + DEADLINE
        while self.killed is None and time.monotonic() < end:
            try:
                self.killed = holder_of_lock(self.folder)
            except FileNotFoundError:
                continue  # something went while it was looked at
            if self.killed is not None:
                os.kill(self.killed, signal.SIGKILL)
            time.sleep(0.001)


@needs_ray
def test_a_worker_that_is_killed_is_replaced(
    models: Path, tmp_path: Path, cluster: Cluster
) -> None:
    struck = tmp_path / "struck"
    struck.mkdir()
    jobs = [
        job(models, struck / "first", calibration=models / "new.jsonl", batch_size=2),
        # Reads what the first writes: started before that is there, it would fail.
        job(models, tmp_path / "after", base=struck / "first"),
        job(models, tmp_path / "plain"),
        job(models, tmp_path / "lost", tuned=models / "nowhere"),
    ]
    killer = Killer(struck)
    killer.start()
    states = run_batch(jobs, tmp_path / "report", cluster=cluster)
    killer.join()
    assert killer.killed not in (None, os.getpid())
    assert [state.status for state in states] == ["done", "done", "done", "failed"]
    assert "nowhere" in states[3].error
    assert states[0].loss[1] < states[0].loss_bare < 1
    assert sorted(path.name for path in struck.iterdir()) == ["first"]
    alone = tmp_path / "alone"
    patch_checkpoint(jobs[2].base, jobs[2].tuned, alone, jobs[2].recipe)
    weights = "model.safetensors"
    assert (jobs[2].out / weights).read_bytes() == (alone / weights).read_bytes()
    before = tree(tmp_path)
    again = run_batch(jobs, tmp_path / "report", cluster=cluster)
    assert again[:3] == states[:3]
    assert tree(tmp_path).keys() == before.keys()


@needs_ray
def test_one_command(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = tmp_path / "jobs.yaml"
    manifest.write_text(
        f"defaults: {{base: {models}/base, tuned: {models}/tuned}}\njobs: [{{out: a}}, {{out: b}}]"
    )
    handler = signal.getsignal(signal.SIGTERM)
    ran = CommandLine(capsys)("batch", manifest, "--ray", "local")
    assert ran.code == 0, ran.err
    assert "2 jobs, 0 done before" in ran.err
    assert signal.getsignal(signal.SIGTERM) is handler
    assert "done in" in ran.err
    assert (tmp_path / "jobs-report" / "batch.html").is_file()


@needs_ray
def test_a_cluster_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"--ray 127\.0\.0\.1:9: no cluster answers there"):
        Cluster("127.0.0.1:9")


def test_cards_are_given_out_not_named(models: Path, tmp_path: Path) -> None:
    class Idle(Cluster):
        def __init__(self) -> None:
            pass

    jobs = [job(models, tmp_path / "o", device="cuda:1")]
    with pytest.raises(UsageError, match=r"job o: device cuda:1 names a card; expected cuda"):
        run_batch(jobs, tmp_path / "report", cluster=Idle())


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UsageError, match=r"pip install 'tailor_fast\[ray\]'"):
        Cluster("local")
