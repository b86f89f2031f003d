"""fusion_bench's own program runs ``method=model_tailor``: the model is ``tailor_model``'s."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tailor_fast import Recipe, tailor_model
from tailor_fast._core.errors import UsageError
from tests.integrations.packages import Ran, run_all
from tests.patching.disk import llama_pair

SEARCH = "hydra.searchpath=[pkg://tailor_fast.integrations.fusion_bench_config]"
LOGGER = "fabric/loggers=csv_logger"  # the default one needs tensorboard
SELF = "tests.integrations.test_fusion_bench"
RECIPE = Recipe(density=0.05)


def samples(seed: int, count: int = 10) -> list[dict[str, Any]]:
    """A train dataset: ids with their mask and labels, as a tokenised one."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 10, (count, 7), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones(7), "labels": row} for row in ids]


def batches(seed: int) -> list[dict[str, torch.Tensor]]:
    ids = torch.stack([sample["input_ids"] for sample in samples(seed)])[:6]
    return [{"input_ids": part, "attention_mask": torch.ones(part.shape)} for part in ids.split(4)]


def fuse(arguments: list[str]) -> None:
    """What the command ``fusion_bench`` runs."""
    from fusion_bench.scripts.cli import _hydra_main

    os.environ["HYDRA_FULL_ERROR"] = "1"  # the error as it is, not in a drawn box
    sys.argv = ["fusion_bench", *arguments]
    _hydra_main()


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ran]]:
    folder = tmp_path_factory.mktemp("fusion_bench")
    base, tuned = llama_pair(folder, blocks=2)
    pool = {
        "_target_": "fusion_bench.modelpool.CausalLMPool",
        "_recursive_": False,
        "models": {"_pretrained_": str(base), "task": str(tuned)},
        "tokenizer": str(tuned),
        "train_datasets": {
            "task": {"_target_": f"{SELF}.samples", "seed": 1},
            "old": {"_target_": f"{SELF}.samples", "seed": 2},
        },
    }
    pools = folder / "configurations" / "modelpool"
    pools.mkdir(parents=True)
    (pools / "pair.yaml").write_text(yaml.safe_dump(pool))
    bare = {key: value for key, value in pool.items() if key != "train_datasets"}
    (pools / "bare.yaml").write_text(yaml.safe_dump(bare))
    three = {**bare, "models": {**bare["models"], "another": str(base)}}
    (pools / "three.yaml").write_text(yaml.safe_dump(three))
    chosen = ["method.samples=6", "method.batch_size=4", "method.recipe.density=0.05"]
    common = ["--config-dir", folder / "configurations", SEARCH, "method=model_tailor", LOGGER]

    def job(pool: str, *options: object) -> tuple[str, list[object]]:
        place = f"method.model_save_path={folder / 'out'}-{pool}"
        where = [f"path.log_dir={folder / 'log'}", f"hydra.run.dir={folder / 'log'}"]
        return f"{SELF}:fuse", [*common, f"modelpool={pool}", place, *where, *options]

    jobs = [
        job("pair", *chosen, "method.retain_datasets=[old]"),
        job("bare", "merged_model_save_path=" + str(folder / "saved")),
        job("three"),
        job("bare", "+method.recipe.decorate=fast"),
        job("bare", "+modelpool.enable_lazy_loading=true"),
        job("bare", "method.retain_datasets=[older]"),
    ]
    preloaded = ["fusion_bench.scripts.cli", "tailor_fast.integrations.fusion_bench", SELF]
    return folder, run_all("fusion-bench", preloaded, jobs, folder)


def check(folder: Path, out: Path, expected: torch.nn.Module) -> None:
    found = load_file(out / "model.safetensors")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found[name], tensor), name
    assert any(not torch.equal(found[n], t) for n, t in base.state_dict().items())


def models(folder: Path) -> list[Any]:
    return [AutoModelForCausalLM.from_pretrained(folder / name) for name in ("base", "tuned")]


def test_data_of_the_pool(ran: tuple[Path, list[Ran]]) -> None:
    folder, (done, *_) = ran
    assert done.code == 0, done.err
    expected = tailor_model(*models(folder), batches(1), RECIPE, retain_batches=batches(2))
    check(folder, folder / "out-pair", expected.model)


def test_without_data(ran: tuple[Path, list[Ran]]) -> None:
    """The program saves what the algorithm returns, too."""
    folder, (_, done, *_) = ran
    assert done.code == 0, done.err
    expected = tailor_model(*models(folder), recipe=Recipe()).model
    check(folder, folder / "out-bare", expected)
    check(folder, folder / "saved", expected)


def test_refusals(ran: tuple[Path, list[Ran]]) -> None:
    _, (*_, three, recipe, lazy, data) = ran
    assert {three.code, recipe.code, lazy.code, data.code} == {1}
    assert "the pool has the models _pretrained_, another, task; expected" in three.err
    assert "method.recipe: decorate: Input should be" in recipe.err
    assert "the pool loads a LazyStateDict; expected a module" in lazy.err
    assert "no train dataset 'older'; expected one of: none" in data.err


def test_the_configuration_gives_the_defaults() -> None:
    """What the file says must be what the class and the recipe say."""
    from tailor_fast.integrations import fusion_bench_config

    folder = Path(fusion_bench_config.__file__).parent
    body = yaml.safe_load((folder / "method" / "model_tailor.yaml").read_text())
    assert Recipe(**body["recipe"]) == Recipe()
    assert json.dumps([body["samples"], body["batch_size"]]) == "[128, 8]"


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fusion_bench", None)
    monkeypatch.delitem(sys.modules, "tailor_fast.integrations.fusion_bench", raising=False)
    with pytest.raises(UsageError, match=r"^fusion_bench cannot be .*\[fusion-bench\]'$"):
        __import__("tailor_fast.integrations.fusion_bench")
