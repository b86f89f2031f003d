"""``tailor_model``: two models in memory, batches of data, a patched model back."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from tailor_fast._core.errors import UsageError
from tailor_fast._core.processes import ALONE, Processes
from tailor_fast.calibration.collect import Streams
from tailor_fast.calibration.groups import discover
from tailor_fast.calibration.lockstep import Batch, Stream
from tailor_fast.models import (
    Target,
    caller,
    find_targets,
    pair_parameters,
    split_experts,
    weight_view,
)
from tailor_fast.ops.codec import EncodedPatch, encode_patch
from tailor_fast.patching.engine import Engine, Progress, silent
from tailor_fast.patching.forgetting import settle_retain_weight
from tailor_fast.patching.head_passes import run_in_memory
from tailor_fast.patching.inputs import Given, resolve
from tailor_fast.patching.layers import LayerPair
from tailor_fast.patching.recipe import Recipe
from tailor_fast.patching.report import LinearReport, Report
from tailor_fast.patching.solver import Solver, units_of


@dataclass(frozen=True)
class Tailored:
    """What ``tailor_model`` returns.

    Attributes:
        model: the patched model, a new module on the base model's device.
        patch: what changed against the base model, by parameter name; ``apply_patch_`` on a base
            parameter gives the patched one and back.
        report: what was done, layer by layer.
    """

    model: nn.Module
    patch: dict[str, EncodedPatch]
    report: Report

    def __repr__(self) -> str:
        """One line: modules and patches print every layer and every word."""
        kind = type(self.model).__name__
        return f"Tailored(model={kind}, patch of {len(self.patch)} tensors, report={self.report})"


def tailor_model(
    base_model: nn.Module,
    tuned_model: nn.Module,
    batches: Iterable[Batch] | None = None,
    recipe: Recipe | None = None,
    *,
    retain_batches: Iterable[Batch] | None = None,
    progress: Progress = silent,
    processes: Processes = ALONE,
) -> Tailored:
    """Repair a fine-tuned model's forgetting: a sparse, decorated patch on the base model.

    Every Linear and Conv1D weight that differs between the two models keeps at most
    ``recipe.density`` of its tuned values, adjusted so that each layer still answers like the tuned
    one; every other word is the base model's (Zhu et al., ICML 2024, arXiv 2402.12048; the exact
    solve is equation (6) of DESIGN.md).

    Args:
        base_model: the model before fine-tuning; unchanged.
        tuned_model: the same architecture after fine-tuning; unchanged.
        batches: samples of the new task as the model takes them: mappings of keyword arguments,
            sequences of positional ones, or one tensor each. An ``attention_mask`` keeps padding
            out of the statistics. None selects by salience alone and decorates nothing.
        recipe: every choice of the method; None takes the defaults.
        retain_batches: samples of old tasks, whose answers by the base model are held on to with
            weight ``recipe.retain_weight``. Where that is to be measured, ``labels`` (-100
            elsewhere) or a ``token_mask`` say which tokens are an answer's; else all count.
        progress: called with (group, groups done, groups in all).
        processes: what ``join_processes`` yields, to do it together with others: every process
            gives the same models and recipe and its own share of the batches, which may be an empty
            list, and gets the same model back.

    Returns:
        ``Tailored(model, patch, report)``.

    Raises:
        InputError: the two models do not match, or activations are not finite.
        PeerError: another process failed.
        UsageError: the recipe needs data that was not given, or has no use for data that was; a
            model is no module or holds no values; ``torch.inference_mode`` is on.
    """
    _check_models(base_model=base_model, tuned_model=tuned_model)
    recipe = recipe or Recipe()
    report = Report(recipe.model_dump(), processes=processes.count)
    given = (batches is not None, retain_batches is not None)
    processes.agree("recipe and kinds of data", [recipe.model_dump(), given])
    new, first = _listed("batches", batches, processes)
    old, first_old = _listed("retain_batches", retain_batches, processes)
    recipe = resolve(recipe, Given(samples=new is not None, old_samples=old is not None), report)
    start = time.perf_counter()
    pairs = list(pair_parameters(base_model, tuned_model))
    if recipe.retain_weight is None:
        runs = [(base_model, run_in_memory), (tuned_model, run_in_memory)]
        recipe = settle_retain_weight(recipe, runs, old or [], report, processes)
    patched = copy.deepcopy(base_model)
    models = (base_model, tuned_model, patched)
    with torch.no_grad():
        with split_experts(*models):
            targets = changed_targets(base_model, tuned_model, recipe, report)
            if recipe.untouched == "tuned":
                _copy_untouched(patched, tuned_model, targets)
            weights = ModelWeights(*models)
            units = units_of(recipe, tuned_model, targets)
            processes.agree("layers that changed", list(targets))
            solver = Solver(recipe, weights, targets, units, report, processes)
            if new is None:
                solve_without_data(solver, targets, progress)
            else:
                call = caller(tuned_model)
                streams = make_streams(recipe, models, (new, old), call, (first, first_old))
                groups = discover(streams.tuned, targets, processes=processes)
                by_block = recipe.group == "block"
                Engine(solver, groups, streams, by_block, progress=progress).run()
        after = dict(patched.named_parameters())
        patch = {
            name: encode_patch(parameter.detach(), after[name].detach())
            for name, parameter, _ in pairs
            if not torch.equal(_words(parameter), _words(after[name]))
        }
    if processes.count > 1:
        report.seconds["exchange"] = processes.seconds
    report.seconds["total"] = time.perf_counter() - start
    return Tailored(patched, patch, report)


def _check_models(**models: object) -> None:
    for name, model in models.items():
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"{name} must be a torch.nn.Module; got {type(model).__name__}; load it, or give"
                " paths to tailor_fast.patch_checkpoint"
            )
        for key, parameter in model.named_parameters():
            if parameter.is_meta:
                raise UsageError(
                    f"{name}.{key} must hold values; it is on the meta device; load the weights"
                )
    # A tensor made in this mode has no version counter, by which in-place changes are told.
    if torch.is_inference_mode_enabled():
        raise UsageError(
            "tailor_model cannot run under torch.inference_mode; call it outside, or under"
            " torch.no_grad"
        )


def changed_targets(
    base: nn.Module, tuned: nn.Module, recipe: Recipe, report: Report
) -> dict[str, Target]:
    """The layers to patch: those that the recipe names and whose weight differs.

    Raises:
        UsageError: the recipe's patterns leave no layer at all.
    """
    modules = dict(tuned.named_modules())
    originals = dict(base.named_modules())
    named = find_targets(tuned, recipe.selects)
    if not named:
        raise UsageError(
            "no layer to patch: the model has no Linear or Conv1D layer that"
            f" {recipe.selection} leave; `model.named_modules()` has the names"
        )
    changed = {
        target.name: target
        for target in named
        if not torch.equal(
            weight_view(originals[target.name], target.transposed),
            weight_view(modules[target.name], target.transposed),
        )
    }
    same = len(named) - len(changed)
    if same:
        report.notes.append(f"{same} of {len(named)} layers are equal in both models: left as is")
    return changed


@dataclass(frozen=True)
class ModelWeights:
    """``Weights`` of three models in memory."""

    base: nn.Module
    tuned: nn.Module
    patched: nn.Module

    def pair(self, target: Target) -> LayerPair:
        """Return the layer's tensors in the base and the tuned model."""
        ours = self.base.get_submodule(target.name)
        theirs = self.tuned.get_submodule(target.name)
        return LayerPair(
            weight_view(ours, target.transposed).contiguous(),
            weight_view(theirs, target.transposed).contiguous(),
            _bias(ours),
            _bias(theirs),
        )

    def install(
        self,
        target: Target,
        weight: torch.Tensor,
        row: LinearReport,  # noqa: ARG002  nothing is kept of it in memory
    ) -> None:
        """Write ``weight`` ``[rows, cols]`` into the patched model."""
        weight_view(self.patched.get_submodule(target.name), target.transposed).copy_(weight)

    def patched_earlier(self, target: Target) -> None:
        """Return None: nothing is left of an earlier run in memory."""

    def install_again(self, target: Target) -> None:
        """Never called: there is nothing to go on from."""
        raise RuntimeError(f"{target.name} was not patched earlier")

    def preview(self, target: Target) -> None:
        """Write the tuned weight into the patched model."""
        theirs = weight_view(self.tuned.get_submodule(target.name), target.transposed)
        weight_view(self.patched.get_submodule(target.name), target.transposed).copy_(theirs)


def _bias(module: nn.Module) -> torch.Tensor | None:
    bias = getattr(module, "bias", None)
    return bias.detach() if isinstance(bias, torch.Tensor) else None


def _listed(
    name: str, batches: Iterable[Batch] | None, processes: Processes
) -> tuple[list[Batch] | None, int]:
    """The batches as a list, and how many other processes have before them."""
    if batches is None:
        return None, 0
    listed = list(batches)
    with processes.exchange():
        counts = [int(count) for (count,) in processes.gather(len(listed))]
    if not any(counts):
        raise UsageError(f"{name} is empty; expected at least one batch, or None for no data")
    return listed, sum(counts[: processes.rank])


def _copy_untouched(patched: nn.Module, tuned: nn.Module, targets: Mapping[str, Target]) -> None:
    patchable = {id(patched.get_submodule(name).weight) for name in targets}
    state = dict(tuned.named_parameters()) | dict(tuned.named_buffers())
    for name, tensor in (*patched.named_parameters(), *patched.named_buffers()):
        if id(tensor) not in patchable:
            tensor.copy_(state[name])


def solve_without_data(solver: Solver, names: Iterable[str], progress: Progress) -> None:
    """Select by salience alone and decorate nothing."""
    names = list(names)
    if solver.needs_scores_first:
        for name in names:
            solver.score((name,), None, None)
        solver.finish_scores()
    for done, name in enumerate(names, 1):
        solver.solve((name,), None, None)
        progress(name, done, len(names))


def make_streams(
    recipe: Recipe,
    models: tuple[nn.Module, nn.Module, nn.Module],
    data: tuple[list[Batch], list[Batch] | None],
    call: Callable[[nn.Module, Batch], object],
    firsts: tuple[int, int] = (0, 0),
) -> Streams:
    """The streams that a recipe needs.

    Args:
        recipe: as resolved.
        models: base, tuned, patched.
        data: batches of the new task, and of old tasks or None.
        call: how a model is called on a batch.
        firsts: numbers of the first batch of either, where other processes have those before.
    """
    base, tuned, patched = models
    new, old = data
    first, first_old = firsts
    propagates = recipe.propagate != "none"
    exact = recipe.decorate == "exact"
    return Streams(
        Stream("tuned/new", tuned, new, call, first),
        Stream("patched/new", patched, new, call, first) if propagates else None,
        recipe.propagate == "asymmetric" and exact,
        None if old is None else Stream("base/old", base, old, call, first_old),
        Stream("patched/old", patched, old, call, first_old)
        if old is not None and propagates and exact
        else None,
    )


def _words(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)
