"""``tailor_model`` against a walk that runs the whole models anew for every layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.ops.codec import apply_patch_
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.tailor import tailor_model
from tailor_fast.testing import assert_within
from tests.patching.toys import Toy, pair, token_batches

LAYERS = [f"layers.{i}.{name}" for i in range(3) for name in ("gate", "up", "down")]


def inputs_of(model: nn.Module, name: str, batches) -> torch.Tensor:
    """All counted inputs of one layer over plain forward passes, fp64 ``[tokens, cols]``."""
    seen = []
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _m, args: seen.append(args[0].detach()))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    masks = [batch["attention_mask"].bool() for batch in batches]
    return torch.cat([x[mask] for x, mask in zip(seen, masks, strict=True)]).double()


def solve_densely(mask, w0, w1, streams, damping, retain_scale) -> torch.Tensor:
    """Minimiser of equation (6) with base biases, row by row in fp64."""
    x_t, x_p, x_b, x_q = streams
    tokens = len(x_p)
    d = w1 - w0
    a = x_p.T @ x_p / tokens + damping * torch.eye(d.shape[1], dtype=torch.float64)
    b = (x_t @ w1.T - x_p @ w0.T).T @ x_p / tokens + damping * d
    if x_b is not None:
        a += retain_scale * x_q.T @ x_q / len(x_q)
        b += retain_scale * (x_b @ w0.T - x_q @ w0.T).T @ x_q / len(x_q)
    patch = torch.zeros_like(d)
    for row in range(len(d)):
        k = mask[row].nonzero().flatten()
        if len(k):
            patch[row, k] = torch.linalg.solve(a[k][:, k], b[row, k])
    return patch


@pytest.mark.parametrize("propagate", ["asymmetric", "sequential", "none"])
@pytest.mark.parametrize("retain", [False, True])
def test_every_layer_is_the_minimiser_on_its_own_inputs(propagate: str, retain: bool) -> None:
    base, tuned = pair(Toy(bias=False))
    new = token_batches(seed=2)
    old = token_batches(seed=3) if retain else None
    recipe = Recipe(density=0.4, propagate=propagate, retain_weight=0.5)
    result = tailor_model(base, tuned, new, recipe, retain_batches=old)
    rows = {row.name: row for row in result.report.linears}
    assert list(rows) == LAYERS

    walk = copy.deepcopy(base)  # patched up to the layer at hand, by this test alone
    for name in LAYERS:
        w0 = base.get_submodule(name).weight.detach().double()
        w1 = tuned.get_submodule(name).weight.detach().double()
        x_t, x_p = inputs_of(tuned, name, new), inputs_of(walk, name, new)
        x_b = x_q = None
        if old is not None:
            x_b = inputs_of(base, name, old)
            x_q = x_b if propagate == "none" else inputs_of(walk, name, old)
        if propagate == "none":
            x_p = x_t
        elif propagate == "sequential":
            x_t = x_p
        damping = 0.01 * x_p.square().mean(0).mean().item()
        assert rows[name].damping == pytest.approx(damping, rel=1e-5)
        scale = 0.0
        if x_b is not None:
            scale = 0.5 * (x_p.square().mean() + damping).item() / x_b.square().mean().item()
            assert rows[name].retain_scale == pytest.approx(scale, rel=1e-5)
        written = result.model.get_submodule(name).weight.detach()
        mask = written != base.get_submodule(name).weight
        assert int(mask.sum()) == rows[name].kept == int(0.4 * w0.numel())
        patch = solve_densely(mask, w0, w1, (x_t, x_p, x_b, x_q), damping, scale)
        # The solver may end 1e-4 above the minimum of a quadratic: the patch is 1e-2 from it.
        error = (written.double() - w0 - patch).norm() / patch.norm()
        assert error < 1e-2, name
        with torch.no_grad():
            walk.get_submodule(name).weight.copy_(written)


def test_inputs_are_unchanged_and_the_patch_is_what_changed() -> None:
    base, tuned = pair(Toy())
    base.train()
    before = [copy.deepcopy(model.state_dict()) for model in (base, tuned)]
    result = tailor_model(base, tuned, token_batches(), Recipe(), retain_batches=token_batches())
    for model, state in zip((base, tuned), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert not model._forward_pre_hooks
        assert all(not module._forward_pre_hooks for module in model.modules())
    assert base.training
    assert base.layers[0].gate.training
    after = dict(result.model.named_parameters())
    assert set(result.patch) == {f"{name}.weight" for name in LAYERS}
    for name, parameter in base.named_parameters():
        words = parameter.detach().clone()
        if name in result.patch:
            apply_patch_(words, result.patch[name])
        assert torch.equal(words, after[name])


def test_untouched_parameters_come_from_where_the_recipe_says() -> None:
    base, tuned = pair(Toy())
    for source, model in (("base", base), ("tuned", tuned)):
        result = tailor_model(base, tuned, token_batches(), Recipe(untouched=source))
        patched, original = result.model.state_dict(), model.state_dict()
        for name in ("embed.weight", "layers.1.norm.weight", "layers.1.down.bias", "head.weight"):
            assert torch.equal(patched[name], original[name])


def test_a_result_prints_in_one_line() -> None:
    base, tuned = pair(Toy())
    result = tailor_model(base, tuned, None, Recipe(density=0.1))
    report = result.report
    assert repr(result).startswith(
        f"Tailored(model=Toy, patch of {len(LAYERS)} tensors, report=Report(kept {report.kept} of"
        f" {report.targeted} weights in {len(LAYERS)} layers, seconds="
    )
    assert repr(result).endswith("notes=['no data: salience only, nothing decorated']))")


def test_padding_never_counts() -> None:
    base, tuned = pair(Toy())
    batches = token_batches()
    other = [dict(batch) for batch in batches]
    for batch in other:
        batch["input_ids"] = torch.where(batch["attention_mask"].bool(), batch["input_ids"], 7)
    first, second = (tailor_model(base, tuned, data, Recipe()).model for data in (batches, other))
    for name in LAYERS:
        assert torch.equal(first.get_submodule(name).weight, second.get_submodule(name).weight)


def test_losses_are_ordered() -> None:
    base, tuned = pair(Toy(width=24, hidden=48))
    report = tailor_model(base, tuned, token_batches(6), Recipe()).report
    for row in report.linears:
        assert row.loss is not None
        assert 0.0 <= row.loss <= row.loss_undecorated * (1 + 1e-6)
        assert row.loss < row.loss_reverted
        assert row.iterations > 0


@pytest.mark.parametrize("scope", ["tensor", "block", "row", "layer", "global"])
def test_scope_keeps_its_number_per_unit(scope: str) -> None:
    base, tuned = pair(Toy())
    recipe = Recipe(scope=scope, density=0.25)
    report = tailor_model(base, tuned, token_batches(), recipe).report
    kept = {row.name: row.kept for row in report.linears}
    sizes = {row.name: row.rows * row.cols for row in report.linears}
    if scope == "global":
        assert sum(kept.values()) == int(0.25 * sum(sizes.values()))
        assert len(set(kept.values())) > 3
    elif scope == "layer":
        for block in range(3):
            names = [name for name in kept if f"layers.{block}." in name]
            assert sum(kept[n] for n in names) == int(0.25 * sum(sizes[n] for n in names))
    else:
        assert all(kept[name] == int(0.25 * sizes[name]) for name in kept)


@pytest.mark.parametrize("decorate", ["exact", "obs", "official", "none"])
@pytest.mark.parametrize("group", ["input", "block"])
def test_decorations_and_groups_run(decorate: str, group: str) -> None:
    base, tuned = pair(Toy())
    recipe = Recipe(decorate=decorate, group=group, density=0.2)
    result = tailor_model(base, tuned, token_batches(), recipe)
    assert [row.name for row in result.report.linears] == LAYERS
    for name in LAYERS:
        changed = result.model.get_submodule(name).weight != base.get_submodule(name).weight
        assert 0 < int(changed.sum()) <= int(0.2 * changed.numel())


def test_block_groups_take_their_inputs_before_the_block_is_patched() -> None:
    base, tuned = pair(Toy(bias=False))
    batches = token_batches()
    recipe = Recipe(group="block", propagate="sequential", untouched="tuned")
    result = tailor_model(base, tuned, batches, recipe)
    by_input = tailor_model(base, tuned, batches, recipe.model_copy(update={"group": "input"}))
    # With tuned weights in the block, the input of `down` in block 0 is the tuned model's own.
    none = tailor_model(base, tuned, batches, recipe.model_copy(update={"propagate": "none"}))
    name = "layers.0.down"
    ours, tuned_inputs, patched_inputs = (
        run.model.get_submodule(name).weight for run in (result, none, by_input)
    )
    assert torch.equal(ours, tuned_inputs)
    assert not torch.equal(ours, patched_inputs)
    # Behind the block, patched outputs flow on: block 1 is scored on what block 0 became.
    later = "layers.1.gate"
    assert not torch.equal(*(run.model.get_submodule(later).weight for run in (result, none)))


def test_a_layer_called_twice_is_solved_without_propagation() -> None:
    class Twice(Toy):
        def forward(self, input_ids, attention_mask=None):
            x = self.embed(input_ids)
            for layer in self.layers:
                x = self.layers[0](layer(x))
            return self.head(x)

    base, tuned = pair(Twice(blocks=2))
    result = tailor_model(base, tuned, token_batches(), Recipe())
    notes = {row.name: row.note for row in result.report.linears}
    assert "called several times" in notes["layers.0.gate"]
    assert notes["layers.1.gate"] == ""
    changed = result.model.layers[0].gate.weight != base.layers[0].gate.weight
    assert int(changed.sum()) == int(0.1 * changed.numel())


def test_a_layer_that_no_batch_reaches_is_left_at_base() -> None:
    class Skips(Toy):
        def forward(self, input_ids, attention_mask=None):
            return self.head(self.layers[0](self.embed(input_ids)))

    base, tuned = pair(Skips(blocks=2))
    result = tailor_model(base, tuned, token_batches(), Recipe())
    row = next(row for row in result.report.linears if row.name == "layers.1.up")
    assert row.kept == 0
    assert "no batch runs through it" in row.note
    assert torch.equal(result.model.layers[1].up.weight, base.layers[1].up.weight)


def test_without_data_the_largest_changes_are_kept_as_they_are() -> None:
    base, tuned = pair(Toy())
    result = tailor_model(base, tuned, None, Recipe(normalize="none"))
    for name in LAYERS:
        w0, w1 = (model.get_submodule(name).weight for model in (base, tuned))
        changed = result.model.get_submodule(name).weight != w0
        assert int(changed.sum()) == int(0.1 * w0.numel())
        size = (w1 - w0).abs()
        assert size[changed].min() >= size[~changed].max()
    assert "salience only" in result.report.notes[0]


def test_bfloat16_models_are_patched_in_their_own_words() -> None:
    base, tuned = pair(Toy().to(torch.bfloat16))
    result = tailor_model(base, tuned, token_batches(), Recipe())
    for name in LAYERS:
        weight = result.model.get_submodule(name).weight
        assert weight.dtype == torch.bfloat16
        changed = int((weight != base.get_submodule(name).weight).sum())
        assert 0 < changed <= int(0.1 * weight.numel())


def test_same_bits_every_time() -> None:
    base, tuned = pair(Toy())
    first, second = (
        tailor_model(base, tuned, token_batches(), Recipe(), retain_batches=token_batches(seed=9))
        for _ in range(2)
    )
    for name in LAYERS:
        a, b = (run.model.get_submodule(name).weight for run in (first, second))
        assert_within(a, b.double(), b)
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sensitivity": "ratio"}, "sensitivity 'ratio' compares with old tasks"),
        ({"targets": "nothing"}, "no layer to patch: .* that targets 'nothing' leave"),
    ],
)
def test_recipes_that_cannot_run_are_refused(change, message: str) -> None:
    base, tuned = pair(Toy())
    with pytest.raises(UsageError, match=message):
        tailor_model(base, tuned, token_batches(), Recipe(**change))


@pytest.mark.parametrize(
    ("recipe", "kwargs", "message"),
    [
        (Recipe(decorate="obs"), {"retain": True}, "has no retention term"),
        (Recipe(decorate="official"), {"retain": True}, "has no retention term"),
        (Recipe(decorate="obs"), {"new": False}, "decorate 'obs' needs data"),
        (Recipe(propagate="asymmetric"), {"new": False}, "propagate 'asymmetric' needs data"),
        (Recipe(), {"new": False, "retain": True}, "old-task data is given without"),
        (Recipe(), {"empty": True}, "batches is empty"),
    ],
)
def test_data_that_does_not_fit_the_recipe_is_refused(recipe, kwargs, message: str) -> None:
    base, tuned = pair(Toy())
    new = token_batches() if kwargs.get("new", True) else None
    new = [] if kwargs.get("empty") else new
    old = token_batches() if kwargs.get("retain") else None
    with pytest.raises(UsageError, match=message):
        tailor_model(base, tuned, new, recipe, retain_batches=old)


def test_what_is_no_loaded_model_is_refused() -> None:
    base, tuned = pair(Toy())
    with pytest.raises(UsageError, match=r"^base_model must be a torch\.nn\.Module; got str; load"):
        tailor_model("BASE", tuned)
    with pytest.raises(UsageError, match=r"^tuned_model\.\S+ must hold values; it is on the meta"):
        tailor_model(base, copy.deepcopy(tuned).to("meta"))


def test_inference_mode_is_refused_and_no_grad_is_not() -> None:
    base, tuned = pair(Toy())
    with (
        torch.inference_mode(),
        pytest.raises(UsageError, match=r"under torch\.inference_mode; call"),
    ):
        tailor_model(base, tuned, token_batches())
    with torch.no_grad():
        assert tailor_model(base, tuned, token_batches()).patch


def test_models_that_do_not_match_are_refused() -> None:
    base, _ = pair(Toy())
    with pytest.raises(InputError, match="in the base model only"):
        tailor_model(base, Toy(blocks=2), token_batches())
    with pytest.raises(InputError, match=r"layers\.0\.gate\.weight differs"):
        tailor_model(base, Toy(hidden=8), token_batches())


def test_activations_that_are_not_finite_are_refused() -> None:
    base, tuned = pair(Toy())
    with torch.no_grad():
        tuned.embed.weight[5] = float("inf")
        base.embed.weight[5] = float("inf")
    with pytest.raises(InputError, match=r"layers\.0\.gate.*is not finite at token"):
        tailor_model(base, tuned, token_batches())


def test_a_mask_of_another_length_is_refused() -> None:
    base, tuned = pair(Toy())
    batches = token_batches()
    batches[0]["attention_mask"] = batches[0]["attention_mask"][:, :-1]
    with pytest.raises(InputError, match="matches no mask of the batch"):
        tailor_model(base, tuned, batches)
