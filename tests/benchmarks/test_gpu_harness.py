"""The GPU benchmarks: dry runs from start to end, failures that do not stop a part, floors, README.

A dry run takes the same way as a run on a card, at tiny sizes, on the CPU; kernels are interpreted.
"""

import csv
import importlib.util
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import __main__ as program
from benchmarks.gpu import check, e2e, floors, holding, kernels, overlap, plan, readme
from benchmarks.gpu import table as table_module
from benchmarks.gpu.clock import Clock
from benchmarks.gpu.floors import Ceilings, Cost
from benchmarks.gpu.plan import MODEL_7B, MODEL_DRY, Bar
from benchmarks.gpu.run import Run
from benchmarks.gpu.table import COLUMNS, Row, Table, slug
from tailor_fast._core.transfer import Outbox, panels
from tests.source_tree import ROOT

FACTS = ("commit", "date", "python", "torch", "triton", "cuda", "driver", "card")
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file)
        assert set(table.fieldnames) >= {"run", *FACTS, "sm_clock", "memory_clock", *COLUMNS}
        return list(table)


_ALONE = """
import socket, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def refuse(*_):
    raise OSError("no network")

sys.meta_path.insert(0, Absent())
socket.socket.connect = socket.getaddrinfo = refuse
"""
ABSENT = {"greenlet", "hypothesis", "matplotlib", "pybind11", "pydantic", "pytest", "rich"}
ABSENT |= {"safetensors", "tokenizers", "transformers", "typer"}


def alone(folder: Path) -> dict[str, str]:
    """The environment of a python that has torch and triton alone, and no network."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(f"ABSENT = {ABSENT!r}\n{_ALONE}")
    probe = "import socket, triton; socket.create_connection(('127.0.0.1', 9))"
    for what, said in (("import pydantic", "No module named"), (probe, "no network")):
        environment = os.environ | {"PYTHONPATH": str(folder)}
        run = [sys.executable, "-c", what]
        done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
        assert said in done.stderr
    return {"PYTHONPATH": str(folder)}


def dry(part: str, folder: Path, *options: str, **environment: str) -> list[dict[str, str]]:
    """Run a part in a process of its own, as ``gpu.sh`` does, and return its rows."""
    done = subprocess.run(
        ["benchmarks/gpu.sh", part, "--dry-run", "--out", str(folder), *options],
        cwd=ROOT,
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = read(folder / f"{part}-dry.csv")
    assert {row["run"] for row in rows} == {"dry"}
    assert not [row for row in rows if row["error"]]
    return rows


def works(rows: list[dict[str, str]], provider: str = "triton") -> set[str]:
    return {row["work"] for row in rows if row["provider"] == provider}


@needs_triton
def test_check(tmp_path: Path) -> None:
    rows = dry("check", tmp_path)
    held = [row for row in rows if row["provider"] == "triton"]
    assert len(held) == 3 * len(check.HELD)  # each dtype of each function
    assert all(row["note"].startswith("held") for row in held)
    whole = [row for row in rows if row["provider"] == "patch_checkpoint"]
    assert [row["note"] for row in whole] == ["1 files, byte for byte"]
    tools = {row["work"]: row["note"] for row in rows if not row["provider"]}
    assert "not run" in tools["compute-sanitizer"] or torch.cuda.is_available()
    assert "collected" in tools["pytest -m gpu"] or torch.cuda.is_available()


@needs_triton
def test_kernels(tmp_path: Path) -> None:
    rows = dry("kernels", tmp_path, **alone(tmp_path / "alone"))
    planned = plan.kernel_entries(MODEL_DRY, plan.TOKENS_DRY)
    planned += [plan.streamed(MODEL_DRY, MODEL_DRY.layers, kind) for kind in ("none", "row_block")]
    assert works(rows) == {entry.work for entry in planned}
    assert {"copy", "matmul"} <= works(rows, "torch")
    barred = {row["work"]: row["bar"] for row in rows if row["bar"]}
    assert barred == {e.work: ", ".join(map(str, e.bars)) for e in planned if e.bars}
    for row in rows:
        floor, seconds = float(row["floor_seconds"]), float(row["seconds"])
        assert float(row["share"]) == pytest.approx(floor / seconds, rel=1e-3)
    gram = {row["provider"]: row for row in rows if row["work"] == "gram"}
    expected = float(gram["torch.addmm"]["seconds"]) / float(gram["triton"]["seconds"])
    assert float(gram["triton"]["ratio"]) == pytest.approx(expected, rel=1e-3)


@needs_triton
def test_block(tmp_path: Path) -> None:
    rows = dry("block", tmp_path, **alone(tmp_path / "alone"))
    assert works(rows) >= {"exact", "obs", "obs sweep", "official", "select", "exact stage"}
    authors = [row for row in rows if row["work"] == "authors"]
    assert [row["shape"] for row in authors[:-1]] == [part.name for part in MODEL_DRY.linears]
    total = sum(float(row["seconds"]) for row in authors[:-1])
    assert float(authors[-1]["seconds"]) == pytest.approx(total, rel=1e-3)
    (exact,) = [row for row in rows if row["work"] == "exact"]
    assert float(exact["ratio"]) == pytest.approx(total / float(exact["seconds"]), rel=1e-3)
    assert exact["bar"] == "seconds <= 0.2, ratio >= 20"


def test_end_to_end(tmp_path: Path) -> None:
    rows = dry("e2e", tmp_path, "--work", str(tmp_path))
    jobs = [row for row in rows if row["work"].startswith("patch ")]
    assert [row["work"] for row in jobs] == ["patch none", "patch asymmetric", "patch none"]
    sizes = [part.rows * part.cols for part in MODEL_DRY.linears]
    density = sum(size // 10 for size in sizes) / sum(sizes)
    assert all(f"density {density:.4f}" in row["note"] for row in jobs)
    assert all("authors extrapolated from one measured block" in row["note"] for row in jobs)
    blocks = [row["note"] for row in rows if row["work"] == "block"]
    assert blocks == [f"block {i}" for i in range(MODEL_DRY.layers)] * len(jobs)
    assert "stage solve" in works(rows, "patch_checkpoint")
    assert [path.name for path in tmp_path.iterdir()] == ["e2e-dry.csv"]  # checkpoints are gone


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A part under way, on the plain torch backend."""
    device = torch.device("cpu")
    with Table(tmp_path / "part.csv", dry=True, device=device) as table:
        clock = Clock(device, dry=True)
        yield Run(table, device, "reference", True, 1, time.monotonic() + 60, clock)


def test_a_failing_case_is_a_row_and_the_next_one_runs(run: Run) -> None:
    def fails():
        yield Row("first", note="was measured")
        raise ValueError("two\n  lines")

    run.attempt(Row("work", "[1]", "float32", "ours"), fails)
    # On disk before the next case begins.
    assert [row["error"] for row in read(run.table.path)] == ["", "ValueError: two lines"]
    run.attempt(Row("next"), lambda: [Row("next", seconds=0.5)])
    rows = read(run.table.path)
    assert [row["work"] for row in rows] == ["first", "work", "next"]
    assert (rows[2]["seconds"], run.table.errors) == ("0.5", 1)


def test_no_case_begins_when_the_time_is_used_up(run: Run) -> None:
    run.deadline = time.monotonic()
    run.attempt(Row("late"), lambda: pytest.fail("ran"))
    assert read(run.table.path)[0]["error"] == "not run: the part's time was used up"


def test_a_wrong_kernel_is_not_timed(run: Run, monkeypatch) -> None:
    def leave(gram: torch.Tensor, x: torch.Tensor, **_: object) -> torch.Tensor:
        return gram

    for module in (holding, kernels):
        monkeypatch.setattr(module, "accumulate_gram_", leave)
    (entry, *_) = [e for e in plan.kernel_entries(MODEL_DRY, 16) if e.work == "gram"]
    with pytest.raises(AssertionError):
        list(kernels.measure(run, entry, kernels.make_gram))
    with pytest.raises(AssertionError, match="symmetric"):
        holding.hold_gram(run, (7, 3), torch.float32, 0)


def test_every_wrong_result_is_seen(run: Run, monkeypatch) -> None:
    """Each check fails when the op that it holds gives another result."""

    def off_by_one(name: str):
        right = getattr(holding, name)

        def wrong(*args: object, backend: str = "auto", **options: object) -> object:
            found = right(*args, backend=backend, **options)
            if backend != "reference":
                return found
            if isinstance(found, (tuple, list)):  # a patch and its facts; masks
                change_(found[0])
            else:
                change_(found)
            return found

        return wrong

    def change_(tensor: torch.Tensor) -> None:
        bits = tensor.dtype in (torch.bool, torch.uint8)
        last = tensor.view(-1)[-1:]
        last.copy_(last ^ True if bits else last + 1)

    names = {
        "accumulate_gram_": "accumulate_gram_",
        "accumulate_cross_gram_": "accumulate_cross_gram_",
        "accumulate_gram_diag_": "accumulate_gram_diag_",
        "select_patch": "select_patch",
        "select_patches": "select_patches",
        "topk_mask": "topk_mask",
        "decorate_exact": "decorate_exact",
        "decorate_obs": "decorate_obs",
        "decorate_official": "decorate_official",
        "encode and apply": "encode_patch",
    }
    for held, name in names.items():
        with monkeypatch.context() as patched:
            patched.setattr(holding, name, off_by_one(name))
            hold, shapes, dtypes = check.HELD[held]
            with pytest.raises((AssertionError, ValueError)):
                hold(run, shapes[3], dtypes[1], 1)


def test_copies_that_come_too_early_are_seen(run: Run, monkeypatch) -> None:
    """Each check of an overlap fails where the words are not those that were there."""

    def early_panels(matrix: torch.Tensor, *given: object) -> Iterator[tuple[slice, torch.Tensor]]:
        for place, piece in panels(matrix, *given):
            yield place, torch.zeros_like(piece)

    class EarlyOutbox(Outbox):
        def send(self, tensor: torch.Tensor) -> tuple[torch.Tensor, object]:
            return torch.zeros_like(tensor), super().send(tensor)[1]

    monkeypatch.setattr(overlap, "panels", early_panels)
    monkeypatch.setattr(overlap, "to_device", lambda tensor, _device: torch.zeros_like(tensor))
    monkeypatch.setattr(overlap, "Outbox", EarlyOutbox)
    patched = overlap._patched
    monkeypatch.setattr(overlap, "_patched", lambda *given: patched(*given) + (given[-1] != "auto"))
    for name in ("panels", "arrivals", "outbox", "own streams"):
        hold, shapes, dtypes = check.HELD[name]
        with pytest.raises(AssertionError, match="not the words"):
            hold(run, shapes[3], dtypes[1], 1)


def test_tools_beside_the_cases(run: Run, tmp_path: Path) -> None:
    """Passed, failed, stopped, and unable to work: each is told apart from the others."""
    ours = tmp_path / "child" / "check.csv"
    begins = f"mkdir -p {ours.parent} && touch {ours}"
    says = {
        "passed": ("echo first; echo '== 3 passed =='", None, "note", "3 passed"),
        "failed": ("echo '1 failed'; exit 86", None, "error", "exit status 86: 1 failed"),
        "stopped": ("echo begun; exec sleep 60", None, "error", "stopped, no time left: begun"),
        "cannot": ("echo no device; exit 1", ours, "note", "not run, it does not work on this"),
        "faults": (f"{begins}; echo hazard; exit 86", ours, "error", "exit status 86: hazard"),
    }
    for name, (script, result, column, expected) in says.items():
        tool = check.Tool.start(Row(name), ["sh", "-c", script], result)
        run.deadline = time.monotonic() + (0 if name == "stopped" else 30)
        tool.finish(run)
        row = read(run.table.path)[-1]
        assert row[column].startswith(expected)
        assert not row["note" if column == "error" else "error"]
    assert not ours.parent.exists()


def test_without_a_card(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert program.main(["kernels", "--out", str(tmp_path)]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_said_in_one_sentence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(e2e, "NEEDED", ("json", "no_such_package", "nor_this"))
    assert program.main(["e2e", "--dry-run", "--out", str(tmp_path)]) == 1
    (row,) = read(tmp_path / "e2e-dry.csv")
    expected = "patch_checkpoint needs no_such_package and nor_this, not installed here"
    assert row["error"] == expected


def test_a_driver_that_does_not_answer_is_asked_once(tmp_path: Path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(table_module, "_query", lambda names: asked.append(names) or ["", ""])
    with Table(tmp_path / "part.csv", dry=True, device=torch.device("cpu")) as table:
        monkeypatch.setattr(table, "_query", True)
        for _ in range(3):
            table.add(Row("work", seconds=1.0))
    assert asked == ["clocks.sm,clocks.mem"]


def test_pictures_of_the_tables(tmp_path: Path, monkeypatch) -> None:
    picture = pytest.importorskip("benchmarks.gpu.picture")
    assert picture.main(["--results", str(tmp_path)]) == 1
    facts = table_module.facts(torch.device("cpu"))
    monkeypatch.setattr(table_module, "facts", lambda _: facts | {"card": "NVIDIA H200"})
    rows = {
        "kernels": [
            Row("select fused", "7B", "bfloat16", "triton", 0.02, share=0.61, bar="share >= 0.6"),
            Row("gram", "[64, 8]", "bfloat16", "torch.addmm", 0.5, share=0.9, ratio=1.0),
        ],
        "block": [
            Row("exact", "7B block", "", "triton", 0.1, ratio=9, bar="seconds <= 0.2, ratio >= 2"),
            Row("authors", "7B block", "", "authors, eager", 9.0, ratio=1.0),
            Row("obs", "7B block", "", "triton", error="lost"),
        ],
    }
    for part, given in rows.items():
        path = tmp_path / slug("NVIDIA H200") / f"{part}.csv"
        with Table(path, dry=False, device=torch.device("cpu")) as table:
            for row in given:
                table.add(row)
    written = picture.draw(tmp_path)
    assert [path.name for path in written] == ["kernels.svg", "block.svg"]
    kernels_text, block_text = (path.read_text() for path in written)
    assert "select fused 7B" in kernels_text
    assert "torch.addmm" not in kernels_text  # baselines have no bars of shares
    assert "authors 7B block" in block_text
    assert "obs 7B block" not in block_text
    before = [path.read_bytes() for path in written]
    assert [path.read_bytes() for path in picture.draw(tmp_path)] == before


def test_floors() -> None:
    card = Ceilings("card", copy=1e12, bf16=1e14, tf32=5e13, fp32=1e13)
    assert card.floor(Cost(10**12, 10**13, "bf16")) == 1.0
    assert card.floor(Cost(10**9, 10**13, "fp32")) == 1.0
    assert floors.select(10, 2) == Cost(50)
    # Of a product of all pairs the triangle with its diagonal is a little more than half.
    assert floors.gram(7, 3, 2).flops == 2 * 7 * 6
    assert floors.cross_gram(7, 3, 5, 4) == Cost(7 * 8 * 4 + 2 * 4 * 15, 2 * 7 * 15, "tf32")
    assert floors.decorate_exact(2, 3, 4).flops == 5 * 2 * 2 * 9
    every = floors.apply(64, 2, 64).bytes
    assert every == 64 // 8 + 64 * 2 + 4 + 2 * 128  # all kept: the whole target there and back
    assert floors.apply(64, 2, 0).bytes == 64 // 8 + 4
    with pytest.raises(ValueError, match="cannot be added"):
        Cost(1, 1, "bf16") + Cost(1, 1, "fp32")


def test_bars() -> None:
    assert Bar("ratio", 20).met(20.0)
    assert not Bar("ratio", 20).met(19.9)
    assert Bar("seconds", 0.2).met(0.2)
    assert not Bar("bytes", 8).met(9)
    assert not any(Bar(kind, 1.0).met(math.nan) for kind in ("share", "ratio", "seconds"))


def test_shapes_are_those_of_the_models() -> None:
    assert MODEL_7B.weights(32) == 6_738_415_616 - (2 * 32 + 1) * 4096  # LLaMA-7B less its norms
    assert len(MODEL_7B.linears) == 7
    assert MODEL_7B.inputs == {"attention": 4096, "heads": 4096, "mlp": 4096, "gated": 11008}


def test_the_readme_is_current() -> None:
    assert readme.README.read_text(encoding="utf-8") == readme.render()


def test_the_readme_takes_times_from_the_tables(tmp_path: Path, monkeypatch) -> None:
    facts = table_module.facts(torch.device("cpu"))
    monkeypatch.setattr(table_module, "facts", lambda _: facts | {"card": "NVIDIA H200"})
    path = tmp_path / slug("NVIDIA H200") / "kernels.csv"
    entry = plan.kernel_entries(MODEL_7B, plan.TOKENS)[0]
    with Table(path, dry=False, device=torch.device("cpu")) as table:
        for provider, seconds in (("torch.sort", 5e-3), ("triton", 1e-4)):
            row = Row(entry.work, entry.shape, entry.dtype, provider, seconds)
            table.add(replace(row, share=0.5, ratio=2.0))
    assert path.parent.name == "nvidia-h200"
    assert "100 us, 50% of floor, 2x" not in readme.render()
    assert "| 100 us, 50% of floor, 2x |" in readme.render(tmp_path)
