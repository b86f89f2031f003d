"""The modifier ``ModelTailorModifier`` for llm-compressor.

::

    from llmcompressor import oneshot
    from tailor_fast.integrations.llmcompressor import ModelTailorModifier

    recipe = ModelTailorModifier(base_model="BASE", density=0.1)
    oneshot(model=tuned, recipe=recipe, dataset=..., pipeline="sequential")

Importing this module also makes ``ModelTailorModifier`` known to recipes in YAML. llm-compressor
runs the model block by block on what the patched blocks before it answer; this is ``tailor_model``
with
``propagate="sequential"`` and ``group="block"``. Padding counts as llm-compressor hands it to the
layers, but for tokens that its ``loss_mask`` leaves out (``use_loss_mask=True``).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import PrivateAttr
from torch import nn

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.calibration.moments import Moments
from tailor_fast.checkpoint import Checkpoint, local_path, open_checkpoint
from tailor_fast.integrations.extras import need
from tailor_fast.integrations.tensorwise import recipe_from
from tailor_fast.models import Target, find_targets, map_keys, weight_view
from tailor_fast.ops.gram import accumulate_gram_
from tailor_fast.patching import Recipe, Report
from tailor_fast.patching.inputs import Given, resolve
from tailor_fast.patching.layers import LayerPair
from tailor_fast.patching.masks import Masks
from tailor_fast.patching.scores import column_weight
from tailor_fast.patching.solving import GroupInputs, left_at_base, solve_layer

_Modifier: Any = need("llmcompressor.modifiers", "llmcompressor").Modifier
_offload = need("compressed_tensors.offload", "llmcompressor")

__all__ = ["ModelTailorModifier"]


@dataclass
class _Sums:
    """Sums over the inputs of the layers that are called with the same tensors."""

    members: list[str]
    gram: torch.Tensor
    total: torch.Tensor
    tokens: int = 0

    def moments(self) -> Moments:
        gram, mean = self.gram / self.tokens, self.total / self.tokens
        return Moments(gram, mean, gram.diagonal().clone(), None, None, None, self.tokens)


class ModelTailorModifier(_Modifier):  # type: ignore[misc]  # llm-compressor is optional
    """Tailors the model that llm-compressor runs against its base.

    Attributes:
        base_model: directory of the base checkpoint, or its hub name in the local cache.
        density: as in ``tailor_fast.Recipe``; so are the fields below, where None is its default.
    """

    requires_calibration_data: bool = True
    base_model: str
    density: float | None = None
    salience_weight: float | None = None
    sensitivity: str | None = None
    normalize: str | None = None
    scope: str | None = None
    decorate: str | None = None
    percdamp: float | None = None
    untouched: str | None = None
    targets: str | None = None
    ignore: str | None = None
    layers: str | None = None

    _report: Report = PrivateAttr(default_factory=lambda: Report({}))
    _recipe: Recipe = PrivateAttr(default_factory=Recipe)
    _base: Checkpoint | None = PrivateAttr(default=None)
    _keys: dict[str, str] = PrivateAttr(default_factory=dict)
    _targets: dict[str, Target] = PrivateAttr(default_factory=dict)
    _names: dict[nn.Module, str] = PrivateAttr(default_factory=dict)
    _tuned_biases: dict[str, torch.Tensor] = PrivateAttr(default_factory=dict)
    _sums: dict[str, _Sums] = PrivateAttr(default_factory=dict)  # by layer; groups share one
    _last: tuple[torch.Tensor | None, str] = PrivateAttr(default=(None, ""))

    @property
    def report(self) -> Report:
        """What was done so far, layer by layer."""
        return self._report

    def on_initialize(self, state: Any, **kwargs: Any) -> bool:  # noqa: ARG002  their signature
        """Open the base and put everything back to it that no patch will hold.

        Raises:
            InputError: the base does not hold this model.
            UsageError: the recipe contradicts itself, or asks for what one pass cannot give.
        """
        own = ModelTailorModifier.__annotations__  # their base class has a `group`, too
        fields = {name: getattr(self, name) for name in Recipe.model_fields if name in own}
        recipe = recipe_from(fields, "ModelTailorModifier")
        if recipe.scope in ("layer", "global"):
            raise UsageError(
                f"ModelTailorModifier: scope {recipe.scope!r} needs a pass of its own; expected"
                " scope 'tensor', 'row' or 'block'; use tailor_fast.tailor_model"
            )
        self._report = Report(recipe.model_dump())
        recipe = recipe.model_copy(update={"propagate": "sequential", "group": "block"})
        self._recipe = resolve(recipe, Given(samples=True), self._report)
        model = state.model
        path: Path = local_path(self.base_model)
        self._base = open_checkpoint(path)
        self._keys = map_keys(model, self._base.tensors, str(path))
        self._check(model, path)
        self._targets = {t.name: t for t in find_targets(model, recipe.selects)}
        self._names = {model.get_submodule(name): name for name in self._targets}
        for module, name in self._names.items():
            bias = getattr(module, "bias", None)
            if bias is not None:
                self._tuned_biases[name] = bias.detach().clone()
        if recipe.untouched == "base":
            patched = {f"{name}.weight" for name in self._targets}
            self._revert(model, (n for n, _ in model.named_parameters() if n not in patched))
        return True

    def on_calibration_start(self, state: Any, event: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Watch the inputs of every layer that will be patched."""

        def watch(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self._take(self._names[module], args[0], state)

        for module in self._names:
            self.register_hook(module, watch, "forward_pre")

    def on_sequential_epoch_end(
        self,
        state: Any,
        event: Any,  # noqa: ARG002
        modules: Iterable[nn.Module],
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        """Patch the layers of a part of the model that every batch has passed."""
        self._last = (None, "")
        with torch.no_grad():
            for name in [self._names[m] for m in modules if m in self._names]:
                sums = self._sums.pop(name, None)
                if sums is not None and sums.tokens:
                    self._patch(state.model, name, sums)

    def on_calibration_end(self, state: Any, event: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Put layers back to base that no token reached."""
        self.remove_hooks()
        done = {row.name for row in self._report.linears}
        for name in (n for n in self._targets if n not in done):
            self._revert(state.model, [f"{name}.weight"])
            pair = self._pair(state.model, name)
            note = "left at base: no counted token reaches it"
            self._report.linears.append(left_at_base(self._targets[name], pair, note))
        self._sums.clear()

    def on_finalize(self, state: Any, **kwargs: Any) -> bool:  # noqa: ARG002
        """Close the base."""
        if self._base is not None:
            self._base.close()
        return True

    def _check(self, model: nn.Module, path: Path) -> None:
        tensors = self._opened.tensors
        for name, parameter in model.named_parameters():
            info = tensors.get(self._keys.get(name, ""))
            if info is None or tuple(parameter.shape) != info.shape:
                found = "nothing" if info is None else f"{list(info.shape)}"
                raise InputError(
                    f"{path}: has {found} for {name} {list(parameter.shape)}; expected the base of"
                    " the model that is given; name the right base_model"
                )

    @property
    def _opened(self) -> Checkpoint:
        if self._base is None:
            raise RuntimeError("the modifier is not initialised")
        return self._base

    def _read(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return self._opened.read(self._keys[name]).to(like.device, like.dtype)

    def _revert(self, model: nn.Module, names: Iterable[str]) -> None:
        for name in names:
            module, _, leaf = name.rpartition(".")
            _write(model.get_submodule(module), leaf, self._read(name, model.get_parameter(name)))

    def _take(self, name: str, x: torch.Tensor, state: Any) -> None:
        """Add a layer's input to its group's sums: once, however many layers it goes to."""
        last, leader = self._last
        if last is x and leader in self._sums:
            group = self._sums[leader]
            if self._sums.setdefault(name, group) is group:
                return
        self._last = (x, name)
        cols = x.shape[-1]
        if name not in self._sums:
            gram = torch.zeros(cols, cols, device=x.device)
            self._sums[name] = _Sums([name], gram, torch.zeros(cols, device=x.device))
        sums = self._sums[name]
        flat = x.detach().reshape(-1, cols)
        mask = _loss_mask(state, x)
        if mask is not None:
            flat = flat[mask]
        accumulate_gram_(sums.gram, flat.contiguous())
        sums.total += flat.float().sum(0)
        sums.tokens += len(flat)

    def _pair(self, model: nn.Module, name: str) -> LayerPair:
        module, target = model.get_submodule(name), self._targets[name]
        tuned = weight_view(module, target.transposed)
        base = self._read(f"{name}.weight", tuned)
        bias = self._tuned_biases.get(name)
        if bias is not None:
            bias = bias.to(tuned.device)
        old_bias = None if bias is None else self._read(f"{name}.bias", bias)
        turned = base.T.contiguous() if target.transposed else base
        return LayerPair(turned, tuned.contiguous(), old_bias, bias)

    def _patch(self, model: nn.Module, name: str, sums: _Sums) -> None:
        target, recipe = self._targets[name], self._recipe
        pair = self._pair(model, name)
        if torch.equal(pair.base, pair.tuned):
            self._report.linears.append(left_at_base(target, pair, "equal in both models"))
            return
        new, weight = sums.moments(), None
        if recipe.salience_weight != 1.0 and recipe.decorate != "official":
            weight = column_weight(recipe.sensitivity, new, None, recipe.percdamp, name)
        inputs = GroupInputs((name,), new, None, weight)
        made, row = solve_layer(target, pair, inputs, Masks(recipe, {}), recipe)
        row.tensor = self._keys[f"{name}.weight"]
        _write(model.get_submodule(name), "weight", made.T if target.transposed else made)
        self._report.linears.append(row)


def _write(module: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Write a parameter where it lies, on the device or offloaded."""
    _offload.update_offload_parameter(module, name, tensor.contiguous())


def _loss_mask(state: Any, x: torch.Tensor) -> torch.Tensor | None:
    """Which tokens of the current batch count, flat; None counts all."""
    masks = state.loss_masks
    if not masks or state.current_batch_idx < 0:
        return None
    mask = masks[state.current_batch_idx]
    if mask is None or mask.numel() != x[..., 0].numel():
        return None  # not the text's tokens: an image's, say
    return cast("torch.Tensor", mask.to(x.device).reshape(-1).bool())


need("llmcompressor.modifiers.factory", "llmcompressor").ModifierFactory.register(
    "ModelTailorModifier", ModelTailorModifier
)
