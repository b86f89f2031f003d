"""Each command: what it asks of the library, and what it prints."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tailor_fast import calibration
from tailor_fast._core.errors import OutputError
from tailor_fast._core.processes import ALONE
from tailor_fast._core.progress import Progress
from tailor_fast.calibration import CalibrationReport
from tailor_fast.calibration.options import RunOptions
from tailor_fast.checkpoint import shown_size
from tailor_fast.patching import checkpoints
from tailor_fast.patching.plan import PatchPlan, PlannedLayer
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.report import LinearReport, Report
from tests.cli.running import CommandLine
from tests.patching.outputs import KEPT, PATCHED, Tensors, make_output

LAYERS = ("model.layers.0.q_proj", "model.layers.1.q_proj", "model.layers.0.up_proj", "projector")


def report() -> Report:
    made = Report(
        Recipe().model_dump(), seconds={"solve": 1.25, "total": 2.5}, notes=["one", "two"]
    )
    for index, name in enumerate(LAYERS):
        losses = {"loss": 0.2, "loss_undecorated": 0.5, "loss_reverted": 1.0} if index else {}
        made.linears.append(LinearReport(name, 100, 200, 2000, **losses))
    return made


def planned() -> PatchPlan:
    layers = tuple(PlannedLayer(name, f"{name}.weight", 100, 200, 2000) for name in LAYERS)
    recipe = Recipe().model_dump()
    return PatchPlan(layers, recipe, 80_000, 8000, 1_500_000, 3_000_000, 4_000_000, ("a note",))


class Library:
    """Stands in for ``patch_checkpoint`` and ``plan_patch`` and keeps what it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.error: Exception | None = None
        # What takes the name from there must have taken the real one before.
        importlib.import_module("tailor_fast.patching.saving")
        monkeypatch.setattr(checkpoints, "patch_checkpoint", self.patch)
        monkeypatch.setattr(checkpoints, "plan_patch", self.plan)

    def patch(self, *args: Any, progress: Progress, **kwargs: Any) -> Report:
        self.calls.append(("patch", args, kwargs))
        progress.note("at work")
        progress.start(1)
        progress.group("model.layers.0.q_proj", 1, 1, 10)
        if self.error is not None:
            raise self.error
        progress.finish()
        return report()

    def plan(self, *args: Any, **kwargs: Any) -> PatchPlan:
        self.calls.append(("plan", args, kwargs))
        return planned()


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    return Library(monkeypatch)


COMMON = ("base", "tuned", "-o", "out", "--device", "cpu")


def test_patch_hands_everything_on(tailor_fast: CommandLine, library: Library) -> None:
    ran = tailor_fast(
        *("patch", *COMMON, "--sparsity", "0.8", "--scope", "row", "--retain-weight", "0.3"),
        *("--calibration", "new.jsonl", "--retain", "old.jsonl", "--layers", "20-31"),
        *("--statistics", "stats", "--batch-size", "2", "--overwrite"),
    )
    assert ran.code == 0
    (call,) = library.calls
    assert call == (
        "patch",
        (
            Path("base"),
            Path("tuned"),
            Path("out"),
            Recipe(density=0.2, scope="row", retain_weight=0.3, layers="20-31"),
        ),
        {
            "calibration": Path("new.jsonl"),
            "retain": Path("old.jsonl"),
            "statistics": Path("stats"),
            "target_old": None,
            "options": RunOptions(batch_size=2, overwrite=True),
            "processes": ALONE,
        },
    )


def test_patch_says_what_was_done_in_plain_text(tailor_fast: CommandLine, library: Library) -> None:
    ran = tailor_fast("patch", *COMMON)
    assert ran.out.splitlines() == [
        "out      out",
        "kept     10.00%, 8,000 of 80,000 weights in 4 layers",
        "loss     median over layers 0.200 of reverting to base; bare mask 0.500",
        "time     solve 1.2 s, total 2.5 s",
        "report   out/tailor_report.json",
        "picture  out/tailor_report.png",
        "notes    one",
        "         two",
    ]
    assert ran.err.splitlines()[0] == "at work"
    assert ran.err.splitlines()[1].startswith("1/1 model.layers.0.q_proj  ")
    assert "\x1b" not in ran.out + ran.err


def test_quiet_prints_errors_only(tailor_fast: CommandLine, library: Library) -> None:
    assert tailor_fast("patch", *COMMON, "-q") == (0, "", "")
    assert tailor_fast("plan", *COMMON, "-q") == (0, "", "")
    library.error = OutputError("out: exists")
    assert tailor_fast("patch", *COMMON, "-q") == (73, "", "tailor-fast: error: out: exists\n")


def test_plan_and_dry_run_are_one(tailor_fast: CommandLine, library: Library) -> None:
    plan = tailor_fast("plan", *COMMON, "--calibration", "new.jsonl")
    dry = tailor_fast("patch", *COMMON, "--calibration", "new.jsonl", "--dry-run")
    assert plan == dry
    first, second = library.calls
    assert first == second
    assert first[0] == "plan"
    assert first[2]["calibration"] == Path("new.jsonl")
    lines = plan.out.splitlines()
    assert lines[0].split() == ["layers", "number", "shape", "weights", "kept", "share"]
    assert [line.split(maxsplit=1) for line in lines[1:4]] == [
        ["model.layers.*.q_proj", "2  100 x 200   40,000  4,000  10.00%"],
        ["model.layers.*.up_proj", "1  100 x 200   20,000  2,000  10.00%"],
        ["projector", "1  100 x 200   20,000  2,000  10.00%"],
    ]
    assert "kept    at most 8,000 of 80,000 weights" in lines
    memory = f"memory  {shown_size(7_000_000)}: weights {shown_size(3_000_000)}, statistics"
    assert any(line.startswith(memory) for line in lines)
    assert f"disk    {shown_size(1_500_000)}" in lines
    assert lines[-1] == "notes   a note"


def test_calibrate_hands_everything_on_and_says_what_it_wrote(
    tailor_fast: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def calibrate(*args: Any, progress: Progress, **kwargs: Any) -> CalibrationReport:
        calls.append((args, kwargs))
        progress.note("at work")
        return CalibrationReport(3, 9, ("head",), 64, 1234, 5_000_000, 7.25, ("a note",))

    monkeypatch.setattr(calibration, "calibrate", calibrate)
    command = ("calibrate", "model", "--data", "d.jsonl", "-o", "s.safetensors", "--device", "cpu")
    ran = tailor_fast(*command, "--kind", "diag", "--tokens", "answer", "--samples", "64")
    assert ran.code == 0
    assert ran.err == "at work\n"
    assert ran.out.splitlines() == [
        f"out       s.safetensors, {shown_size(5_000_000)}",
        "layers    9 in 3 groups with one input each",
        "uncalled  head",
        "data      64 samples, 1,234 tokens",
        "time      7.2 s",
        "notes     a note",
    ]
    assert tailor_fast(*command, "--max-ram", "1GiB", "-q") == (0, "", "")
    paths = (Path("model"), Path("d.jsonl"), Path("s.safetensors"))
    first = {"kind": "diag", "options": RunOptions(samples=64, tokens="answer")}
    second = {"kind": "full", "options": RunOptions(max_ram=2**30)}
    rest = {"base": None, "processes": ALONE}
    assert calls == [(paths, first | rest), (paths, second | rest)]


def test_a_contradiction_is_found_before_anything_is_read(
    tailor_fast: CommandLine, library: Library
) -> None:
    ran = tailor_fast("patch", *COMMON, "--density", "0.1", "--sparsity", "0.9")
    assert ran.code == 2
    assert "--density and --sparsity say the same; expected one of them" in ran.err
    assert library.calls == []


def test_verify_counts_what_holds(tailor_fast: CommandLine, tmp_path: Path) -> None:
    ran = tailor_fast("verify", make_output(tmp_path))
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0].split() == [
        *("patched", "tensors", "number", "weights", "allowed", "changed", "share")
    ]
    row = lines[1].split()
    assert row[:4] == ["model.layers.*.q_proj.weight", "2", "4,096", f"{2 * KEPT:,}"]
    assert row[5] == f"{100 * int(row[4].replace(',', '')) / 4096:.2f}%"
    assert "verdict    holds" in lines
    assert "untouched  3 of 5 tensors compared bit for bit" in lines


def test_verify_says_what_is_violated_and_exits_1(tailor_fast: CommandLine, tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        tensors[PATCHED[0]].view(-1)[3] = float("nan")

    out = make_output(tmp_path, plant=plant)
    ran = tailor_fast("verify", out)
    assert ran.code == 1
    assert "verdict    1 violations" in ran.out
    assert ran.out.splitlines()[-1].endswith("1 changed words are NaN or infinite")
    quiet = tailor_fast("verify", out, "-q")
    assert quiet.code == 1
    assert quiet.err == ""
    assert quiet.out.startswith("violated: ")
    assert quiet.out.count("\n") == 1


def test_verify_quick_reads_no_weights(tailor_fast: CommandLine, tmp_path: Path) -> None:
    def plant(tensors: Tensors) -> None:
        tensors[PATCHED[0]].view(-1)[3] = float("nan")

    out = make_output(tmp_path, plant=plant)
    ran = tailor_fast("verify", out, "--quick")
    assert ran.code == 0
    assert ran.out.splitlines() == ["verdict  holds", "weights  not read"]
    with (out / "model.safetensors.index.json").open("ab") as index:
        index.write(b" ")
    ran = tailor_fast("verify", out, "--quick", "-q")
    assert ran.code == 1
    assert "model.safetensors.index.json: " in ran.out
    ran = tailor_fast("verify", out, "--quick", "--base", tmp_path)
    assert ran.code == 2
    assert "compares none with --base; expected one of them" in ran.err


def test_verify_of_no_output_is_bad_input(tailor_fast: CommandLine, tmp_path: Path) -> None:
    ran = tailor_fast("verify", tmp_path)
    assert (ran.code, ran.out) == (65, "")
    assert "holds no tailor_manifest.json" in ran.err


def test_verify_lists_twenty_violations_and_all_with_v(
    tailor_fast: CommandLine, tmp_path: Path
) -> None:
    out = make_output(tmp_path)
    manifest = json.loads((out / "tailor_manifest.json").read_text())
    manifest["output"]["files"] |= {f"gone-{n}": {"bytes": 1} for n in range(30)}
    (out / "tailor_manifest.json").write_text(json.dumps(manifest))
    ran = tailor_fast("verify", out)
    assert ran.out.count("violated: ") == 20
    assert ran.out.splitlines()[-1] == "and 10 more; -v lists all"
    assert tailor_fast("verify", out, "-v").out.count("violated: ") == 30


def test_inspect_shows_a_plain_file(tailor_fast: CommandLine, tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors")
    ran = tailor_fast("inspect", tmp_path / "x.safetensors", "-v")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert "size  58 bytes in 2 tensors" in lines
    assert "F32          1        12  48 bytes" in lines
    assert "BF16         1         5  10 bytes" in lines
    assert "made by" not in ran.out
    assert any(line.split() == ["b", "BF16", "[5]", "x.safetensors"] for line in lines)


@pytest.mark.parametrize(
    "config", ["{}", "[" * 100_000, '{"architectures": "LlamaForCausalLM"}', "no JSON"]
)
def test_inspect_names_no_model_where_its_configuration_does_not(
    config: str, tailor_fast: CommandLine, tmp_path: Path
) -> None:
    save_file({"a": torch.zeros(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    ran = tailor_fast("inspect", tmp_path)
    assert ran.code == 0
    assert "model " not in ran.out
    assert "F32 " in ran.out


def test_inspect_shows_what_was_patched(tailor_fast: CommandLine, tmp_path: Path) -> None:
    ran = tailor_fast("inspect", make_output(tmp_path))
    assert ran.code == 0
    facts = dict(line.split(maxsplit=1) for line in ran.out.splitlines() if line)
    assert facts["model"] == "LlamaForCausalLM"
    assert facts["base"] == str(tmp_path / "base")
    assert facts["kept"] == "25.00%, 1,024 of 4,096 weights in 2 tensors"
    assert facts["recipe"] == "density 0.25"
    assert facts["made"] == "by  tailor_fast 0"
    assert ran.out.count("model-0000") == 3


def test_backends_names_every_op_and_says_why_not(tailor_fast: CommandLine) -> None:
    ran = tailor_fast("backends")
    assert ran.code == 0
    rows = [line.split(maxsplit=3) for line in ran.out.splitlines()[1:]]
    assert {row[0] for row in rows} == {"gram", "select", "decorate", "codec"}
    assert ["gram", "cpu", "reference", "available"] in rows
    if not torch.cuda.is_available():
        states = {row[3] for row in rows if row[1] == "cuda"}
        assert "available" not in states
