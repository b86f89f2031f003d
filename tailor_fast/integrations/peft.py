"""A model with trained adapters, in memory: its base and its tuned model, and the patch of the two.

::

    from tailor_fast.integrations.peft import tailor_peft

    result = tailor_peft(model, batches)  # model is the PeftModel as it was trained
    result.model.save_pretrained("OUT")

Nothing of ``model`` is changed. The base model shares its tensors; the tuned model shares all but
those of the layers that have an adapter, which PEFT merges as its ``merge_and_unload`` does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from tailor_fast._core.errors import InputError, UsageError
from tailor_fast.calibration.lockstep import Batch
from tailor_fast.integrations.extras import need
from tailor_fast.patching import Recipe, Tailored, tailor_model
from tailor_fast.patching.engine import Progress, silent

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["base_and_tuned", "tailor_peft"]

# Values of `init_lora_weights` that leave the base weights as they are.
_KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")


def tailor_peft(
    model: PeftModel,
    batches: Iterable[Batch] | None = None,
    recipe: Recipe | None = None,
    *,
    retain_batches: Iterable[Batch] | None = None,
    adapters: Sequence[str] | None = None,
    progress: Progress = silent,
) -> Tailored:
    """Repair the forgetting of a model that was tuned with adapters (LoRA and others that merge).

    Args:
        model: the tuned ``PeftModel``; unchanged.
        batches: as for ``tailor_model``; so are the arguments below.
        recipe: likewise.
        retain_batches: likewise.
        adapters: names of the adapters that make the tuned model; None takes the active ones.
        progress: likewise.

    Returns:
        ``Tailored(model, patch, report)``, where the model is a plain one without adapters.

    Raises:
        InputError: the base weights cannot be had from ``model``.
        UsageError: PEFT is not installed, no adapter is named or active, or as ``tailor_model``.
        TypeError: ``model`` is no ``PeftModel``.
    """
    base, tuned = base_and_tuned(model, adapters)
    return tailor_model(
        base, tuned, batches, recipe, retain_batches=retain_batches, progress=progress
    )


def base_and_tuned(
    model: PeftModel, adapters: Sequence[str] | None = None
) -> tuple[nn.Module, nn.Module]:
    """Take a model with adapters apart, without changing it.

    Args:
        model: the tuned ``PeftModel``.
        adapters: names of the adapters to merge; None takes the active ones.

    Returns:
        The base model, whose tensors are those of ``model``, and the tuned one, which shares what
        no adapter changes. Write to neither.

    Raises:
        InputError, UsageError, TypeError: as ``tailor_peft``.
    """
    _check_mergeable(model)
    _check_recoverable(model)
    tuned = merged_copy(model, adapters)
    base = _copied(model, shared=True)
    wrapper = need("peft.utils.other", "peft").ModulesToSaveWrapper
    for name, module in list(base.named_modules()):
        # `unload` would leave the trained module in place of the original one.
        if isinstance(module, wrapper):
            base.set_submodule(name, module.original_module)
    plain = base.unload()
    _check_base_untrained(plain)
    return cast("nn.Module", plain), tuned


def merged_copy(model: PeftModel, adapters: Sequence[str] | None = None) -> nn.Module:
    """The tuned model alone, without adapters; see ``base_and_tuned``.

    Raises:
        InputError: the adapters cannot be merged into the weights.
        UsageError, TypeError: as ``tailor_peft``.
    """
    _check_mergeable(model)
    names = _chosen(model, adapters)
    merged = _copied(model, shared=False).merge_and_unload(adapter_names=list(names))
    return cast("nn.Module", merged)


def _chosen(model: Any, adapters: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the adapters, each of which exists."""
    known = list(model.peft_config)
    names = tuple(model.active_adapters if adapters is None else adapters)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        got = ", ".join(map(repr, unknown)) or "none"
        raise UsageError(
            f"adapters must be among {', '.join(map(repr, known))}; got {got}; name one of them, or"
            " activate one with set_adapter"
        )
    return names


def _check_mergeable(model: Any) -> None:
    peft, layers = need("peft", "peft"), need("peft.tuners.tuners_utils", "peft")
    if not isinstance(model, peft.PeftModel):
        raise TypeError(
            f"tailor_peft: model must be a PeftModel; got {type(model).__name__}. Hint: two plain"
            " models go to tailor_fast.tailor_model"
        )
    if not isinstance(model.base_model, layers.BaseTuner):
        kind = next(iter(model.peft_config.values())).peft_type
        raise InputError(
            f"the adapter is of type {getattr(kind, 'value', kind)}, which changes no weight;"
            " expected one that can be merged into the weights, such as LoRA"
        )
    for name, layer in _tuner_layers(model):
        weight = getattr(layer.get_base_layer(), "weight", None)
        if weight is not None and not weight.is_floating_point():
            raise InputError(
                f"{name}: its base weight is quantised ({weight.dtype}); expected floats; load the"
                " base model without quantisation and attach the adapter to it"
            )


def _check_recoverable(model: Any) -> None:
    """Check that the base weights are still in the model."""
    remedy = "load the base model again and give both to tailor_fast.tailor_model"
    for name, config in model.peft_config.items():
        bias, init = getattr(config, "bias", "none"), getattr(config, "init_lora_weights", True)
        if bias != "none":
            raise InputError(
                f"adapter {name!r} was trained with bias {bias!r}, which overwrites the base"
                f" model's biases; expected bias 'none'; {remedy}"
            )
        if init not in _KEEPS_BASE:
            raise InputError(
                f"adapter {name!r} was started with init_lora_weights {init!r}, which may change"
                f" the base weights; expected one of {_KEEPS_BASE}; {remedy}"
            )
    for name, layer in _tuner_layers(model):
        if layer.merged:
            raise InputError(
                f"{name}: an adapter is merged into its weight, whose base words are lost to"
                " rounding; expected unmerged adapters; load the base model again and attach them"
            )


def _tuner_layers(model: Any) -> list[tuple[str, Any]]:
    kind = need("peft.tuners.tuners_utils", "peft").BaseTunerLayer
    modules = model.base_model.named_modules()
    return [(name, module) for name, module in modules if isinstance(module, kind)]


def _copied(model: Any, *, shared: bool) -> Any:
    """Copy the module tree around the same tensors, but for those that a merge writes to."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    if not shared:
        for _, layer in _tuner_layers(model):
            for tensor in layer.get_base_layer().parameters():
                tensors.pop(id(tensor), None)
    return copy.deepcopy(model, tensors)


def _check_base_untrained(base: nn.Module) -> None:
    """What trains outside the adapters has no base words any more."""
    trained = [name for name, tensor in base.named_parameters() if tensor.requires_grad]
    if trained:
        raise InputError(
            f"{len(trained)} parameters outside the adapters are trained as well"
            f" ({', '.join(trained[:3])}), so that their base words are lost; expected frozen ones;"
            " name their modules in modules_to_save, or give both models to"
            " tailor_fast.tailor_model"
        )
