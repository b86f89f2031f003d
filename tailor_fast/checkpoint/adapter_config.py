"""``adapter_config.json`` of a PEFT adapter: what decides the merged weights, or a refusal.

Source: ``LoraConfig`` of peft 0.21. What may change the arithmetic and is not known here is refused
by name, so that an adapter of tomorrow is not merged by the rules of today.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from tailor_fast.checkpoint.errors import MalformedError, quoted
from tailor_fast.checkpoint.files import open_input, read_exact
from tailor_fast.checkpoint.index import ADAPTER_CONFIG
from tailor_fast.checkpoint.sidefiles import refuse_irregular
from tailor_fast.checkpoint.strict_json import JsonError, Scanner

T = TypeVar("T")

MERGE = "merge it with peft (merge_and_unload, save_pretrained) and give the result"
_MAX_BYTES = 1 << 20
_SAVE_AGAIN = "save the adapter again with peft"
# Decide the merged weights, and are read below.
_USED = {
    "peft_type",
    "base_model_name_or_path",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "init_lora_weights",
}
# Decide how the adapter was trained; which tensors it has, its file says.
_IDLE = {
    "task_type",
    "auto_mapping",
    "peft_version",
    "revision",
    "inference_mode",
    "target_modules",
    "exclude_modules",
    "lora_dropout",
    "bias",
    "modules_to_save",
    "layers_to_transform",
    "layers_pattern",
    "megatron_core",
    "loftq_config",
    "eva_config",
    "corda_config",
    "lora_ga_config",
    "qalora_group_size",
    "runtime_config",
    "lora_bias",
    "ensure_weight_tying",
}
# Other initialisations change the base model's own weights before training.
_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """What the configuration says of the merged weights.

    Attributes:
        path: the file.
        base_model: the base model's name or place at training time, or None.
        rank: rank of the factors where no pattern says otherwise.
        alpha: numerator of the scale, likewise.
        rslora: the scale is ``alpha / sqrt(rank)`` instead of ``alpha / rank``.
        dora: each row is scaled to a stored length.
        transposed: weights are stored ``[in, out]``.
        ranks: pattern of module names -> rank.
        alphas: pattern of module names -> alpha.
    """

    path: Path
    base_model: str | None
    rank: int
    alpha: float
    rslora: bool
    dora: bool
    transposed: bool
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]

    def rank_of(self, module: str) -> int:
        """Rank of the factors of ``module``."""
        return _matching(self.ranks, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Factor of ``B A`` of ``module``."""
        rank = self.rank_of(module)
        alpha = _matching(self.alphas, module, self.alpha)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def read_adapter_config(directory: Path) -> AdapterConfig:
    """Read the configuration of an adapter.

    Raises:
        MissingFileError, TransferError: it cannot be read.
        MalformedError: no JSON, a value of the wrong kind, or an adapter that is not a LoRA whose
            merged weights are known.
    """
    refuse_irregular(directory)
    path = directory / ADAPTER_CONFIG
    fd = open_input(path)
    try:
        size = os.fstat(fd).st_size
        if size > _MAX_BYTES:
            _refuse(path, f"must have at most {_MAX_BYTES} bytes; got {size}", _SAVE_AGAIN)
        text = bytearray(size)
        read_exact(fd, memoryview(text), 0, path)
    finally:
        os.close(fd)
    try:
        scanner = Scanner(text)
        body = {key: json.loads(scanner.skip()) for key in scanner.members()}
        scanner.end()
    except JsonError as error:
        _refuse(path, f"must be a valid configuration: {error}", _SAVE_AGAIN)
    return _parsed(path, body)


def _parsed(path: Path, body: Mapping[str, Any]) -> AdapterConfig:
    if body.get("peft_type") != "LORA":
        _refuse(path, f"peft_type must be LORA; got {_shown(body.get('peft_type'))}", MERGE)
    for key in body.keys() - _USED - _IDLE:
        if body[key]:
            _refuse(path, f"{quoted(key)} is {_shown(body[key])}, which is not known here", MERGE)
    init = body.get("init_lora_weights", True)
    if not any(init is known or (isinstance(init, str) and init == known) for known in _INITS):
        problem = f"init_lora_weights is {_shown(init)}, which changes the base model itself"
        _refuse(path, problem, f"convert the adapter to a plain LoRA with peft, or {MERGE}")
    base = body.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        _refuse(path, f"base_model_name_or_path must be text; got {_shown(base)}", _SAVE_AGAIN)
    flags = {
        key: _flag(path, key, body.get(key, False))
        for key in ("use_rslora", "use_dora", "fan_in_fan_out")
    }
    return AdapterConfig(
        path,
        base,
        _rank(path, "r", body.get("r", 8)),
        _alpha(path, "lora_alpha", body.get("lora_alpha", 8)),
        flags["use_rslora"],
        flags["use_dora"],
        flags["fan_in_fan_out"],
        {k: _rank(path, "rank_pattern", v) for k, v in _patterns(path, "rank_pattern", body)},
        {k: _alpha(path, "alpha_pattern", v) for k, v in _patterns(path, "alpha_pattern", body)},
    )


def _flag(path: Path, key: str, value: Any) -> bool:
    if not isinstance(value, bool):
        _refuse(path, f"{key} must be true or false; got {_shown(value)}", _SAVE_AGAIN)
    return value


def _rank(path: Path, key: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        _refuse(path, f"{key} must be a whole number of at least 1; got {_shown(value)}")
    return value


def _alpha(path: Path, key: str, value: Any) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        _refuse(path, f"{key} must be a finite number; got {_shown(value)}")
    return float(value)


def _patterns(path: Path, key: str, body: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found = body.get(key) or {}
    if not isinstance(found, dict):
        _refuse(path, f"{key} must be an object of patterns; got {_shown(found)}")
    for pattern in found:
        try:
            re.compile(pattern)
        except re.error as error:
            _refuse(path, f"{key}: {quoted(pattern)} is no regular expression: {error}")
    return list(found.items())


def _matching(patterns: Mapping[str, T], module: str, default: T) -> T:
    """The value of the first pattern that is the module's name or its end, by peft's rule."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _shown(value: Any) -> str:
    return quoted(value) if isinstance(value, str) else quoted(json.dumps(value))


def _refuse(path: Path, problem: str, remedy: str = _SAVE_AGAIN) -> NoReturn:
    raise MalformedError(problem, path=path, remedy=remedy)
