"""``TailorCallback``: a real ``Trainer`` trains a few steps, then model and patch are files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen3MoeConfig,
)

from tailor_fast import Patch, Recipe, tailor_model
from tailor_fast._core.errors import InputError, OutputError, UsageError
from tailor_fast.patchfile import apply_patch
from tailor_fast.patching.verify import verify_output
from tests.models.processors import WORDS, text_tokenizer
from tests.patching.disk import llama

pytest.importorskip("accelerate", reason="accelerate is not installed: the Trainer needs it")
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from tailor_fast.integrations.trainer import TailorCallback, take

# PEFT 0.21 and the Trainer ask transformers 5.23 and torch 2.13 for what those call deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:'pin_memory' argument:UserWarning"),
]
RECIPE = Recipe(density=0.1)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    path = tmp_path / "base"
    llama(blocks=2).save_pretrained(path, max_shard_size="20KB")
    text_tokenizer().save_pretrained(path)
    return path


def samples(count: int = 24) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(4, 10, (count,), generator=generator).tolist()
    return [
        {"input_ids": torch.randint(4, len(WORDS), (n,), generator=generator).tolist()}
        for n in lengths
    ]


def trainer_of(model: Any, folder: Path, callback: TailorCallback, **options: Any) -> Trainer:
    tokenizer = text_tokenizer()
    chosen = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 4}
    args = TrainingArguments(
        output_dir=str(folder / "run"),
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **(chosen | options),
    )
    return Trainer(
        model=model,
        args=args,
        train_dataset=samples(),
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        processing_class=tokenizer,
        callbacks=[callback],
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= load_file(path)
    return found


def check_written(base: Path, out: Path, patch: Path) -> None:
    """OUT keeps to its records, and the patch makes it of the base, bit for bit."""
    assert verify_output(out).violations == []
    apply_patch(base, patch, applied := out.parent / "applied")
    made, expected, original = tensors(applied), tensors(out), tensors(base)
    assert made.keys() == expected.keys() == original.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == original[name].dtype
        assert torch.equal(made[name].view(torch.uint8), tensor.view(torch.uint8)), name
    model = AutoModelForCausalLM.from_pretrained(base)
    with Patch.open(patch) as file:
        assert len(file) > 0
        file.apply_(model)
    for name, tensor in AutoModelForCausalLM.from_pretrained(out).state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_training_ends_with_a_model_and_its_patch(base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    callback = TailorCallback(recipe=RECIPE, samples=8)
    trainer_of(model, tmp_path, callback).train()

    out = tmp_path / "run" / "tailored"
    check_written(base, out, out.with_name("tailored.tailor.safetensors"))
    result = callback.result
    assert result is not None
    assert result.report.kept <= 0.1 * result.report.targeted
    assert all(row.tokens > 0 and row.loss is not None for row in result.report.linears)
    # The trained model is the one that was trained, not the patched one.
    trained = model.model.layers[0].mlp.up_proj.weight
    original = LlamaForCausalLM.from_pretrained(base).model.layers[0].mlp.up_proj.weight
    assert (trained != original).float().mean() > 0.9
    assert AutoTokenizer.from_pretrained(out).get_vocab() == text_tokenizer().get_vocab()
    assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_batches_of_ones_own_and_old_tasks(base: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(base)
    new = [{"input_ids": torch.randint(4, len(WORDS), (3, 7))} for _ in range(2)]
    old = [{"input_ids": torch.randint(4, len(WORDS), (3, 6))}]
    out, patch = tmp_path / "out", tmp_path / "task.safetensors"
    callback = TailorCallback(base, out, RECIPE, batches=new, retain_batches=old, patch=patch)
    trainer_of(model, tmp_path, callback).train()
    check_written(base, out, patch)
    original = LlamaForCausalLM.from_pretrained(base)
    expected = tailor_model(original, model, new, RECIPE, retain_batches=old)
    for name, tensor in expected.model.state_dict().items():
        assert torch.equal(tensors(out)[name], tensor), name


@pytest.mark.parametrize("untouched", ["base", "tuned"])
def test_training_in_float32_of_a_base_in_bfloat16(
    base: Path, tmp_path: Path, untouched: Any
) -> None:
    half = tmp_path / "half"
    llama(blocks=2, dtype=torch.bfloat16).save_pretrained(half)
    model = LlamaForCausalLM.from_pretrained(half, dtype=torch.float32)
    recipe = Recipe(density=0.1, untouched=untouched)
    callback = TailorCallback(recipe=recipe, samples=8)
    trainer_of(model, tmp_path, callback).train()
    out = tmp_path / "run" / "tailored"
    check_written(half, out, out.with_name("tailored.tailor.safetensors"))
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    norm = "model.layers.1.input_layernorm.weight"
    expected = model.get_parameter(norm).detach().bfloat16()
    same = torch.equal(tensors(out)[norm], expected)
    assert same == (untouched == "tuned")
    assert model.dtype == torch.float32


@pytest.mark.parametrize("init", [True, "pissa"])
def test_training_adapters(base: Path, tmp_path: Path, init: Any) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=init)
    model = peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config)
    callback = TailorCallback(recipe=RECIPE, samples=8)
    trainer_of(model, tmp_path, callback).train()
    out = tmp_path / "run" / "tailored"
    check_written(base, out, out.with_name("tailored.tailor.safetensors"))
    original, made = tensors(base), tensors(out)
    changed = {name.split(".")[-2] for name in made if not torch.equal(made[name], original[name])}
    assert changed == {"q_proj", "up_proj"}
    assert any("lora_" in name for name, _ in model.named_parameters())  # still a PeftModel


SMALL: dict[str, Any] = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
MIXTURES = {
    "mixtral": MixtralConfig(num_local_experts=4, **SMALL),
    "qwen3_moe": Qwen3MoeConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, **SMALL
    ),
}


def new_base(config: Any, folder: Path, **options: Any) -> Path:
    torch.manual_seed(4)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, **options)
    text_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_of_experts(kind: str, tmp_path: Path) -> None:
    """One tensor per expert on disk, all experts of a block in one parameter in memory."""
    base = new_base(MIXTURES[kind], tmp_path / "base", max_shard_size="100KB")
    model = AutoModelForCausalLM.from_pretrained(base)
    fused = {name for name, _ in model.named_parameters() if name.endswith("gate_up_proj")}
    callback = TailorCallback(recipe=RECIPE, samples=8)
    trainer_of(model, tmp_path, callback).train()
    out = tmp_path / "run" / "tailored"
    check_written(base, out, out.with_name("tailored.tailor.safetensors"))
    original, made = tensors(base), tensors(out)
    changed = {name for name in made if not torch.equal(made[name], original[name])}
    experts = {name for name in made if ".experts." in name}
    assert len(experts) == 2 * 4 * 3
    assert len(changed & experts) >= 12  # an expert without tokens stays as it is
    for name in changed & experts:
        share = (made[name] != original[name]).float().mean()
        assert 0 < share <= 0.1, name
    # As it was trained: experts together, and trained ones.
    assert {name for name, _ in model.named_parameters() if name in fused} == fused
    assert model(torch.tensor([[4, 5, 6]])).logits.isfinite().all()


def test_experts_that_lie_together_on_disk_are_refused(tmp_path: Path) -> None:
    base = new_base(MIXTURES["mixtral"], tmp_path / "base", save_original_format=False)
    model = AutoModelForCausalLM.from_pretrained(base)
    message = refused(base, tmp_path, TailorCallback(), model=model)
    assert "holds all experts of a block in one tensor; expected one tensor per expert" in message
    assert "both models in memory with tailor_model" in message


def test_a_head_that_is_tied_to_the_embeddings(tmp_path: Path) -> None:
    base = new_base(LlamaConfig(tie_word_embeddings=True, **SMALL), tmp_path / "base")
    assert "lm_head.weight" not in tensors(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    callback = TailorCallback(recipe=RECIPE, samples=8)
    trainer_of(model, tmp_path, callback).train()
    out = tmp_path / "run" / "tailored"
    check_written(base, out, out.with_name("tailored.tailor.safetensors"))
    name = "model.embed_tokens.weight"
    assert torch.equal(tensors(out)[name], tensors(base)[name])
    assert not torch.equal(model.get_parameter(name), tensors(base)[name])


def test_tensors_that_only_the_base_file_has_stay(base: Path, tmp_path: Path) -> None:
    """Names that the model ignores must not be lost: the patch would not fit the base."""
    single = tmp_path / "single"
    llama(blocks=2).save_pretrained(single)
    path = single / "model.safetensors"
    save_file(load_file(path) | {"rotary.inv_freq": torch.ones(3)}, path, {"format": "pt"})
    model = LlamaForCausalLM.from_pretrained(single)
    trainer_of(model, tmp_path, TailorCallback(recipe=RECIPE)).train()
    assert torch.equal(tensors(tmp_path / "run" / "tailored")["rotary.inv_freq"], torch.ones(3))


def refused(base: Path, tmp_path: Path, callback: TailorCallback, **options: Any) -> str:
    """The message; no step was made."""
    model = options.pop("model", None) or LlamaForCausalLM.from_pretrained(base)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises((InputError, OutputError, UsageError)) as caught:
        trainer_of(model, tmp_path, callback, **options).train()
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    return str(caught.value)


def test_what_cannot_work_is_refused_before_the_first_step(base: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    callback = TailorCallback(out=tmp_path / "taken")
    assert "exists already" in refused(base, tmp_path, callback)
    (tmp_path / "taken.safetensors").touch()
    callback = TailorCallback(patch=tmp_path / "taken.safetensors")
    assert "taken.safetensors: exists already" in refused(base, tmp_path, callback)
    callback = TailorCallback(patch=tmp_path / "task.bin")
    assert "must end in .safetensors" in refused(base, tmp_path, callback)
    callback = TailorCallback(recipe=Recipe(sensitivity="ratio"))
    assert "got no old-task data" in refused(base, tmp_path, callback)
    callback = TailorCallback(tmp_path / "nowhere")
    assert "nowhere" in refused(base, tmp_path, callback)
    unknown = llama(blocks=2)
    assert "base is not known; give base" in refused(
        base, tmp_path, TailorCallback(), model=unknown
    )
    larger = LlamaForCausalLM.from_pretrained(base)
    larger.resize_token_embeddings(len(WORDS) + 3, mean_resizing=False)
    message = refused(base, tmp_path, TailorCallback(), model=larger)
    assert "has [10, 32] for model.embed_tokens.weight [13, 32]; expected the base" in message
    assert not (tmp_path / "run" / "tailored").exists()


def test_sharded_training_is_refused(base: Path, tmp_path: Path) -> None:
    callback = TailorCallback()
    trainer = trainer_of(LlamaForCausalLM.from_pretrained(base), tmp_path, callback)
    trainer.args.deepspeed = "zero3.json"
    with pytest.raises(UsageError, match="all weights in one process; got FSDP or DeepSpeed"):
        callback.on_train_begin(trainer.args, trainer.state, trainer.control, model=trainer.model)


def test_models_without_a_base_checkpoint_are_refused(base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(LlamaForCausalLM.from_pretrained(base), tmp_path, TailorCallback())
    arguments = trainer.args, trainer.state, trainer.control
    with pytest.raises(UsageError, match="needs a transformers model; got Linear"):
        TailorCallback().on_train_begin(*arguments, model=torch.nn.Linear(2, 2))
    peft = pytest.importorskip("peft", reason="peft is not installed")
    trainer.model.add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UsageError, match=r"own add_adapter; expected a PeftModel; wrap"):
        TailorCallback().on_train_begin(*arguments, model=trainer.model)


def test_only_the_first_process_writes(base: Path, tmp_path: Path) -> None:
    callback = TailorCallback()
    trainer = trainer_of(LlamaForCausalLM.from_pretrained(base), tmp_path, callback)
    trainer.state.is_world_process_zero = False
    arguments = trainer.args, trainer.state, trainer.control
    callback.on_train_begin(*arguments, model=trainer.model)
    callback.on_train_end(*arguments, model=trainer.model)
    assert callback.result is None
    assert not (tmp_path / "run" / "tailored").exists()


def test_samples_are_taken_until_there_are_enough() -> None:
    batches = [{"input_ids": torch.zeros(4, 3)} for _ in range(5)]
    assert len(take(batches, 8)) == 2
    assert len(take(batches, 9)) == 3
    assert len(take(batches, 100)) == 5
    with pytest.raises(UsageError, match="samples must be at least 1; got 0"):
        TailorCallback(samples=0)
