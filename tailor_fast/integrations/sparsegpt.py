"""The authors' class ``SparseGPT`` with its contract, on the ops of this library.

Change one import and the script runs as before, faster::

    from tailor_fast.integrations.sparsegpt import SparseGPT

Source: ``llava/sparsegpt.py`` and ``llava/train/sparsegpt.py`` of the Model Tailor repository
(Zhu et al., ICML 2024, arXiv 2402.12048). Unlike them, importing this module leaves TF32 as it is.
"""

from __future__ import annotations

import sys
import time
from typing import Literal, NamedTuple, get_args

import torch
from torch import nn

from tailor_fast._core.backend import Backend
from tailor_fast.integrations.modes import Task, decorate, keep_by_pattern, keep_by_score
from tailor_fast.models.linears import is_conv1d, weight_view
from tailor_fast.ops.decorate import decorate_official
from tailor_fast.ops.gram import accumulate_gram_
from tailor_fast.ops.select.options import BLOCK

__all__ = ["Mode", "PruneResult", "SparseGPT", "TrainingSparseGPT"]

Mode = Literal["official", "obs", "exact"]
_MODES: tuple[str, ...] = get_args(Mode)


class PruneResult(NamedTuple):
    """What ``fasterprune`` returns; each ``[out, in]``.

    Attributes:
        delta_sf: zeros, float32, as in the authors' class.
        delta_fp: tuned minus base weight, dtype of the layer.
        delta_sp: new minus base weight, float32.
        mask: int32, 1 where the new weight differs from the base weight.
    """

    delta_sf: torch.Tensor
    delta_fp: torch.Tensor
    delta_sp: torch.Tensor
    mask: torch.Tensor


class SparseGPT:
    """Patch one layer: collect its inputs with ``add_batch``, then call ``fasterprune``.

    Attributes:
        layer: the tuned layer; its weight becomes the patched one.
        pretrain_layer: the base layer; unchanged.
        dev: device of the tuned weight, where everything is computed.
        rows: outputs of the layer.
        columns: inputs of the layer.
        nsamples: sequences seen.
    """

    def __init__(
        self,
        layer: nn.Module,
        pretrain_layer: nn.Module,
        *,
        mode: Mode = "official",
        score_weights: tuple[float, float] = (0.5, 0.5),
        parity_rng: bool = False,
        backend: Backend = "auto",
    ) -> None:
        """Take the two layers.

        Args:
            layer: tuned ``nn.Linear``, or transformers' ``Conv1D``, which the authors' class mixes
                up (it leaves the base weight as it is stored); here both are turned.
            pretrain_layer: base layer of the same kind, shape and dtype, on any device.
            mode: ``"official"`` is the authors' code to the letter. ``"obs"`` is the paper's sweep
                with the sign of OBS, ``"exact"`` the minimiser; both keep the best scores per 128
                columns, by the sensitivity of the paper.
            score_weights: weights of salience and sensitivity: (0.5, 0.5) in the authors'
                evaluation class, (0.8, 0.2) in their training class.
            parity_rng: draw from the global generator what the authors' class draws and drops, so
                that what comes later in a script sees the same random numbers.
            backend: see ``tailor_fast.backends()``.

        Raises:
            TypeError: a layer of another kind.
            ValueError: another mode, or layers that differ in shape or dtype.
        """
        if mode not in _MODES:
            raise ValueError(f"SparseGPT: mode must be one of {', '.join(_MODES)}; got {mode!r}")
        self._transposed = is_conv1d(layer)
        for name, module in (("layer", layer), ("pretrain_layer", pretrain_layer)):
            if not isinstance(module, nn.Linear) and not is_conv1d(module):
                kind = type(module).__name__
                raise TypeError(f"SparseGPT: {name} must be a Linear or a Conv1D; got {kind}")
        tuned, base = self._matrix(layer), self._matrix(pretrain_layer)
        if (tuned.shape, tuned.dtype) != (base.shape, base.dtype):
            raise ValueError(
                f"SparseGPT: pretrain_layer must have weights like layer, {list(tuned.shape)}"
                f" {tuned.dtype}; got {list(base.shape)} {base.dtype}"
            )
        self.layer = layer
        self.pretrain_layer = pretrain_layer
        self.dev = tuned.device
        self.rows, self.columns = tuned.shape
        self.nsamples = 0
        self._mode, self._weights, self._backend = mode, score_weights, backend
        self._parity_rng = parity_rng
        # H is `_sums` times `_scale`: the sums grow as they are and are scaled when H is asked for.
        self._sums: torch.Tensor | None = torch.zeros(
            self.columns, self.columns, device=self.dev, dtype=torch.float32
        )
        self._scale = 1.0
        self._used = False

    @property
    def H(self) -> torch.Tensor | None:  # noqa: N802  the authors' name
        """``(2/n) sum x x^T`` over ``n`` sequences, float32 ``[columns, columns]``; None if freed.

        Raises:
            AttributeError: ``fasterprune`` has used it up.
        """
        if self._used:
            raise AttributeError("SparseGPT has no H any more: fasterprune has used it up")
        if self._sums is not None and self._scale != 1.0:
            self._sums.mul_(self._scale)
            self._scale = 1.0
        return self._sums

    @H.setter
    def H(self, value: torch.Tensor | None) -> None:  # noqa: N802
        self._sums, self._scale, self._used = value, 1.0, False

    def add_batch(self, inp: torch.Tensor, out: torch.Tensor, blocksize: int = 1024) -> None:
        """Add the layer's inputs of one batch to ``H``.

        Args:
            inp: ``[tokens, columns]``, one sequence, or ``[sequences, tokens, columns]``; bfloat16,
                float16 or float32. Padding counts, as it does in the authors' class.
            out: not used.
            blocksize: not used.

        Raises:
            TypeError: ``inp`` has another dtype.
            ValueError: ``H`` was freed or used up, or ``inp`` has another shape.
        """
        del out, blocksize
        if self._used or self._sums is None:
            raise ValueError("SparseGPT: add_batch after H was used up or freed; make a new object")
        if inp.dim() not in (2, 3) or inp.shape[-1] != self.columns:
            raise ValueError(
                f"SparseGPT: inp must be [tokens, {self.columns}] or [sequences, tokens,"
                f" {self.columns}]; got {list(inp.shape)}"
            )
        if self.nsamples and self._scale != 2.0 / self.nsamples:  # H was asked for, or set
            self._sums.mul_(self._scale * self.nsamples / 2.0)
        if inp.numel() == 0:
            return
        self.nsamples += 1 if inp.dim() == 2 else inp.shape[0]
        tokens = inp.detach().reshape(-1, self.columns).to(self.dev).contiguous()
        accumulate_gram_(self._sums, tokens, backend=self._backend)
        self._scale = 2.0 / self.nsamples

    def fasterprune(
        self,
        sparsity: float,
        prunen: int = 0,
        prunem: int = 0,
        blocksize: int = 128,
        percdamp: float = 0.01,
        tops_mask: torch.Tensor | None = None,
        use_tops: bool = False,
    ) -> PruneResult | None:
        """Patch the layer and print ``time`` and ``error``, as the authors' class does.

        The layer keeps its Parameter, which gets a new tensor: other views of the old one keep the
        tuned weight. Everything that was not kept is bit-equal to the base weight; the bias stays.

        Args:
            sparsity: share of each block that goes back to base, in ``[0, 1)``.
            prunen: where not 0, how many of each ``prunem`` columns go back, by sensitivity alone.
            prunem: see ``prunen``.
            blocksize: columns of a block; 128 except in mode ``"official"``.
            percdamp: λ as a share of the mean diagonal.
            tops_mask: bool ``[rows, columns]``, True where the weight goes back.
            use_tops: whether to take ``tops_mask`` in place of scores.

        Returns:
            ``(delta_sf, delta_fp, delta_sp, mask)``. The error printed is the authors' sum in mode
            ``"official"``, else the damped objective in the units of ``H``.

        Raises:
            AttributeError: called a second time.
            TypeError, ValueError: an option that the op refuses; see ``ops.decorate``.
            torch.linalg.LinAlgError: the damped ``H`` does not factorise (``"official"``).
        """
        hessian = self.H
        if hessian is None:
            raise ValueError("SparseGPT: fasterprune after free; make a new object")
        start = time.time()
        tuned = self._matrix(self.layer).contiguous()
        base = self._matrix(self.pretrain_layer).to(self.dev).contiguous()
        revert = tops_mask if use_tops else None
        if self._mode == "official":
            result = decorate_official(
                base,
                tuned,
                hessian,
                sparsity=sparsity,
                score_weights=self._weights,
                block_size=blocksize,
                percdamp=percdamp,
                prunen=prunen,
                prunem=prunem,
                tops_mask=revert,
                backend=self._backend,
            )
            weight, error = result.weight, result.loss
        else:
            if blocksize != BLOCK:
                raise ValueError(
                    f"SparseGPT: blocksize must be {BLOCK} in mode {self._mode!r}; got {blocksize}"
                )
            task = Task(base, tuned, hessian, percdamp, self._backend)
            if revert is not None:
                keep = ~revert.to(self.dev)
            elif prunen != 0:
                keep = keep_by_pattern(task, prunen, prunem)
            else:
                keep = keep_by_score(task, sparsity, self._weights)
            weight, error = decorate(task, keep, self._mode)
        self._used, self._sums = True, None
        if self._parity_rng:
            for _ in range(2):
                torch.rand_like(tuned, dtype=torch.float32)
        self.layer.weight.data = weight.T.contiguous() if self._transposed else weight
        sys.stdout.write(f"time {time.time() - start:.2f}\nerror {error.item()}\n")
        delta = weight.float() - base.float()
        return PruneResult(
            torch.zeros_like(delta), tuned - base, delta, (weight != base).to(torch.int32)
        )

    def free(self) -> None:
        """Let ``H`` go."""
        self.H = None
        if self.dev.type == "cuda":
            torch.cuda.empty_cache()

    def _matrix(self, layer: nn.Module) -> torch.Tensor:
        return weight_view(layer, is_conv1d(layer))


class TrainingSparseGPT(SparseGPT):
    """The class of ``llava/train/sparsegpt.py``: weights 0.8 and 0.2, and nothing returned."""

    def __init__(
        self,
        layer: nn.Module,
        pretrain_layer: nn.Module,
        *,
        mode: Mode = "official",
        score_weights: tuple[float, float] = (0.8, 0.2),
        parity_rng: bool = False,
        backend: Backend = "auto",
    ) -> None:
        """Take the two layers, as ``SparseGPT`` does."""
        super().__init__(
            layer,
            pretrain_layer,
            mode=mode,
            score_weights=score_weights,
            parity_rng=parity_rng,
            backend=backend,
        )

    def fasterprune(
        self,
        sparsity: float,
        prunen: int = 0,
        prunem: int = 0,
        blocksize: int = 128,
        percdamp: float = 0.01,
        tops_mask: torch.Tensor | None = None,
        use_tops: bool = False,
    ) -> None:
        """Patch the layer as ``SparseGPT.fasterprune`` does."""
        super().fasterprune(sparsity, prunen, prunem, blocksize, percdamp, tops_mask, use_tops)
