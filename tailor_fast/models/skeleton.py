"""A transformers model without its weights, and how the names on disk map to its parameters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tailor_fast._core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def build_skeleton(directory: Path) -> PreTrainedModel:
    """Build the model that ``config.json`` names, with parameters on ``meta`` and real buffers.

    Buffers that are not on disk (rotary frequencies, masks) are computed by the constructors as in
    ``from_pretrained``. Nothing is fetched and no remote code runs.

    Raises:
        InputError: there is no usable ``config.json``, or transformers has no such class.
    """
    import transformers
    from transformers import AutoConfig, initialization

    path = directory / "config.json"
    try:
        named = json.loads(path.read_text(encoding="utf-8")).get("architectures") or []
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(
            f"{path}: the model's configuration cannot be read ({error}); expected the config.json"
            " that save_pretrained writes"
        ) from None
    kind = getattr(transformers, named[0], None) if named else None
    if kind is None:
        raise InputError(
            f"{path}: architectures is {named}; expected the name of a model class of transformers"
            f" {transformers.__version__}; patch without calibration data, or with statistics"
        )
    config = AutoConfig.from_pretrained(directory, local_files_only=True)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    with _default_dtype(dtype), _parameters_on_meta(), initialization.no_init_weights():
        model: PreTrainedModel = kind(config)
    model.tie_weights()
    model.train(False)
    return model


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Put each parameter on ``meta`` as it is registered; buffers stay what they are.

    ``torch.device("meta")`` would lose the buffers that constructors compute.
    """
    original = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(module, name, parameter)
        if parameter is not None:
            empty = parameter.detach().to("meta")
            module._parameters[name] = nn.Parameter(empty, requires_grad=False)

    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]  # undone below
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]  # the method itself


def map_keys(model: PreTrainedModel, disk_names: Iterable[str], where: str) -> dict[str, str]:
    """Map each parameter or buffer of ``model`` to its name on disk, by transformers' own rules.

    Args:
        model: the model, its tensors may be on ``meta``.
        disk_names: tensor names in the checkpoint.
        where: the checkpoint's path, for messages.

    Returns:
        State-dict name -> name on disk. Names on disk that the model does not know are left out.

    Raises:
        InputError: a weight is stored in another form than the model holds it (several tensors
            merged into one), or two names on disk mean one parameter.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    state: dict[str, Any] = model.state_dict()
    prefix = model.base_model_prefix
    keys: dict[str, str] = {}
    for name in disk_names:
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = name, None
        if key not in state:
            continue
        if pattern is not None:
            raise InputError(
                f"{where}: {name} is stored in another form than {key} is held in memory; expected"
                " one tensor per parameter; patch without calibration data"
            )
        if key in keys:
            raise InputError(
                f"{where}: {name} and {keys[key]} both mean {key}; expected one of them"
            )
        keys[key] = name
    _add_tied(model, keys)
    return keys


def _add_tied(model: nn.Module, keys: dict[str, str]) -> None:
    """Give a parameter that shares another's storage the other's name on disk."""
    owners: dict[int, str] = {}
    shared = list(model.named_parameters(remove_duplicate=False))
    for name, parameter in shared:
        if name in keys:
            owners.setdefault(id(parameter), keys[name])
    for name, parameter in shared:
        if name not in keys and id(parameter) in owners:
            keys[name] = owners[id(parameter)]
