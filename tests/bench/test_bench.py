"""``tailor-fast bench``: every backend has a row, and a wrong one has no time."""

import csv
import dataclasses
import time
from pathlib import Path

import pytest
import torch

from tailor_fast import bench, ops
from tailor_fast._core.errors import UsageError
from tailor_fast.bench import cases, measure, runner
from tests.cli.running import CommandLine

CPU = torch.device("cpu")
CEILINGS = bench.Ceilings(bytes_per_second=1e10, flops_per_second=1e11)


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "SIZES", {"tiny": (24, 32, 40)})
    monkeypatch.setattr(runner, "SIZES", cases.SIZES)
    monkeypatch.setattr(measure, "_COPY_BYTES", 2**16)
    monkeypatch.setattr(measure, "_MATMUL", {"cpu": (32, torch.float32)})


def run(**options: object) -> list[bench.Row]:
    return list(bench.run_bench(CPU, CEILINGS, size="tiny", rounds=1, **options))


@pytest.mark.parametrize("op", ops.OPS)
def test_every_backend_of_every_op_is_gated_and_timed(op: str) -> None:
    rows = run(ops=[op])
    states = ops.backends()[op]["cpu"]
    runnable = {name for name, why in states.items() if why is None} - {"triton"}
    for work in {row.work for row in rows}:
        assert {row.backend for row in rows if row.work == work} == runnable
    for row in rows:
        assert row.problem is None, row
        assert row.seconds is not None
        assert row.seconds > 0
        assert row.floor > 0
        assert row.backend != "reference" or row.speedup == 1


@pytest.mark.parametrize("op", ops.OPS)
def test_the_gate_sees_a_wrong_answer(op: str) -> None:
    """Each case's gate, on the reference's answer with a tenth of it changed."""
    for case in cases.make_cases(op, "tiny", CPU):
        expected = case.call("reference")
        assert case.gate(expected, expected) is None
        assert case.gate(spoiled(expected), expected), case.work


def spoiled(answer: object) -> object:
    if not isinstance(answer, torch.Tensor):
        return answer._replace(loss=answer.loss * 1.1)
    changed = answer.clone()
    tenth = changed.view(-1)[: 1 + changed.numel() // 10]
    tenth.copy_(~tenth if tenth.dtype == torch.bool else tenth + tenth.abs().max() + 1)
    return changed


def test_a_wrong_backend_has_a_reason_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(got: object, expected: object) -> str:
        return "wrong on purpose"

    makers = {
        "codec": lambda *sizes: (
            dataclasses.replace(case, gate=wrong) for case in cases._codec(*sizes)
        )
    }
    monkeypatch.setattr(cases, "_MAKERS", makers)
    for row in run(ops=["codec"]):
        sound = row.backend == "reference"
        assert (row.seconds is not None) == sound
        assert row.problem == (None if sound else "wrong on purpose")


def test_the_floor_is_the_larger_of_moving_and_computing() -> None:
    assert CEILINGS.floor(moved=10**10, flops=10) == 1
    assert CEILINGS.floor(moved=10, flops=2 * 10**11) == 2


def test_calls_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) or time.sleep(0.001) for name in "ab"}
    seconds = measure.interleaved(calls, CPU, 3)
    assert order == ["a", "b"] * 3
    assert all(0.001 <= value < 1 for value in seconds.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ops": ["gran"]}, "op must be one of gram, select, decorate, codec; got 'gran'"),
        ({"size": "huge"}, "size must be one of tiny; got 'huge'"),
    ],
)
def test_unknown_names(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        list(bench.run_bench(CPU, CEILINGS, **{"size": "tiny", **options}))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tailor_fast = CommandLine(capsys)
    table = tmp_path / "bench.csv"
    common = ("bench", "--size", "tiny", "--device", "cpu", "--rounds", "1")
    ran = tailor_fast(*common, "--op", "codec", "--csv", table)
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.startswith("copy ")
    assert "apply twice" in ran.out
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["op"] for row in rows} == {"codec"}
    assert all(float(row["seconds"]) > 0 for row in rows)
    nowhere = tailor_fast(*common, "--op", "codec", "--csv", tmp_path / "no" / "bench.csv")
    assert nowhere.code == 73
    assert "cannot be written: No such file or directory" in nowhere.err
    assert tailor_fast(*common, "--op", "gran").code == 2


def test_the_command_fails_with_a_wrong_backend(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = bench.Row("codec", "apply", "2x2", "native", None, 1e-3, None, "not the same bits")
    monkeypatch.setattr(bench, "run_bench", lambda *_, **__: iter([row]))
    ran = CommandLine(capsys)("bench", "--device", "cpu")
    assert ran.code == 1
    assert "wrong: codec apply by native: not the same bits" in ran.out
