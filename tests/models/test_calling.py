"""How calibration calls a model: without a cache, and up to the head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.quality import tinyllava
from tailor_fast.models import caller
from tests.patching.disk import llama


@pytest.mark.parametrize(
    ("make", "attention"),
    [
        (lambda: llama(blocks=1), "model.layers.0.self_attn"),
        (lambda: tinyllava.new_model(6), "model.language_model.layers.0.self_attn"),
    ],
)
def test_no_cache_of_keys_and_values_is_kept(make: Callable[[], Any], attention: str) -> None:
    """LLaVA's forward names no ``use_cache``, but hands it on."""
    model, seen = make().eval(), list[Any]()
    model.get_submodule(attention).register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs.get("past_key_values")), with_kwargs=True
    )
    with torch.no_grad():
        assert caller(model)(model, {"input_ids": torch.tensor([[4, 5, 6]])}) is None
    assert seen == [None]


def test_a_plain_module_gets_no_keyword_that_it_does_not_know() -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor, **others: Any) -> torch.Tensor:
            assert others == {}
            return x + 1

    module = Plain()
    answer = caller(module)(module, torch.zeros(2))
    assert isinstance(answer, torch.Tensor)
    assert answer.tolist() == [1.0, 1.0]
