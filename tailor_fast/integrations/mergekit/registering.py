"""``register``: the method in mergekit's own table, in the form that the version wants."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from tailor_fast._core.errors import UsageError
from tailor_fast.integrations.extras import need
from tailor_fast.integrations.mergekit.method import (
    NAME,
    PARAMETERS,
    PRETTY_NAME,
    REFERENCE,
    Settings,
)


def register(settings: Settings | None = None) -> Settings:
    """Make ``merge_method: model_tailor`` known to mergekit in this process.

    Args:
        settings: what holds where a configuration says nothing.

    Returns:
        The settings, whose ``close`` ends what was opened.

    Raises:
        UsageError: mergekit is not installed, has another API, or knows the method already.
    """
    settings = settings or Settings()
    methods = need("mergekit.merge_methods", "mergekit")
    known = getattr(methods, "REGISTERED_MERGE_METHODS", None)
    if known is None and not hasattr(methods, "GroupMergeMethod"):
        raise UsageError(
            f"mergekit {_installed()} is installed, whose API is neither that of 0.1.5 nor that of"
            " 0.1.4; expected one of them; pip install 'mergekit==0.1.5'"
        )
    taken = known if known is not None else [m.spec.name for m in methods.registered_methods()]
    if NAME in taken:
        raise UsageError(f"mergekit knows {NAME!r} already; expected one registration per process")
    if known is not None:
        known[NAME] = _method_of_0_1_4(settings)
    else:
        methods.register(_method_of_0_1_5(settings, methods))
    return settings


def _installed() -> str:
    try:
        return version("mergekit")
    except PackageNotFoundError:
        return "of an unknown version"


def _folder(model: Any) -> Path:
    """Where mergekit reads a model from: a download or a merged adapter is in its own cache."""
    tasks = need("mergekit.io.tasks", "mergekit")
    return Path(tasks.LoaderCache().get(model).index.base_path)


def _check_inputs(models: Sequence[object]) -> None:
    if len(models) != 1:
        raise UsageError(
            f"merge_method {NAME} patches base_model with one other model; got {len(models)};"
            " expected base_model and one model under `models`"
        )


def _method_of_0_1_5(settings: Settings, methods: Any) -> object:
    base = need("mergekit.merge_methods.base", "mergekit")
    shared = methods.ParameterScope.SHARED

    class ModelTailor(methods.GroupMergeMethod):  # type: ignore[misc]  # a class that is found late
        spec = methods.MergeMethodSpec(
            name=NAME,
            pretty_name=PRETTY_NAME,
            reference_url=REFERENCE,
            contract=methods.InputContract(
                base=methods.BasePolicy.REQUIRED, min_non_base=1, max_non_base=1, min_inputs=2
            ),
            optional_tensor_policy=methods.OptionalTensorPolicy.PASSTHROUGH_BASE_SINGLETON,
            parameters=tuple(base.ParameterSpec(name, Any, shared, None) for name in PARAMETERS),
        )

        def merge_group(self, group: Any, /, **parameters: Any) -> torch.Tensor:
            (tuned,) = group.non_base
            folders = _folder(group.base.id), _folder(tuned.id)
            pair = group.base.tensor, tuned.tensor
            return settings.merge(group.metadata.name, pair, folders, parameters)

    return ModelTailor()


def _method_of_0_1_4(settings: Settings) -> object:
    base = need("mergekit.merge_methods.base", "mergekit")
    method: Any = base.MergeMethod
    task = _task_of_0_1_4(settings)

    class ModelTailor(method):  # type: ignore[misc]
        def name(self) -> str:
            return NAME

        def pretty_name(self) -> str:
            return PRETTY_NAME

        def reference_url(self) -> str:
            return REFERENCE

        def parameters(self) -> list[Any]:
            return [base.ConfigParameterDef(name=name) for name in PARAMETERS]

        def make_task(self, **given: Any) -> object:
            others = [m for m in given["tensor_parameters"] if m != given["base_model"]]
            if given["base_model"] is None:
                raise UsageError(f"merge_method {NAME} patches base_model; got none; give one")
            _check_inputs(others)
            return task(
                gather=given["tensors"],
                base_model=given["base_model"],
                weight=given["output_weight"],
                parameters=given["parameters"],
            )

    return ModelTailor()


def _task_of_0_1_4(settings: Settings) -> Any:
    task: Any = need("mergekit.graph", "mergekit").Task
    architecture = need("mergekit.architecture.base", "mergekit")
    # A field of theirs is a configuration of transformers, which says `torch` without importing it.
    names = {**vars(architecture), "torch": torch}
    architecture.ConfiguredModuleArchitecture.model_rebuild(_types_namespace=names)
    architecture.ConfiguredModelArchitecture.model_rebuild(_types_namespace=names)

    class ModelTailorTask(task):  # type: ignore[misc]
        gather: Any
        base_model: Any
        weight: Any
        parameters: Any

        def arguments(self) -> dict[str, Any]:
            return {"tensors": self.gather}

        def uses_accelerator(self) -> bool:
            return True

        def group_label(self) -> str | None:
            label: str | None = self.gather.group_label()
            return label

        def execute(self, tensors: dict[Any, torch.Tensor]) -> torch.Tensor:
            if self.weight.optional and list(tensors) == [self.base_model]:
                return tensors[self.base_model]
            (tuned,) = (model for model in tensors if model != self.base_model)
            folders = _folder(self.base_model), _folder(tuned)
            pair = tensors[self.base_model], tensors[tuned]
            return settings.merge(self.weight.name, pair, folders, dict(self.parameters.items()))

    return ModelTailorTask
