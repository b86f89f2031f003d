"""``calibrate`` within a limit: what it takes on a device, counted, and what is refused."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from tailor_fast._core.errors import UsageError
from tailor_fast.calibration import CalibrationReport, RunOptions, calibrate
from tailor_fast.calibration.collect import Collector
from tailor_fast.calibration.device import PassPlanner, Room, input_columns
from tailor_fast.calibration.token_buffer import TOKENS_AT_ONCE
from tailor_fast.calibration.tracing import trace_lanes
from tests.backends import needs_native
from tests.models.processors import text_tokenizer
from tests.patching.disk import (
    llama,
    llama_pair,
    llava_pair,
    moved,
    save_pair,
    write_scenes,
    write_texts,
)
from tests.simulated import least, simulated

GIB = 1 << 30


def write_long(path: Path, *, padded: bool) -> Path:
    """Texts whose passes take more than the sums."""
    with path.open("w") as file:
        for sample in range(4):
            words = 600 + padded * sample
            prompt = " ".join("abcd"[word % 4] for word in range(words))
            file.write(json.dumps({"prompt": prompt, "answer": "a b"}) + "\n")
    return path


def model_and_data(folder: Path, kind: str) -> tuple[Path, Path]:
    if kind == "llava":
        return llava_pair(folder)[1], write_scenes(folder / "new.jsonl", 8)
    base = llama(blocks=2, width=256)
    _, tuned = save_pair(folder, base, moved(base), text_tokenizer(), shard="50MB")
    if kind == "short":
        return tuned, write_texts(folder / "new.jsonl", 8)
    return tuned, write_long(folder / "new.jsonl", padded=kind == "padded")


@needs_native
@pytest.mark.parametrize(
    ("data", "kind"),
    [("short", "full"), ("padded", "full"), ("long", "diag"), ("llava", "full")],
)
def test_a_walk_takes_what_is_planned(
    data: str, kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = model_and_data(tmp_path, data)

    def run(limit: int) -> CalibrationReport:
        options = RunOptions(max_vram=limit, batch_size=2, overwrite=True)
        return calibrate(*given, tmp_path / "s.safetensors", kind=kind, options=options)

    plain = run(GIB)
    whole = (tmp_path / "s.safetensors").read_bytes()
    needed = least(run)
    assert plain.planned == needed
    # Nothing is left for suspended passes then, whose activations are no part of the plan.
    used = simulated(monkeypatch, lambda: run(needed))
    assert 0.85 * used <= needed <= 1.15 * used, (needed, used)
    assert (tmp_path / "s.safetensors").read_bytes() == whole


def test_sums_leave_memory_with_their_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, tuned = llama_pair(tmp_path)
    last: list[weakref.ref[torch.Tensor]] = []
    take = Collector.sums

    def sums(self: Collector, *args: Any) -> tuple[dict[str, torch.Tensor], int]:
        assert all(tensor() is None for tensor in last)
        found, tokens = take(self, *args)
        last[:] = map(weakref.ref, found.values())
        return found, tokens

    monkeypatch.setattr(Collector, "sums", sums)
    report = calibrate(tuned, write_texts(tmp_path / "new.jsonl"), tmp_path / "s.safetensors")
    assert report.groups > 1
    assert len(last) == 2


def test_layers_called_several_times_are_counted_together() -> None:
    model = llama(blocks=2, width=64)
    batches = [{"input_ids": torch.zeros(2, 8, dtype=torch.long)}]
    names = [name for name, cols in input_columns(model).items() if cols == 64]
    sums = len(names) * (64 * 64 + TOKENS_AT_ONCE * 64) * 4
    for kind, together in (("full", sums), ("diag", len(names) * 64 * 4)):
        planner = PassPlanner(model, batches, kind)
        apart, both = planner.plan(), planner.plan(names)
        assert together <= both.bytes - both.weights
        if kind == "full":
            assert apart.bytes < sums
            assert both.bytes < apart.bytes + sums
            assert both.layer.startswith(min(names))
    room = Room(model, batches, "full", RunOptions(max_vram=apart.bytes + sums), 0)
    tight = Room(model, batches, "full", RunOptions(max_vram=sums), 0)
    room.add_repeated(names)
    with pytest.raises(UsageError, match="several times in a pass take"):
        tight.add_repeated(names)


def test_padding_is_planned() -> None:
    """With padding a pass holds its mask, and attention a copy of it in the model's dtype."""
    model = llama(blocks=2, width=64)
    ids = torch.zeros(2, 1000, dtype=torch.long)  # the mask takes more than all else
    whole = torch.ones_like(ids)
    padded = whole.clone()
    padded[0, :3] = 0
    names = [f"model.layers.1.self_attn.{name}_proj" for name in "qo"]
    lanes = []
    for mask in (whole, padded):
        found, why = trace_lanes(model, [{"input_ids": ids, "attention_mask": mask}], names)
        assert not why
        lanes.append(found[names[1]])
    assert lanes[1].stand - lanes[0].stand == 2 * 1000 * 1000
    assert lanes[1].run - lanes[0].run >= 2 * 1000 * 1000 * 4
