"""Second moments of one input group, accumulated batch by batch from two paired streams.

The *target* stream is what the layer should answer like (tuned model on the new task, base model on
old tasks); the *actual* stream is what the patched layer will see. Where the two are bit-equal, no
difference is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from tailor_fast._core.errors import InputError
from tailor_fast._core.processes import Processes
from tailor_fast.calibration.placement import to_host
from tailor_fast.calibration.token_buffer import TokenBuffer
from tailor_fast.ops.gram import (
    accumulate_cross_gram_,
    accumulate_gram_,
    accumulate_gram_diag_,
)

CHUNK_TOKENS = 4096  # whose differences are in float32 at a time; the GEMMs gain nothing beyond


@dataclass(frozen=True)
class Moments:
    """Means over the counted tokens of a group's inputs; ``x`` actual, ``δ`` target minus actual.

    Attributes:
        gram: mean ``x xᵀ``, fp32 ``[cols, cols]``.
        mean: mean ``x``, fp32 ``[cols]``.
        target_diag: diagonal of the target stream's Gram, fp32 ``[cols]``.
        cross: mean ``δ xᵀ``, fp32 ``[cols, cols]``; None while ``δ`` is zero.
        error_gram: mean ``δ δᵀ``, fp32 ``[cols, cols]``; None while ``δ`` is zero.
        error_mean: mean ``δ``, fp32 ``[cols]``; None while ``δ`` is zero.
        tokens: how many tokens were counted.
    """

    gram: torch.Tensor
    mean: torch.Tensor
    target_diag: torch.Tensor
    cross: torch.Tensor | None
    error_gram: torch.Tensor | None
    error_mean: torch.Tensor | None
    tokens: int

    @property
    def diag(self) -> torch.Tensor:
        """Diagonal of ``gram``, ``[cols]``."""
        return self.gram.diagonal()

    def without_differences(self) -> Moments:
        """The same with ``cross`` and ``error_gram`` in the host's memory."""
        if self.cross is None or self.error_gram is None:
            return self
        return replace(self, cross=to_host(self.cross), error_gram=to_host(self.error_gram))

    def waiting(self) -> Moments:
        """The same with all matrices there."""
        return replace(self.without_differences(), gram=to_host(self.gram))

    def back(self) -> Moments:
        """``waiting()`` to be solved with: the Gram is where the vectors are."""
        return replace(self, gram=self.gram.to(self.mean.device))


@dataclass(frozen=True)
class DiagonalMoments:
    """Mean ``x * x`` over the counted tokens, fp32 ``[cols]``: the Gram's diagonal alone."""

    diag: torch.Tensor
    tokens: int


@dataclass
class _Sums:
    """First and second sums over tokens, fp32."""

    gram: torch.Tensor  # [cols, cols]
    total: torch.Tensor  # [cols]

    @classmethod
    def zeros(cls, cols: int, device: torch.device) -> _Sums:
        return cls(torch.zeros(cols, cols, device=device), torch.zeros(cols, device=device))

    def add(self, x: torch.Tensor) -> None:
        accumulate_gram_(self.gram, x)
        self.total += x.sum(0, dtype=torch.float32)


class MomentSums:
    """Sums behind ``Moments``; one object per group and data set."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tokens = 0
        self._waiting = TokenBuffer()
        self._inputs: _Sums | None = None
        self._target_diag: torch.Tensor | None = None
        self._errors: _Sums | None = None
        self._cross: torch.Tensor | None = None

    def add(
        self,
        actual: torch.Tensor,
        token_mask: torch.Tensor | None,
        where: str,
        target: torch.Tensor | None = None,
        target_where: str = "",
    ) -> None:
        """Add one batch.

        Args:
            actual: ``[..., cols]``, inputs as the patched layer sees them.
            token_mask: bool ``[tokens]``, True where a token counts; None counts all.
            where: batch's name, for messages.
            target: the same tokens in the target stream; None when the streams are one.
            target_where: the batch's name there.

        Raises:
            InputError: an activation is not finite, or the two streams differ in shape.
        """
        x = finite_tokens(self._name, actual, where)
        counted = x if token_mask is None else x[token_mask]
        self._tokens += counted.shape[0]
        other = None
        if target is not None and not torch.equal(target, actual):
            other = finite_tokens(self._name, target, target_where or where)
            if other.shape != x.shape:
                raise InputError(
                    f"{self._name}: {where} gives {list(other.shape)} tokens in one model and"
                    f" {list(x.shape)} in the other; expected the same"
                )
            other = other if token_mask is None else other[token_mask]
        for ours, theirs in self._waiting.put(counted, other):
            self._add(ours, theirs)

    def _add_waiting(self) -> None:
        for ours, theirs in self._waiting.take():
            self._add(ours, theirs)

    def _add(self, x: torch.Tensor, other: torch.Tensor | None) -> None:
        if self._inputs is None:
            self._inputs = _Sums.zeros(x.shape[1], x.device)
        if other is not None and self._target_diag is None:
            self._target_diag = self._inputs.gram.diagonal().clone()  # both streams, so far
        self._inputs.add(x)
        if self._target_diag is not None:
            accumulate_gram_diag_(self._target_diag, x if other is None else other)
        if other is None:
            return
        if self._errors is None or self._cross is None:
            self._errors = _Sums.zeros(x.shape[1], x.device)
            self._cross = torch.zeros_like(self._errors.gram)
        for one, two in zip(other.split(CHUNK_TOKENS), x.split(CHUNK_TOKENS), strict=True):
            error = two.to(torch.float32, copy=True).neg_().add_(one)
            self._errors.add(error)
            accumulate_cross_gram_(self._cross, error, two)

    def add_up(self, processes: Processes) -> None:
        """Add the sums of all processes up; a process that ran no batch takes part.

        Raises:
            InputError: the processes differ in the number of columns.
        """
        if processes.count == 1:
            return
        self._add_waiting()
        with processes.exchange():
            inputs = self._inputs
            told = processes.gather(
                self._tokens,
                0 if inputs is None else len(inputs.total),
                self._target_diag is not None,
                self._errors is not None,
            )
            tokens, cols, diags, errors = zip(*told, strict=True)
            if (size := same_size(self._name, cols)) == 0:
                return
            parts = self._like_the_others(size, processes.device, any(diags), any(errors))
            if not all(told[0][1:] == other[1:] for other in told):
                processes.gather()  # those that made some had the memory
            processes.add(parts)
            self._tokens = int(sum(tokens))

    def _like_the_others(
        self, cols: int, device: torch.device, diag: bool, errors: bool
    ) -> list[torch.Tensor]:
        """Make what another process has and this one does not; returns all, in a fixed order."""
        if self._inputs is None:
            self._inputs = _Sums.zeros(cols, device)
        gram = self._inputs.gram
        parts = [gram, self._inputs.total]
        if diag:
            if self._target_diag is None:
                self._target_diag = gram.diagonal().clone()  # the streams were one, so far
            parts.append(self._target_diag)
        if errors:
            if self._errors is None or self._cross is None:
                self._errors = _Sums.zeros(cols, gram.device)
                self._cross = torch.zeros_like(gram)
            parts += [self._errors.gram, self._errors.total, self._cross]
        return parts

    def finish(self) -> Moments | None:
        """Turn the sums into means, in place; None when no token was counted."""
        self._add_waiting()
        if self._tokens == 0 or self._inputs is None:
            return None
        inputs, errors, tokens = self._inputs, self._errors, self._tokens
        diag = self._target_diag
        return Moments(
            gram=inputs.gram.div_(tokens),
            mean=inputs.total.div_(tokens),
            target_diag=inputs.gram.diagonal().clone() if diag is None else diag.div_(tokens),
            cross=None if self._cross is None else self._cross.div_(tokens),
            error_gram=None if errors is None else errors.gram.div_(tokens),
            error_mean=None if errors is None else errors.total.div_(tokens),
            tokens=tokens,
        )

    def sums(self) -> tuple[dict[str, torch.Tensor], int]:
        """``gram`` (sum of ``x xᵀ``) and ``total`` (sum of ``x``) as they are, and the tokens.

        Raises:
            InputError: no batch was added.
        """
        self._add_waiting()
        if self._inputs is None:
            raise InputError(f"{self._name}: no batch runs through it; expected at least one")
        return {"gram": self._inputs.gram, "total": self._inputs.total}, self._tokens


def same_size(name: str, cols: Sequence[float]) -> int:
    """The number of columns that all processes with any have; 0 when none has.

    Raises:
        InputError: they differ.
    """
    sizes = {int(size) for size in cols if size}
    if len(sizes) > 1:
        raise InputError(
            f"{name}: its input has {' and '.join(map(str, sorted(sizes)))} columns in different"
            " processes; expected the same model in all"
        )
    return sizes.pop() if sizes else 0


class DiagonalSums:
    """Sum of ``x * x`` over the counted tokens; what ``calibrate --kind diag`` costs."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tokens = 0
        self._diag: torch.Tensor | None = None

    def add(self, actual: torch.Tensor, token_mask: torch.Tensor | None, where: str) -> None:
        """Add one batch; arguments and errors as for ``MomentSums.add``."""
        counted = finite_tokens(self._name, actual, where)
        if token_mask is not None:
            counted = counted[token_mask]
        if self._diag is None:
            self._diag = counted.new_zeros(counted.shape[1], dtype=torch.float32)
        self._tokens += counted.shape[0]
        accumulate_gram_diag_(self._diag, counted)

    def add_up(self, processes: Processes) -> None:
        """Add the sums of all processes up; errors as for ``MomentSums.add_up``."""
        if processes.count == 1:
            return
        with processes.exchange():
            told = processes.gather(self._tokens, 0 if self._diag is None else len(self._diag))
            tokens, cols = zip(*told, strict=True)
            if (size := same_size(self._name, cols)) == 0:
                return
            if self._diag is None:
                self._diag = torch.zeros(size, device=processes.device)
            processes.gather()  # all have the memory
            processes.add([self._diag])
            self._tokens = int(sum(tokens))

    def sums(self) -> tuple[dict[str, torch.Tensor], int]:
        """``diag`` as it is, and the tokens.

        Raises:
            InputError: no batch was added.
        """
        if self._diag is None:
            raise InputError(f"{self._name}: no batch runs through it; expected at least one")
        return {"diag": self._diag}, self._tokens


class BatchName(str):
    """A batch's name, for messages.

    Attributes:
        samples: where its samples come from; empty when nobody said.
    """

    samples: tuple[str, ...] = ()

    def sample(self, row: int) -> str:
        """The name of one sample."""
        return self.samples[row] if row < len(self.samples) else f"sample {row}"


def finite_tokens(name: str, x: torch.Tensor, where: str) -> torch.Tensor:
    """Return ``x`` ``[..., cols]`` as ``[tokens, cols]``.

    Raises:
        InputError: an entry is not finite; the message names layer, batch, sample and token.
    """
    tokens = x.detach().reshape(-1, x.shape[-1]).contiguous()
    if not bool(torch.isfinite(tokens.sum(dtype=torch.float32))):
        finite = torch.isfinite(tokens).all(1)
        if not bool(finite.all()):
            first = int((~finite).nonzero()[0])
            token = f"token {first}"
            if x.dim() > 2:
                row, first = divmod(first, tokens.shape[0] // x.shape[0])
                batch = where if isinstance(where, BatchName) else BatchName(where)
                token = f"token {first} of {batch.sample(row)}"
            raise InputError(
                f"{name}: the input in {where} is not finite at {token}; expected finite"
                " activations; look for overflow in the model's dtype"
            )
    return tokens
