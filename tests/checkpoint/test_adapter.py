"""An adapter as a view: the words of the merged model whatever range is read, or one sentence."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tailor_fast.checkpoint import (
    TensorSource,
    adapter_view,
    open_checkpoint,
    open_tuned,
)
from tailor_fast.testing import assert_within
from tests.checkpoint.adapters import PREFIX, factors, save_adapter, save_base

Tensors = dict[str, torch.Tensor]


def no_names(*_: object) -> dict[str, str]:
    return {}


@contextmanager
def opened(base: Path, adapter: Path, renamed: Any = no_names) -> Iterator[TensorSource]:
    with open_checkpoint(base) as source, open_tuned(adapter, source, renamed) as view:
        yield view


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def product(changed: Tensors, module: str, kind: str = "") -> torch.Tensor:
    down, up = (changed[f"{module}.lora_{kind}{end}"].double() for end in ("A", "B"))
    return up @ down


def plain(base: Tensors, changed: Tensors, scale: float) -> torch.Tensor:
    down, up = (changed[f"q.lora_{end}.weight"].double() for end in "AB")
    return base["q.weight"].double() + scale * (up @ down)


# name -> (base, adapter, configuration, tensor, the merged tensor in float64)
Case = tuple[Tensors, Tensors, dict[str, Any], str, Callable[[Tensors, Tensors], torch.Tensor]]


def _lora(dtype: torch.dtype, scale: float, **config: Any) -> Case:
    base, changed = {"q.weight": random(37, 24, dtype=dtype)}, factors("q", 37, 24)
    return base, changed, config, "q.weight", lambda b, c: plain(b, c, scale)


def _swapped(rows: int, cols: int, **config: Any) -> Case:
    def merged(base: Tensors, changed: Tensors) -> torch.Tensor:
        down, up = (changed[f"q.lora_{end}.weight"].double() for end in "AB")
        return base["q.weight"].double() + 2.0 * (up @ down).T

    return {"q.weight": random(cols, rows)}, factors("q", rows, cols), config, "q.weight", merged


def _embedding() -> Case:
    changed = {"e.lora_embedding_A": torch.randn(2, 50), "e.lora_embedding_B": torch.randn(12, 2)}

    def merged(base: Tensors, changed: Tensors) -> torch.Tensor:
        down, up = (changed[f"e.lora_embedding_{end}"].double() for end in "AB")
        return base["e.weight"].double() + 2.0 * (up @ down).T

    return {"e.weight": random(50, 12)}, changed, {}, "e.weight", merged


def _dora() -> Case:
    changed = factors("q", 37, 24) | {"q.lora_magnitude_vector": torch.rand(37) + 0.5}

    def merged(base: Tensors, changed: Tensors) -> torch.Tensor:
        weight = plain(base, changed, 2.0)
        lengths = changed["q.lora_magnitude_vector"].double()
        return weight * (lengths / weight.norm(dim=1)).unsqueeze(1)

    return {"q.weight": random(37, 24)}, changed, {"use_dora": True}, "q.weight", merged


def _bias() -> Case:
    base = {"q.weight": random(8, 6), "q.bias": random(8)}
    changed = factors("q", 8, 6) | {"q.lora_B.bias": torch.randn(8)}

    def merged(base: Tensors, changed: Tensors) -> torch.Tensor:
        return base["q.bias"].double() + 2.0 * changed["q.lora_B.bias"].double()

    return base, changed, {"lora_bias": True}, "q.bias", merged


def _whole(key: str, dtype: torch.dtype) -> Case:
    base = {"q.weight": random(8, 6), "conv.weight": random(5, 3, 2, 2)}
    changed = factors("q", 8, 6) | {key: random(5, 3, 2, 2, dtype=dtype)}
    return base, changed, {}, "conv.weight", lambda _, c: c[key].double()


CASES: dict[str, Callable[[], Case]] = {
    "bf16": lambda: _lora(torch.bfloat16, 2.0),
    "fp16": lambda: _lora(torch.float16, 2.0),
    "fp32": lambda: _lora(torch.float32, 2.0),
    "rslora": lambda: _lora(torch.bfloat16, 4 / math.sqrt(2), use_rslora=True),
    "alpha of a pattern": lambda: _lora(torch.bfloat16, 3.5, alpha_pattern={"q": 7}),
    "rank of a pattern": lambda: _lora(torch.bfloat16, 2.0, r=9, rank_pattern={"q": 2}),
    "a pattern of another layer": lambda: _lora(torch.bfloat16, 2.0, alpha_pattern={"x|qq": 7}),
    "stored the other way round": lambda: _swapped(10, 24, fan_in_fan_out=True),
    "square, so by the flag": lambda: _swapped(16, 16, fan_in_fan_out=True),
    "shape against the flag": lambda: _swapped(10, 24, fan_in_fan_out=False),
    "embedding": _embedding,
    "dora": _dora,
    "bias of B": _bias,
    "whole, as it is": lambda: _whole("conv.weight", torch.bfloat16),
    "whole, in fp32": lambda: _whole("conv.modules_to_save.default.weight", torch.float32),
    "whole, of a wrapped layer": lambda: _whole("conv.base_layer.weight", torch.float32),
}


@pytest.mark.parametrize("block", [1 << 19, 50])
@pytest.mark.parametrize("name", CASES)
def test_the_merged_words(
    name: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_view, "BLOCK_ELEMENTS", block)
    base, changed, config, tensor, merged = CASES[name]()
    paths = save_base(tmp_path / "base", base), save_adapter(tmp_path / "lora", changed, **config)
    expected = merged(base, changed)
    with opened(*paths) as view:
        got = view.read(tensor)
        assert got.dtype == base[tensor].dtype
        # Rounded once: as near as the exact result, rounded to that dtype, is.
        assert_within(got, expected, expected.float().to(got.dtype), got.dtype)
        assert not torch.equal(got, base[tensor])
        assert tensor not in view.inherited
        assert view.tensors.keys() == base.keys()


@settings(max_examples=30)
@given(st.data())
def test_any_range_is_that_part_of_the_whole(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("ranges")
    base = {"q.weight": random(23, 7), "left.weight": random(4, 4)}
    changed = factors("q", 23, 7)
    paths = save_base(folder / "base", base), save_adapter(folder / "lora", changed)
    with pytest.MonkeyPatch.context() as patch, opened(*paths) as view:
        patch.setattr(adapter_view, "BLOCK_ELEMENTS", data.draw(st.integers(1, 200)))
        for name in ("q.weight", "left.weight", "q.weight"):
            whole = bytearray(view.tensors[name].nbytes)
            view.read_into(name, whole)
            for _ in range(4):
                begin = data.draw(st.integers(0, len(whole)))
                end = data.draw(st.integers(begin, len(whole)))
                part = bytearray(end - begin)
                assert view.read_into(name, part, begin, end) == len(part)
                assert part == whole[begin:end]
        with pytest.raises(ValueError, match="range must lie in"):
            view.read_into("q.weight", bytearray(1000), 0, 1000)


def test_what_is_read_in_order_is_computed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter_view, "BLOCK_ELEMENTS", 40)  # 4 rows of 10, 80 bytes
    made: list[tuple[int, int]] = []
    made_rows = adapter_view.AdapterView._made

    def counted(self: Any, info: Any, change: Any, first: int, last: int) -> torch.Tensor:
        made.append((first, last))
        return made_rows(self, info, change, first, last)

    monkeypatch.setattr(adapter_view.AdapterView, "_made", counted)
    base = save_base(tmp_path / "base", {"q.weight": random(18, 10)})
    with opened(base, save_adapter(tmp_path / "lora", factors("q", 18, 10))) as view:
        for begin in range(0, 360, 48):  # ends within rows and within blocks
            view.read_into("q.weight", bytearray(48), begin, min(360, begin + 48))
    assert made == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 18)]


@pytest.mark.parametrize("rank", [8, 64])
def test_the_words_do_not_depend_on_the_number_of_threads(
    rank: int, tmp_path: Path, set_num_threads: Callable[[int], None]
) -> None:
    base = save_base(tmp_path / "base", {"q.weight": random(700, 1000)})
    lora = save_adapter(tmp_path / "lora", factors("q", 700, 1000, rank), r=rank)
    words = []
    for threads in (1, 2):
        set_num_threads(threads)
        with opened(base, lora) as view:
            words.append(view.read("q.weight"))
    assert torch.equal(*words)


def test_what_it_leaves_and_what_it_adds(tmp_path: Path) -> None:
    base = {"q.weight": random(8, 6), "k.weight": random(4, 6), "ids": torch.arange(3)}
    lora = save_adapter(tmp_path / "lora", factors("q", 8, 6))
    projector = random(3, 2)
    save_file({f"{PREFIX}mm_projector.weight": projector}, lora / "non_lora_trainables.safetensors")
    with opened(save_base(tmp_path / "base", base), lora) as view:
        assert view.inherited == {"k.weight", "ids"}
        assert torch.equal(view.read("ids"), base["ids"])
        assert list(view.tensors) == [*sorted(base), "mm_projector.weight"]
        assert torch.equal(view.read("mm_projector.weight"), projector)
        assert view.path_of("mm_projector.weight").name == "non_lora_trainables.safetensors"
        assert view.path_of("k.weight").name == "model.safetensors"
        assert [shard.path.parent for shard in view.shards] == [lora, lora]


def test_names_that_only_the_models_class_can_translate(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", {"language_model.model.q.weight": random(8, 6)})
    lora = save_adapter(tmp_path / "lora", factors("model.language_model.q", 8, 6))
    asked = []

    def renamed(directory: Path, stored: Iterable[str], others: Iterable[str]) -> Mapping[str, str]:
        asked.append((directory, list(stored), list(others)))
        return {"model.language_model.q.weight": "language_model.model.q.weight"}

    with opened(base, lora, renamed) as view:
        assert not view.inherited
    stored, other = "language_model.model.q.weight", "model.language_model.q.weight"
    assert asked == [(base, [stored], [other])]


def test_which_files_speak_for_the_merged_model(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", {"q.weight": random(8, 6)})
    lora = save_adapter(tmp_path / "lora", factors("q", 8, 6))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "merges.txt"):
        (base / name).write_text("base")
    with opened(base, lora) as view:
        assert view.directory == view.processor_directory == base
    for name in ("tokenizer.json", "tokenizer_config.json", "trainer_state.json", "notes.txt"):
        (lora / name).write_text("adapter")
    with opened(base, lora) as view:
        assert view.directory == base
        assert view.processor_directory == lora
        assert [(path.name, path.parent) for path in view.side_files] == [
            ("config.json", base),
            ("merges.txt", base),
            ("tokenizer.json", lora),
            ("tokenizer_config.json", lora),
        ]
        assert view.settings == (lora / "adapter_config.json",)
    (base / "preprocessor_config.json").write_text("base")
    (lora / "config.json").write_text("adapter")
    with opened(base, lora) as view:
        assert view.directory == lora
        assert view.processor_directory == base  # the adapter has no processor, its model needs one
