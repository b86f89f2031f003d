"""llm-compressor's ``oneshot`` runs the modifier; the model is that of ``tailor_model``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tailor_fast import Recipe, tailor_model
from tailor_fast._core.errors import UsageError
from tests.integrations.packages import Ran, run_all
from tests.models.processors import text_tokenizer
from tests.patching.disk import moved

SELF = "tests.integrations.test_llmcompressor"
SHAPES = {"vocab_size": 10, "initializer_range": 0.1}


def model_of(kind: str) -> Any:
    """A small model with biases that are not zero, which a solve must count."""
    torch.manual_seed(4)
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 16}
        model: Any = GPT2LMHeadModel(GPT2Config(**SHAPES, **sizes))
    else:
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "attention_bias": True, "mlp_bias": True}
        model = LlamaForCausalLM(LlamaConfig(**SHAPES, **sizes, **heads))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def batches() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(4, 10, (6, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": ids[i : i + 2], "attention_mask": torch.ones(2, 8)} for i in (0, 2, 4)]


def shoot(arguments: list[str]) -> None:
    """``oneshot`` on a tuned model, as a user calls it, in Python or with a recipe in YAML."""
    from llmcompressor import oneshot
    from torch.utils.data import DataLoader

    from tailor_fast.integrations.llmcompressor import ModelTailorModifier

    kind, place, out, given = arguments
    fields = json.loads(given)
    recipe: Any = ModelTailorModifier(base_model=place, **fields)
    if out.endswith("yaml"):
        Path("recipe.yaml").write_text(
            "tailor_stage:\n  tailor_modifiers:\n    ModelTailorModifier:\n"
            + f"      base_model: {place}\n"
            + "".join(f"      {key}: {value}\n" for key, value in fields.items())
        )
        recipe = "recipe.yaml"
    model = oneshot(
        model=type(model_of(kind)).from_pretrained(f"{kind}-tuned"),
        recipe=recipe,
        processor=text_tokenizer(),
        dataset=DataLoader(batches(), batch_size=None),
        pipeline="sequential",
    )
    model.save_pretrained(out)
    if not isinstance(recipe, str):
        report = recipe.report.to_dict()
        (Path(out) / "report.json").write_text(json.dumps(report))


CASES = {
    "llama": ("llama", {"density": 0.2}),
    "gpt2": ("gpt2", {"density": 0.1, "untouched": "tuned"}),
    "yaml": ("llama", {"density": 0.2, "decorate": "obs", "targets": "mlp"}),
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Ran]]:
    folder = tmp_path_factory.mktemp("llmcompressor")
    for kind in ("llama", "gpt2"):
        model_of(kind).save_pretrained(folder / kind)
        moved(model_of(kind)).save_pretrained(folder / f"{kind}-tuned")
    jobs = {
        name: [kind, folder / kind, folder / f"out-{name}", json.dumps(fields)]
        for name, (kind, fields) in CASES.items()
    }
    jobs["another base"] = ["llama", folder / "gpt2", folder / "no", "{}"]
    jobs["scope"] = ["llama", folder / "llama", folder / "no", '{"scope": "global"}']
    jobs["value"] = ["llama", folder / "llama", folder / "no", '{"decorate": "fast"}']
    preloaded = ["llmcompressor", "tailor_fast.integrations.llmcompressor", SELF]
    done = run_all(
        "llmcompressor", preloaded, [(f"{SELF}:shoot", job) for job in jobs.values()], folder
    )
    return folder, dict(zip(jobs, done, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_it_gives_what_tailor_model_gives(ran: tuple[Path, dict[str, Ran]], name: str) -> None:
    folder, done = ran
    assert done[name].code == 0, done[name].err
    kind, fields = CASES[name]
    base = model_of(kind)
    recipe = Recipe(**fields, propagate="sequential", group="block")
    expected = tailor_model(base, moved(base), batches(), recipe)
    made = type(base).from_pretrained(folder / f"out-{name}")
    patched = {f"{row.name}.weight" for row in expected.report.linears}
    assert patched
    for parameter, tensor in expected.model.named_parameters():
        found, original = made.get_parameter(parameter), base.get_parameter(parameter)
        if parameter not in patched:
            assert torch.equal(found, tensor), parameter
            continue
        # The forward passes are traced, so that their sums are in another order.
        assert torch.equal(found != original, tensor != original), parameter
        change = (tensor - original).norm()
        assert (found - tensor).norm() <= 1e-3 * change, parameter


def test_the_report_has_every_layer(ran: tuple[Path, dict[str, Ran]]) -> None:
    folder, _ = ran
    report = json.loads((folder / "out-llama" / "report.json").read_text())
    assert len(report["linears"]) == 14
    assert all(row["tokens"] == 48 and row["loss"] is not None for row in report["linears"])
    assert 0.19 < report["density"] <= 0.2


def test_refusals(ran: tuple[Path, dict[str, Ran]]) -> None:
    _, done = ran
    assert (
        "expected the base of the model that is given; name the right" in done["another base"].err
    )
    assert "scope 'global' needs a pass of its own" in done["scope"].err
    assert "ModelTailorModifier: decorate: Input should be" in done["value"].err
    assert {done[name].code for name in ("another base", "scope", "value")} == {1}


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llmcompressor", None)
    monkeypatch.delitem(sys.modules, "tailor_fast.integrations.llmcompressor", raising=False)
    with pytest.raises(UsageError, match=r"^llmcompressor cannot be .*\[llmcompressor\]'$"):
        __import__("tailor_fast.integrations.llmcompressor")
