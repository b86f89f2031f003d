"""A ``PeftModel`` in memory: its base and its tuned model, and that nothing of it moves."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from tailor_fast import Recipe, tailor_model
from tailor_fast._core.errors import InputError, UsageError
from tests.patching.disk import llama
from tests.patching.toys import token_batches

peft = pytest.importorskip("peft", reason="peft is not installed: pip install 'tailor_fast[peft]'")
from tailor_fast.integrations.peft import base_and_tuned, tailor_peft  # noqa: E402  needs peft

# PEFT 0.21 asks transformers 5.23 for what that calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
RECIPE = Recipe(density=0.1)
LAYERS = ["q_proj", "v_proj", "down_proj"]


def adapted(**options: Any) -> Any:
    """A LLaMA with one adapter whose B is no longer zero, as after training."""
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": LAYERS, "lora_dropout": 0.1} | options
    model = peft.get_peft_model(llama(), peft.LoraConfig(**chosen))
    return train(model)


def train(model: Any, seed: int = 11) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def batches() -> list[dict[str, torch.Tensor]]:
    """Ids within the vocabulary of the LLaMA."""
    size = llama().config.vocab_size
    return [{**batch, "input_ids": batch["input_ids"] % size} for batch in token_batches()]


def words(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"modules_to_save": ["up_proj"]}, {"init_lora_weights": "gaussian"}],
    ids=["lora", "dora", "modules_to_save", "gaussian"],
)
def test_it_is_tailor_model_on_the_base_and_the_merged_model(options: dict[str, Any]) -> None:
    base, data = llama(), batches()
    model = adapted(**options)
    result = tailor_peft(model, data, RECIPE)

    merged = adapted(**options).merge_and_unload()  # PEFT's own way, which consumes the model
    expected = tailor_model(base, merged, data, RECIPE)
    assert same(words(result.model), words(expected.model))
    assert result.patch.keys() == expected.patch.keys()
    names = [*LAYERS, *options.get("modules_to_save", [])]
    assert {name.split(".")[-2] for name in result.patch} == set(names)
    for name, weight in base.named_parameters():
        changed = (result.model.get_parameter(name) != weight).sum()
        assert changed <= 0.1 * weight.numel()
        assert (name in result.patch) == bool(changed)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["up_proj"]}])
def test_the_model_keeps_every_word_and_its_mode(options: dict[str, Any]) -> None:
    model, data = adapted(**options), batches()
    before, active = words(model), list(model.active_adapters)
    tailor_peft(model, data, RECIPE)
    assert same(words(model), before)
    assert model.training
    assert list(model.active_adapters) == active
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert type(model) is type(adapted(**options))


def test_what_no_adapter_changes_is_not_copied() -> None:
    model = adapted(modules_to_save=["up_proj"])
    held = {tensor.data_ptr() for tensor in model.parameters()}
    base, tuned = base_and_tuned(model)
    assert {tensor.data_ptr() for tensor in base.parameters()} <= held
    copied = [name for name, tensor in tuned.named_parameters() if tensor.data_ptr() not in held]
    assert {name.split(".")[-2] for name in copied} == set(LAYERS)
    assert same(words(base), words(llama()))


def test_without_data() -> None:
    result = tailor_peft(adapted(), recipe=Recipe(density=0.05))
    assert "no data: salience only, nothing decorated" in result.report.notes
    assert 0 < result.report.kept <= 0.05 * result.report.targeted


def test_adapters_are_chosen_by_name() -> None:
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    train(model, seed=12)
    assert {n.split(".")[-2] for n in tailor_peft(model).patch} == {"q_proj"}
    assert {n.split(".")[-2] for n in tailor_peft(model, adapters=["default"]).patch} == set(LAYERS)
    both = tailor_peft(model, recipe=Recipe(density=1.0), adapters=["default", "other"]).model
    one = tailor_peft(model, recipe=Recipe(density=1.0), adapters=["default"]).model
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(both.get_parameter(name), one.get_parameter(name))
    with pytest.raises(UsageError, match=r"must be among 'default', 'other'; got 'third'; name"):
        tailor_peft(model, adapters=["third"])
    with pytest.raises(UsageError, match="got none"):
        tailor_peft(model, adapters=[])


def test_a_plain_model_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a PeftModel; got LlamaForCausalLM\. Hint"):
        tailor_peft(llama())


def test_trained_biases_are_refused() -> None:
    with pytest.raises(InputError, match="trained with bias 'lora_only', which overwrites"):
        tailor_peft(adapted(bias="lora_only"))


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_initialisation_that_changes_the_base_is_refused(init: str) -> None:
    model = adapted(init_lora_weights=init)
    name = "base_model.model.model.layers.0.mlp.down_proj.base_layer.weight"
    base = llama().model.layers[0].mlp.down_proj.weight
    assert not torch.equal(model.get_parameter(name), base)  # the reason for it
    with pytest.raises(InputError, match=f"init_lora_weights '{init}', which may change"):
        tailor_peft(model)


def test_a_merged_adapter_is_refused() -> None:
    model = adapted()
    model.merge_adapter()
    with pytest.raises(InputError, match=r"q_proj: an adapter is merged into its weight"):
        tailor_peft(model)


def test_what_trains_outside_the_adapters_is_refused() -> None:
    model = adapted()
    model.get_parameter("base_model.model.model.norm.weight").requires_grad_()
    with pytest.raises(InputError, match=r"1 parameters outside .* \(model\.norm\.weight\)"):
        tailor_peft(model)


def test_quantised_base_weights_are_refused() -> None:
    model = adapted()
    layer = model.base_model.model.model.layers[1].mlp.down_proj.get_base_layer()
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match=r"down_proj: its base weight is quantised \(torch.int8"):
        tailor_peft(model)


def test_an_adapter_that_changes_no_weight_is_refused() -> None:
    config = peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    model = peft.get_peft_model(llama(), config)
    with pytest.raises(InputError, match="of type PREFIX_TUNING, which changes no weight"):
        tailor_peft(model)


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UsageError, match=r"^peft cannot be imported .*\[peft\]'$"):
        tailor_peft(model)
