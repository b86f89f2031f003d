"""A transformers model without its weights, and how the names on disk map to its parameters."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tailor_fast._core.errors import InputError
from tailor_fast._core.regular_file import read_regular
from tailor_fast.models.experts import SplitExperts, fused_targets, split_
from tailor_fast.models.original import ORIGINAL_CLASSES

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter


def build_skeleton(directory: Path) -> PreTrainedModel:
    """Build the model that ``config.json`` names, with parameters on ``meta`` and real buffers.

    Fused experts are taken apart (``models.experts``), so that each has layers of its own.
    Buffers that are not on disk (rotary frequencies, masks) are computed by the constructors as in
    ``from_pretrained``. Nothing is fetched and no remote code runs.

    Raises:
        InputError: there is no usable ``config.json``, or transformers has no such class.
    """
    import transformers
    from transformers import AutoConfig, initialization

    path, named = directory / "config.json", named_classes(directory)
    if named and named[0] in ORIGINAL_CLASSES:
        raise InputError(
            f"{path}: {named[0]} is the layout of LLaVA's authors, which transformers cannot run;"
            " expected transformers' own; convert both checkpoints with the transformers"
            " repository's convert_llava_weights_to_hf.py, or patch without calibration data, or"
            " with statistics of the converted model"
        )
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
    split_(model)
    return model


def check_config(directory: Path) -> None:
    """Check that transformers reads ``config.json``, where it has the class that this names.

    A model of another library, of code of its own, or in LLaVA's own layout is not judged.

    Raises:
        InputError: transformers refuses it, or it is not JSON.
    """
    import transformers

    named = named_classes(directory)
    if not named or named[0] in ORIGINAL_CLASSES or not hasattr(transformers, named[0]):
        return
    try:
        transformers.AutoConfig.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # transformers raises what its parts raise
        raise InputError(
            f"{directory / 'config.json'}: transformers {transformers.__version__} cannot read it"
            f" ({error}); expected the configuration of a {named[0]}"
        ) from error


def named_classes(directory: Path) -> list[str]:
    """Names of the model classes that ``config.json`` gives, the first of them the model's.

    Raises:
        InputError: there is no usable ``config.json``.
    """
    path = directory / "config.json"
    try:
        named = json.loads(read_regular(path)).get("architectures") or []
        if not isinstance(named, list):
            raise TypeError("architectures is no list")
        return [str(name) for name in named]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path}: the model's configuration cannot be read ({error}); expected the config.json"
            " that save_pretrained writes"
        ) from None


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

    ``torch.device("meta")`` would lose the buffers that constructors compute. The change is seen by
    the whole process: no other thread may build modules meanwhile.
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
    experts = _fused_parameters(model)
    state |= dict.fromkeys(experts, True)
    prefix = model.base_model_prefix
    keys: dict[str, str] = {}
    for name in disk_names:
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, pattern = name, None
        if key not in state:
            continue
        if pattern is not None:
            converter = next(entry for entry in converters if pattern in entry.source_patterns)
            part = _part_of_expert(name, key, pattern, converter, experts)
            if part is None:
                raise InputError(
                    f"{where}: {name} is stored in another form than {key} is held in memory;"
                    " expected one tensor per parameter; patch without calibration data"
                )
            key = part
        if key in keys:
            raise InputError(
                f"{where}: {name} and {keys[key]} both mean {key}; expected one of them"
            )
        keys[key] = name
    _add_tied(model, keys)
    return keys


def names_as_stored(
    directory: Path, stored: Iterable[str], others: Iterable[str]
) -> dict[str, str]:
    """Translate names of a model's tensors into those of its files.

    Adapters name tensors as the model did in memory when they were trained, which another version
    of transformers may have stored, or may now hold, under another name.

    Args:
        directory: holds ``config.json``.
        stored: names in the files.
        others: names to translate, of any layout that transformers knows.

    Returns:
        Name among ``others`` -> name among ``stored``; without those that mean nothing, and empty
        when the model's class is not known.
    """
    try:
        model = build_skeleton(directory)
        keys = map_keys(model, stored, str(directory))
        meant = map_keys(model, others, str(directory))
    except InputError:
        return {}
    return {name: keys[key] for key, name in meant.items() if key in keys}


def tied_names(directory: Path, stored: Iterable[str]) -> dict[str, frozenset[str]]:
    """Find the names in a checkpoint's files that mean one parameter of the model.

    Args:
        directory: holds ``config.json``.
        stored: names in the files.

    Returns:
        Name -> all names of its parameter; without those that have one, and empty when the model's
        class is not known.
    """
    try:
        model = build_skeleton(directory)
        keys = map_keys(model, stored, str(directory))
    except InputError:
        return {}
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in keys:
            groups.setdefault(id(parameter), set()).add(keys[name])
    tied = (frozenset(group) for group in groups.values() if len(group) > 1)
    return {name: group for group in tied for name in group}


def _fused_parameters(model: nn.Module) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Names that the parameters of split experts have in transformers, and their parts.

    Returns:
        Parameter name -> (module name, projections in it).
    """
    return {
        f"{name}.{parameter}": (name, parts)
        for name, module in model.named_modules()
        if isinstance(module, SplitExperts)
        for parameter, parts in module.parts.items()
    }


def _part_of_expert(
    name: str,
    key: str,
    pattern: str,
    converter: WeightConverter,
    experts: Mapping[str, tuple[str, tuple[str, ...]]],
) -> str | None:
    """Which split expert's weight a tensor on disk is; None when it is no such thing.

    Known are experts that are stacked, after their projections were put one behind the other.
    """
    module, parts = experts.get(key, ("", ()))
    steps = [(type(step).__name__, getattr(step, "dim", None)) for step in converter.operations]
    sources = converter.source_patterns
    joined = [("MergeModulelist", 0), ("Concatenate", 1)][: len(sources)]
    numbers = re.findall(r"\.(\d+)(?=\.)", name)
    if not numbers or len(sources) != len(parts) or steps != joined:
        return None
    return f"{module}.{numbers[-1]}.{parts[sources.index(pattern)]}.weight"


def refuse_fused(model: nn.Module, keys: Mapping[str, str], where: str) -> None:
    """Check that no experts are stored together, for a model that is to run from disk.

    Raises:
        InputError: some are.
    """
    for target in fused_targets(model):
        if target.name in keys:
            raise InputError(
                f"{where}: {keys[target.name]} holds all experts of a block in one tensor; expected"
                " one tensor per expert to run the model block by block; patch without calibration"
                " data, or both models in memory with tailor_model"
            )


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
