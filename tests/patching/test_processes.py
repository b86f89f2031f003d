"""Several processes over gloo give what one gives, and fail together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tailor_fast import join_processes
from tailor_fast._core.errors import UsageError
from tailor_fast._core.processes import Processes
from tailor_fast.checkpoint import REPORT_NAME
from tailor_fast.patchfile import diff_checkpoints
from tailor_fast.patching.checkpoints import patch_checkpoint
from tests.patching import disk
from tests.patching.ranks import FAILURES, RECIPE, RECIPES, WAYS, on_disk, tailored
from tests.patching.test_resuming import lasting
from tests.source_tree import ROOT

COUNTS = (2, 3)
# fp32 sums in another order, carried through three blocks; weights here are of size 0.3
CLOSE = {"rtol": 1e-3, "atol": 1e-5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What groups of 2 and 3 processes, and one process, made of the same cases."""
    path = tmp_path_factory.mktemp("processes")
    disk.llama_pair(path, blocks=2)
    disk.write_texts(path / "new.jsonl", 7)
    disk.write_texts(path / "old.jsonl", 2, seed=9)  # one batch: others have none
    # The last sample is the last process's, so that it alone finds it too long.
    long = json.dumps({"prompt": "a " * 3000, "answer": "b"})
    (path / "long.jsonl").write_text((path / "new.jsonl").read_text() + long)
    (path / "recipe.yaml").write_text(json.dumps(RECIPE))
    done = subprocess.run(
        [sys.executable, "-m", "tests.patching.ranks", str(path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads((path / "codes.json").read_text())
    assert [codes[str(count)] for count in COUNTS] == [[0, 9], [0, 0, 9]], done.stderr
    (path / "1").mkdir()
    on_disk(path, Processes())
    return path


def tensors(path: Path) -> dict[str, torch.Tensor]:
    files = sorted(path.glob("*.safetensors"))
    assert files
    return {name: value for file in files for name, value in load_file(file).items()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, **CLOSE)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("count", COUNTS)
def test_the_model_is_that_of_one_process(folder: Path, name: str, count: int) -> None:
    alone = tailored(name, slice(None))
    expected = alone.model.state_dict()
    reports = []
    states = []
    for rank in range(count):
        state = load_file(folder / f"{count}" / f"{name} {rank}.safetensors")
        assert_same(state, expected)
        states.append(state)
        assert all(torch.equal(state[key], states[0][key]) for key in state), "ranks differ"
        reports.append(json.loads((folder / f"{count}" / f"{name} {rank}.json").read_text()))
    for report in reports:
        assert report["processes"] == count
        for row, other in zip(report["linears"], alone.report.to_dict()["linears"], strict=True):
            for key in ("name", "kept", "tokens", "group", "note"):
                assert row[key] == json.loads(json.dumps(other[key])), key
            for key in ("loss", "loss_undecorated", "loss_reverted", "damping", "retain_scale"):
                if other[key] is None:
                    assert row[key] is None, key
                else:
                    assert row[key] == pytest.approx(other[key], rel=1e-3, abs=1e-9), key


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("out", ["out", "again"])
def test_the_checkpoint_is_that_of_one_process(folder: Path, count: int, out: str) -> None:
    assert_same(tensors(folder / f"{count}" / out), tensors(folder / "1" / out))
    report = json.loads((folder / f"{count}" / out / "tailor_report.json").read_text())
    assert report["processes"] == count
    assert report["seconds"]["exchange"] > 0


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("kind", ["full", "diag"])
def test_the_statistics_are_those_of_one_process(folder: Path, count: int, kind: str) -> None:
    ours, alone = (load_file(folder / f"{n}" / f"{kind}.safetensors") for n in (count, 1))
    assert_same(ours, alone)
    assert all(torch.equal(ours[name], alone[name]) for name in ours if name.endswith("tokens"))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("way", WAYS)
def test_sums_and_copies_by_memory_and_by_network(folder: Path, way: str, count: int) -> None:
    for rank in range(count):
        found = json.loads((folder / f"{count}" / f"exchanges {rank}.json").read_text())[way]
        assert found["sums"]
        assert found["copies"]
        assert found["shared"] == (way == "memory")
        if way == "memory":
            assert found["same order"]


ENDS = {
    "input": ("InputError", 1, 65, "the file of process 1 is bad"),
    "storage": ("StorageError", 0, 74, "the disk of process 0 is full"),
    "unexpected": ("ZeroDivisionError", 1, 1, "no such number"),
    "all fail": ("InputError", 0, 65, "reason 0"),
    "different recipes": ("UsageError", 0, 2, "recipe and kinds of data of process 1 are not"),
    "no batches": ("UsageError", 0, 2, "batches is empty"),
}


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", FAILURES)
def test_all_end_with_the_error_of_the_first(folder: Path, name: str, count: int) -> None:
    last = count - 1
    where = (
        "InputError",
        last,
        65,
        "layers.0.gate: the input in patched/new batch 3 is not finite",
    )
    kind, culprit, code, text = ENDS.get(name, where)
    for rank in range(count):
        end = json.loads((folder / f"{count}" / f"ends {rank}.json").read_text())[name]
        if rank == culprit:
            assert (end["kind"], text in end["text"]) == (kind, True), end
            assert end["code"] in (code, None)
        else:
            assert (end["kind"], end["code"]) == ("PeerError", code)
            assert end["text"].startswith(f"process {culprit} of {count}: ")
            assert text in end["text"]


@pytest.mark.parametrize("count", COUNTS)
def test_a_process_that_is_killed_ends_the_others(folder: Path, count: int) -> None:
    for rank in range(count - 1):
        end = json.loads((folder / f"{count}" / f"ends {rank}.json").read_text())["killed"]
        assert (end["kind"], end["code"]) == ("LostPeerError", 1)
        assert f"process {rank} of {count} lost the others" in end["text"]


def commanded(folder: Path, case: str) -> tuple[list[int], list[str]]:
    """Exit codes and stderr of the command line in two processes."""
    codes = json.loads((folder / "codes.json").read_text())[case]
    return codes, [(folder / f"{case} {rank}.stderr").read_text() for rank in range(2)]


def test_the_command_line_in_two_processes(folder: Path) -> None:
    codes, texts = commanded(folder, "patch")
    assert codes == [0, 0]
    assert texts[1] == ""
    assert_same(tensors(folder / "by command"), tensors(folder / "1" / "out"))
    assert not list(folder.glob(".*"))  # nothing is left beside it


@pytest.mark.parametrize(
    ("case", "code", "rank", "sentence"),
    [
        ("too long", 65, 1, "long.jsonl line 8: has 3003 tokens"),
        ("no data", 2, 0, "without data there is nothing to share; got 2 processes; expected one"),
        ("one card", 2, 0, "--device cuda:0 is"),
        ("unknown option", 2, 0, "No such option"),
        ("plan", 2, 0, "plan is the work of one process; got 2; start it without torchrun"),
    ],
)
def test_one_process_says_why_all_end(
    folder: Path, case: str, code: int, rank: int, sentence: str
) -> None:
    codes, texts = commanded(folder, case)
    assert codes == [code, code]
    assert sentence in texts[rank]
    assert "".join(texts).count("error:") == 1
    assert not (folder / "failed").exists()


def test_a_run_that_was_killed_and_stopped_ends_with_the_bytes_of_one(folder: Path) -> None:
    codes = json.loads((folder / "codes.json").read_text())
    names = ("killed", "alone", "stopped", "resumed")
    assert [codes[name] for name in names] == [[-9, -9], [0], [0, 0], [0, 0]]
    assert "processes was 2, is 1" in (folder / "alone.txt").read_text()
    ends = [json.loads((folder / f"stopped {rank}.json").read_text()) for rank in range(2)]
    assert [(end["kind"], end["code"]) for end in ends] == [("StoppedError", 75), ("PeerError", 75)]
    assert "tensors of" in ends[0]["text"]
    done = [json.loads((folder / f"resumed {rank}.json").read_text()) for rank in range(2)]
    assert done == [{"kind": None}] * 2
    assert lasting(folder / "broken" / "out") == lasting(folder / "2" / "out")
    notes = json.loads((folder / "broken" / "out" / REPORT_NAME).read_text())["notes"]
    assert any("were finished by an earlier run" in note for note in notes)
    assert not list((folder / "broken").glob(".*"))


def test_one_of_two_processes_saves_the_patch(folder: Path, tmp_path: Path) -> None:
    for case in ("saved", "saved alone"):
        assert commanded(folder, case)[0] == [0, 0]
    diff_checkpoints(folder / "base", folder / "saved", tmp_path / "p.tailor.safetensors")
    expected = (tmp_path / "p.tailor.safetensors").read_bytes()
    for name in ("beside", "alone"):
        assert (folder / f"{name}.tailor.safetensors").read_bytes() == expected


def test_rows_are_shared_out_whole() -> None:
    for count in (1, 2, 3, 7):
        for size in (0, 1, 2, 5, 100):
            parts = [Processes(rank, count).share(size) for rank in range(count)]
            assert [i for part in parts for i in range(size)[part]] == list(range(size))
            sizes = [part.stop - part.start for part in parts]
            assert max(sizes) - min(sizes) <= 1


def test_a_signal_in_an_exchange_waits_for_its_end() -> None:
    processes = Processes(0, 2)
    after = []

    def interrupted() -> None:
        with processes.exchange():
            signal.raise_signal(signal.SIGINT)
            after.append(True)

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert after
    assert processes.seconds > 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_exchange_outside_the_main_thread_leaves_signals_alone() -> None:
    found = []

    def work() -> None:
        with Processes(0, 2).exchange():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]


def test_join_processes_needs_a_group() -> None:
    with (
        pytest.raises(UsageError, match="there is no process group; expected one that"),
        join_processes(),
    ):
        pass


def test_more_processes_without_data_are_refused_from_python(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="without data there is nothing to share; got 2"):
        patch_checkpoint(tmp_path, tmp_path, tmp_path / "out", processes=Processes(0, 2))
