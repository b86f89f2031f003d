"""What ``plan`` says of a device's memory, and a walk whose every tensor is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tailor_fast._core.errors import UsageError
from tailor_fast._core.machine import naming
from tailor_fast._core.meter import Meter
from tailor_fast.calibration.options import RunOptions
from tailor_fast.calibration.placement import Placement
from tailor_fast.calibration.tracing import trace_lanes
from tailor_fast.models import Residency
from tailor_fast.patching import Recipe, patch_checkpoint
from tailor_fast.patching.checkpoints import plan_patch
from tailor_fast.patching.device import DevicePlan, Walk, plan_device
from tests.backends import needs_native
from tests.models.processors import text_tokenizer
from tests.patching.disk import llama, llava_pair, moved, save_pair, write_scenes, write_texts
from tests.simulated import least, simulated

GIB = 1 << 30


def llava(
    recipe: Recipe, shape: tuple[int, int, int], batch: int, length: int
) -> tuple[Walk, list[tuple[str, int, int]]]:
    """LLaVA-1.5 under retention, from its shapes alone, by the planner's own code."""
    width, hidden, heads = shape
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=2,  # they are equal
        num_attention_heads=heads,
        vocab_size=32064,
        dtype=torch.bfloat16,
    )
    eyes = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=2,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    with torch.device("meta"):
        config = LlavaConfig(vision_config=eyes, text_config=text, dtype=torch.bfloat16)
        model = LlavaForConditionalGeneration(config).to(torch.bfloat16)
    layers = [
        (name, *module.weight.shape)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "language_model.layers" in name
    ]
    ids = torch.zeros(batch, length, dtype=torch.long)
    lanes, why = trace_lanes(model, [{"input_ids": ids}], [name for name, _, _ in layers])
    assert not why
    block = 2 * max(Residency.unit_sizes(model).values())
    pictures = 128 * 3 * 336 * 336 * 2
    walk = Walk(recipe, "cuda", 2, 3 * block, 2 * pictures, True, True, True, lanes, 1 << 18)
    return walk, layers


@pytest.mark.parametrize("refits", [0, 4])
@pytest.mark.parametrize("shape", [(4096, 11008, 32), (5120, 13824, 40)])
def test_llava_with_retention_fits_in_8_gib(shape: tuple[int, int, int], refits: int) -> None:
    walk, layers = llava(Recipe(refits=refits), shape, 8, 2048)
    plan = plan_device(walk, layers, 8 * GIB)
    assert {stage.name for stage in plan.stages} == {"statistics", "scores", "solve"}
    assert plan.largest.bytes <= 8 * GIB
    assert plan.left == 8 * GIB - plan.largest.bytes
    # Blocks on their way, and what waits; activations beyond what is left go to disk.
    assert plan.host + walk.weights <= 12 * GIB
    whole = plan_device(walk, layers, None)
    assert whole.placement == Placement()
    assert whole.largest.bytes >= plan.largest.bytes


def test_the_least_that_a_device_must_have_is_named() -> None:
    walk, layers = llava(Recipe(refits=4), (5120, 13824, 40), 8, 2048)
    with pytest.raises(
        UsageError, match=r"max_vram of 1073741824 bytes is too little: \w+ of"
    ) as e:
        plan_device(walk, layers, GIB)
    needed = int(str(e.value).split(" takes ")[1].split(";")[0])
    assert plan_device(walk, layers, needed).largest.bytes == needed
    with pytest.raises(UsageError):
        plan_device(walk, layers, needed - 1)


@needs_native
@pytest.mark.parametrize(
    ("kind", "recipe", "retains", "limited"),
    [
        ("llama", Recipe(), False, False),
        ("llama", Recipe(refits=2), True, True),
        ("llama", Recipe(decorate="obs"), False, False),
        ("llava", Recipe(), False, False),
    ],
)
def test_a_walk_takes_what_is_planned(
    kind: str,
    recipe: Recipe,
    retains: bool,
    limited: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Losses of small layers are taken in float64, those of layers of any size that matters not.
    monkeypatch.setattr("tailor_fast.ops.decorate.native.sweep.FLOAT32_FROM", 0)
    write = write_texts
    if kind == "llama":
        base = llama(blocks=2, width=256)
        pair = save_pair(tmp_path, base, moved(base), text_tokenizer(), shard="50MB")
    else:
        pair, write = llava_pair(tmp_path), write_scenes
    given: dict[str, Any] = {"base": pair[0], "tuned": pair[1], "out": tmp_path / "out"}
    given |= {"calibration": write(tmp_path / "new.jsonl", 8), "recipe": recipe}
    given["retain"] = write(tmp_path / "old.jsonl", 8, seed=9) if retains else None

    def planned(limit: int) -> tuple[DevicePlan, RunOptions]:
        options = RunOptions(max_vram=limit, batch_size=4)
        plan = plan_patch(**given, options=options).device
        assert plan is not None
        return plan, options

    plan, _ = planned(GIB)
    # Nothing is left for suspended passes then, whose activations are no part of a stage.
    plan, options = planned(least(planned) if limited else plan.largest.bytes)
    assert plan.placement.differences_on_host == limited
    used = simulated(monkeypatch, lambda: patch_checkpoint(**given, options=options))
    assert 0.85 * used <= plan.largest.bytes <= 1.15 * used, (plan.largest, used)


def test_no_memory_left_names_the_stage_and_the_layer() -> None:
    said = pytest.raises(UsageError, match=r"solve of layers\.3\.down: .*--max-vram")
    with said, naming("solve", "layers.3.down"):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_the_meter_counts_a_storage_once_for_as_long_as_it_lives() -> None:
    with Meter() as meter:
        x = torch.zeros(1000)
        view = x[10:]
        assert meter.live == 4000
        y = x + 1
        assert (meter.live, meter.peak) == (8000, 8000)
        del x, view
        y.untyped_storage().resize_(400)
        assert meter.live == 400
        assert meter.reset() == 8000
        assert meter.peak == 400
        meter.forget(y)
        assert meter.live == 0
