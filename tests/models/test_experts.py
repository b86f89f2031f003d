"""Experts taken apart: the same numbers, one layer per expert, each with its own tokens."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from tailor_fast.calibration.collect import Collector, Streams
from tailor_fast.calibration.groups import discover
from tailor_fast.calibration.lockstep import Lockstep, Stream
from tailor_fast.models import SplitExperts, aligned, caller, find_targets, split_experts
from tailor_fast.models.experts import routed_rows
from tailor_fast.ops.codec import apply_patch_
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.tailor import tailor_model
from tailor_fast.testing import assert_within
from tests.models.zoo.families import TEXT
from tests.patching.disk import moved

KINDS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "head_dim": 8,
    },
    # Biases, gate and up interleaved, stored [in, out], a gate of its own.
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}
PATH = "model.layers.0.mlp.experts"


def mixture(kind: str) -> Any:
    torch.manual_seed(2)
    config = getattr(transformers, f"{kind}Config")(**TEXT, **KINDS[kind])
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_bias"):
                parameter.normal_()
    return model


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 16, (3, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch()).logits[0]


@pytest.mark.parametrize("kind", KINDS)
def test_split_experts_compute_what_the_fused_ones_do(kind: str) -> None:
    model = mixture(kind)
    whole = logits(model)
    wide = copy.deepcopy(model).double()
    wide.set_experts_implementation("eager")  # the grouped products know no float64
    exact = logits(wide)
    with split_experts(model):
        assert isinstance(model.get_submodule(PATH), SplitExperts)
        assert_within(logits(model), exact, whole)
    assert not isinstance(model.get_submodule(PATH), SplitExperts)
    assert torch.equal(logits(model), whole)


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_views_and_targets(kind: str) -> None:
    model = mixture(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    down = before[f"{PATH}.down_proj"][3]
    with split_experts(model):
        targets = {target.name: target.transposed for target in find_targets(model)}
        parts = {name.removeprefix(f"{PATH}.3.") for name in targets if f"{PATH}.3." in name}
        layer = model.get_submodule(f"{PATH}.3.down_proj")
        assert targets[f"{PATH}.3.down_proj"] == (kind == "GptOss")
        assert torch.equal(layer.weight, down)
        with torch.no_grad():
            layer.weight.zero_()
    assert parts == (
        {"gate_up_proj", "down_proj"} if kind == "GptOss" else {"gate_proj", "up_proj", "down_proj"}
    )
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed == {f"{PATH}.down_proj"}
    assert not after[f"{PATH}.down_proj"][3].any()
    assert torch.equal(after[f"{PATH}.down_proj"][:3], before[f"{PATH}.down_proj"][:3])


def routed(model: Any) -> torch.Tensor:
    """Experts of each token in the first block, ``[tokens, k]``."""
    seen = []
    handle = model.get_submodule(PATH).register_forward_pre_hook(
        lambda _module, args: seen.append(args[1])
    )
    logits(model)
    handle.remove()
    return seen[0]


def test_moments_of_an_expert_are_those_of_its_counted_tokens() -> None:
    model = mixture("Mixtral")
    choice = routed(model)
    inputs = []
    handle = model.get_submodule(PATH).register_forward_pre_hook(
        lambda _module, args: inputs.append(args[0])
    )
    logits(model)
    handle.remove()
    counted = batch()["attention_mask"].reshape(-1).bool()
    with split_experts(model):
        names = [target.name for target in find_targets(model)]
        stream = Stream("model", model, [batch()], caller(model))
        groups = discover(stream, names)
        assert groups.uncalled == ()
        assert groups.repeated == ()
        collector = Collector(model, groups)
        with Lockstep([stream], groups.sites) as lockstep:
            for site in groups.sites:
                moments = collector.at(lockstep, site, *Streams(stream).new)
                for number in range(4):
                    if site.modules[0] != f"{PATH}.{number}.gate_proj":
                        continue
                    assert site.modules[1:] == (f"{PATH}.{number}.up_proj",)
                    x = inputs[0][(choice == number).any(1) & counted]
                    assert moments.tokens == len(x) > 0
                    exact = (x.double().T @ x.double()) / len(x)
                    assert_within(moments.gram, exact, (x.T @ x) / len(x))


def test_tokens_that_only_one_model_routes_stand_for_themselves() -> None:
    def rows(values: list[int], scale: float) -> torch.Tensor:
        x = torch.tensor(values)[:, None] * torch.tensor([[scale, 1.0]])
        x._tailor_rows = torch.tensor(values)
        return x

    actual, target = rows([1, 2, 5, 8], 1.0), rows([0, 2, 3, 8], 10.0)
    assert routed_rows(actual).tolist() == [1, 2, 5, 8]
    paired = aligned(target, actual)
    assert paired[:, 0].tolist() == [1.0, 20.0, 5.0, 80.0]
    assert paired[:, 1].tolist() == [1.0, 2.0, 5.0, 8.0]
    plain = torch.zeros(4, 2)
    assert aligned(plain, actual) is plain


def test_an_expert_without_tokens_is_left_at_base_and_reported() -> None:
    base = mixture("Mixtral")
    with torch.no_grad():  # one choice for all tokens
        base.get_submodule("model.layers.0.mlp.gate").weight.zero_()
    tuned = moved(base, ("experts", "proj"))
    result = tailor_model(base, tuned, [batch(0), batch(1)], Recipe())
    left = {row.name for row in result.report.linears if not row.kept}
    idle = {
        f"{PATH}.{number}.{part}"
        for number in range(4)
        for part in ("gate_proj", "up_proj", "down_proj")
        if not (routed(tuned) == number).any()
    }
    assert idle
    assert idle <= left
    notes = {row.note for row in result.report.linears if row.name in idle}
    assert notes == {"left at base: no counted token reaches it"}
    ours, theirs = result.model.state_dict(), base.state_dict()
    for name in (f"{PATH}.gate_up_proj", f"{PATH}.down_proj"):
        for number in range(4):
            same = torch.equal(ours[name][number], theirs[name][number])
            assert same == (f"{PATH}.{number}.down_proj" in idle)


@pytest.mark.parametrize("kind", KINDS)
def test_both_models_are_unchanged_and_the_patch_is_sparse(kind: str) -> None:
    base = mixture(kind)
    tuned = moved(base)
    before = [copy.deepcopy(model.state_dict()) for model in (base, tuned)]
    result = tailor_model(base, tuned, [batch(0), batch(1)], Recipe(density=0.05))
    for model, state in zip((base, tuned), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    after = result.model.state_dict()
    for name in (f"{PATH}.gate_up_proj", f"{PATH}.down_proj"):
        for expert, original in zip(after[name], before[0][name], strict=True):
            changed = int((expert != original).sum())
            assert 0 < changed <= 0.05 * expert.numel()
    applied = before[0][f"{PATH}.down_proj"]
    apply_patch_(applied, result.patch[f"{PATH}.down_proj"])
    assert torch.equal(applied, after[f"{PATH}.down_proj"])
