"""Models without weights, names on disk, and blocks that come and go."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration

from tailor_fast._core.errors import InputError
from tailor_fast.models import Residency, blocks_of, build_skeleton, find_targets, map_keys
from tests.patching.disk import llama, llama_pair, llava_pair


def stored(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= load_file(path)
    return tensors


def test_skeleton_has_the_buffers_of_from_pretrained_and_no_weights(tmp_path: Path) -> None:
    for folder, kind in (
        (llama_pair(tmp_path / "llama")[0], AutoModelForCausalLM),
        (llava_pair(tmp_path / "llava")[0], LlavaForConditionalGeneration),
    ):
        skeleton, loaded = build_skeleton(folder), kind.from_pretrained(folder)
        assert {p.device.type for p in skeleton.parameters()} == {"meta"}
        ours, theirs = dict(skeleton.named_buffers()), dict(loaded.named_buffers())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        assert {n: p.shape for n, p in skeleton.named_parameters()} == {
            n: p.shape for n, p in loaded.named_parameters()
        }


@pytest.mark.parametrize("layout", ["written", "module"])
def test_keys_of_both_llava_layouts_reach_the_same_parameters(layout: str, tmp_path: Path) -> None:
    folder = llava_pair(tmp_path)[0]
    loaded = LlavaForConditionalGeneration.from_pretrained(folder).state_dict()
    disk = stored(folder) if layout == "written" else {k: v.clone() for k, v in loaded.items()}
    hub = any(name.startswith("language_model.model.") for name in disk)
    assert hub == (layout == "written")
    keys = map_keys(build_skeleton(folder), disk, "here")
    assert keys.keys() == loaded.keys()
    assert all(torch.equal(disk[key], loaded[name]) for name, key in keys.items())


def test_a_tied_head_takes_the_name_of_the_embedding(tmp_path: Path) -> None:
    model = llama(blocks=1)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    keys = map_keys(build_skeleton(tmp_path), stored(tmp_path), "here")
    assert keys["lm_head.weight"] == keys["model.embed_tokens.weight"]


def test_two_names_for_one_parameter_are_refused(tmp_path: Path) -> None:
    folder = llava_pair(tmp_path)[0]
    names = ["language_model.lm_head.weight", "lm_head.weight"]
    with pytest.raises(InputError, match=r"both mean lm_head\.weight"):
        map_keys(build_skeleton(folder), names, "here")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "configuration cannot be read"),
        ("{", "configuration cannot be read"),
        ("[]", "configuration cannot be read"),
        (json.dumps({"model_type": "llama"}), "architectures is"),
        (json.dumps({"architectures": ["NoSuchModel"]}), "architectures is"),
    ],
)
def test_a_config_that_names_no_class_is_refused(config, message: str, tmp_path: Path) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(InputError, match=message):
        build_skeleton(tmp_path)


def test_one_block_at_a_time_gives_the_same_outputs(tmp_path: Path) -> None:
    folder = llama_pair(tmp_path, blocks=4)[0]
    disk = stored(folder)
    model = build_skeleton(folder)
    keys = map_keys(model, disk, "here")
    residency = Residency(model, lambda name: disk[keys[name]] if name in keys else None)
    assert residency.blocks == {f"model.layers.{i}" for i in range(4)}
    ids = torch.tensor([[1, 4, 5, 6]])
    with torch.no_grad(), residency.attached():
        logits = model(input_ids=ids, use_cache=False).logits
    expected = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(logits, expected(input_ids=ids).logits)
    whole = sum(tensor.numel() * tensor.element_size() for tensor in disk.values())
    assert residency.loaded_bytes == whole
    block = sum(p.numel() * 4 for p in expected.model.layers[0].parameters())
    embeddings = 4 * sum(
        m.weight.numel()
        for m in (expected.model.embed_tokens, expected.lm_head, expected.model.norm)
    )
    assert residency.peak_bytes <= block + embeddings < whole
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_patched_weight_runs_until_its_block_leaves(tmp_path: Path) -> None:
    folder = llama_pair(tmp_path, blocks=2)[0]
    disk = stored(folder)
    model = build_skeleton(folder)
    keys = map_keys(model, disk, "here")
    residency = Residency(model, lambda name: disk[keys[name]] if name in keys else None)
    name = "model.layers.0.mlp.up_proj.weight"
    other = torch.zeros_like(disk[keys[name]])
    expected = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor([[1, 4, 5, 6]])
    with torch.no_grad():
        expected.get_parameter(name).copy_(other)
        wanted = expected(input_ids=ids).logits
    residency.set(name, other)  # before its block is resident
    with torch.no_grad(), residency.attached():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, wanted)
        assert residency.get(name) is None
        residency.set("model.layers.1.mlp.up_proj.weight", other)  # while its block is
        model.model.layers[0](torch.zeros(1, 1, 32), position_embeddings=(torch.ones(1, 1, 8),) * 2)
        with pytest.raises(InputError, match=r"model\.layers\.1 is entered again after"):
            model(input_ids=ids, use_cache=False)


def test_a_missing_weight_is_named(tmp_path: Path) -> None:
    folder = llama_pair(tmp_path, blocks=1)[0]
    residency = Residency(build_skeleton(folder), lambda _name: None)
    with (
        pytest.raises(InputError, match="is needed by the forward pass but is not"),
        residency.attached(),
    ):
        residency._model(input_ids=torch.tensor([[1]]))


def test_blocks_are_entries_of_the_outermost_stacks() -> None:
    class Expert(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = torch.nn.Linear(2, 2)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList(Expert() for _ in range(3))

    model = torch.nn.ModuleDict(
        {
            "layers": torch.nn.ModuleList(Layer() for _ in range(2)),
            "mlp": torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)),
            "head": torch.nn.Linear(2, 2),
        }
    )
    names = ["layers.1.experts.2.up", "mlp.1", "head"]
    assert blocks_of(model, names) == {names[0]: "layers.1", "mlp.1": None, "head": None}


def test_heads_and_what_shares_an_embedding_are_no_targets(tmp_path: Path) -> None:
    model = llama(blocks=1)
    names = [target.name for target in find_targets(model)]
    assert "lm_head" not in names
    assert len(names) == 7
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    only = find_targets(model, lambda name: name.endswith("down_proj"))
    assert [target.name for target in only] == ["model.layers.0.mlp.down_proj"]
