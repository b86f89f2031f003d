"""Public functions of the ``decorate`` op: checks, then one dispatch line each."""

import torch

from tailor_fast._core.backend import Backend
from tailor_fast._core.checks import FLOAT32, check_tensor
from tailor_fast.ops.decorate import schema as _schema  # registers the ops
from tailor_fast.ops.decorate.inputs import (
    OfficialOptions,
    check_factor,
    check_official,
    check_problem,
    check_right_side,
    check_scale,
    check_solver,
    check_weights,
)
from tailor_fast.ops.decorate.results import Decorated, DecorationLosses, ObsFactor, OfficialResult

_OPS = torch.ops.tailor_fast

# A row ends when its loss is proved to be within TOL of the minimum. Measured at density 0.1 and
# percdamp 0.01 the excess is then 3e-9 to 6e-7, after 18 iterations where the inputs have cols / 4
# factors and noise, 58 and 142 where their spectrum falls as k^-1.2 and k^-1.8 (2048 and 4096
# columns). The largest excess on 1,600 Grams of condition up to 1e9 was 3.5e-5.
TOL = 1e-4
# Per precision; the hardest of those Grams took 3,300. The kept weights of a row set a lower limit.
MAX_ITERATIONS = 10_000


def decorate_exact(
    delta: torch.Tensor,
    mask: torch.Tensor,
    gram: torch.Tensor,
    rhs: torch.Tensor | None = None,
    *,
    percdamp: float = 0.01,
    damping: float | None = None,
    target_energy: float | torch.Tensor | None = None,
    tol: float = TOL,
    max_iterations: int = MAX_ITERATIONS,
    backend: Backend = "auto",
) -> Decorated:
    """Adjust the kept values so that the layer answers as closely as the mask allows.

    Minimises over patches ``P`` that are zero outside the mask, row by row (``D`` is ``delta``,
    ``λ`` the damping):

        tr((D - P) (gram + λI) (D - P)^T)                                          without ``rhs``
        target_energy - 2 <P, rhs> + tr(P gram P^T) + λ |D - P|^2                   with ``rhs``

    The result is within ``tol`` of the minimum whatever the conditioning, while rounding leaves the
    Gram no negative eigenvalue beside λ; a warning says how many rows lack proof. It is never worse
    than the bare mask (``P = D`` inside it).

    Args:
        delta: tuned minus base weight, float32 ``[rows, cols]``.
        mask: bool ``[rows, cols]``, True where the weight is kept. Rows may be empty or full.
        gram: undamped mean Gram, float32 ``[cols, cols]``, of the inputs on which the patched layer
            will run; plus the weighted one of old tasks where they are retained.
        rhs: undamped right-hand side, float32 ``[rows, cols]``. None stands for ``delta @ gram``,
            which is right only without retention, asymmetry or a changed bias.
        percdamp: λ as a share of the mean diagonal of ``gram``.
        damping: λ itself; then ``percdamp`` has no effect.
        target_energy: mean squared answer that is to be met, summed over rows: a number or a 0-d
            float64 tensor. Only with ``rhs``; without it the losses are NaN there.
        tol: largest excess over its minimum, relative to it, at which a row may end; in
            ``[1e-12, 1]``.
        max_iterations: limit per row and precision (float32, then float64 where that is needed).
        backend: see ``tailor_fast.backends()``.

    Returns:
        Patch and losses. The reference needs 170 MiB beside the patch, whatever the size.

    Raises:
        TypeError: not a tensor, another dtype, or an option that is not a number.
        ValueError: wrong shape, device or stride; an input that requires grad or is not finite; a
            Gram that is not symmetric; an option out of its range.

    Source: DESIGN.md, equation (6); Zhu et al., ICML 2024, arXiv 2402.12048, for what is decorated.
    """
    op, dims = "decorate_exact", dict[str, int]()
    check_tensor(op, "delta", delta, ("rows", "cols"), FLOAT32, dims)
    check_problem(op, delta, mask, gram, dims)
    energy = check_right_side(op, delta, rhs, target_energy, dims)
    check_solver(op, percdamp, damping, tol, max_iterations)
    options = (rhs, energy, percdamp, damping, tol, max_iterations, backend)
    return Decorated(*_OPS.decorate_exact(delta, mask, gram, *options))


def decorate_exact_(
    weight: torch.Tensor,
    base: torch.Tensor,
    mask: torch.Tensor,
    gram: torch.Tensor,
    rhs: torch.Tensor | None = None,
    *,
    percdamp: float = 0.01,
    damping: float | None = None,
    target_energy: float | torch.Tensor | None = None,
    tol: float = TOL,
    max_iterations: int = MAX_ITERATIONS,
    backend: Backend = "auto",
) -> DecorationLosses:
    """Turn a tuned weight into ``base + patch`` in place, with the patch of ``decorate_exact``.

    Args:
        weight: tuned weight, float32/bfloat16/float16 ``[rows, cols]``; becomes ``base + patch``,
            rounded once, and holds the very words of ``base`` outside the mask.
        base: base weight of the same dtype; unchanged, in memory of its own.
        mask: bool ``[rows, cols]``, True where the weight is kept.
        gram: undamped mean Gram, float32 ``[cols, cols]``, see ``decorate_exact``.
        rhs: undamped right-hand side, float32 ``[rows, cols]``; None stands for ``delta @ gram``
            with the delta in float32.
        percdamp: λ as a share of the mean diagonal of ``gram``.
        damping: λ itself; then ``percdamp`` has no effect.
        target_energy: number or 0-d float64 tensor that the losses need with ``rhs``.
        tol: largest relative excess over its minimum at which a row may end, in ``[1e-12, 1]``.
        max_iterations: limit per row and precision.
        backend: see ``tailor_fast.backends()``.

    Returns:
        The losses of the patch before rounding. No copy of the weight is made: the reference needs
        170 MiB, whatever the size.

    Raises:
        TypeError: as ``decorate_exact``.
        ValueError: as ``decorate_exact``, or ``weight`` and ``base`` overlap in memory.
    """
    op, dims = "decorate_exact_", dict[str, int]()
    check_weights(op, ("weight", weight), ("base", base), dims)
    check_problem(op, weight, mask, gram, dims)
    energy = check_right_side(op, weight, rhs, target_energy, dims)
    check_solver(op, percdamp, damping, tol, max_iterations)
    options = (rhs, energy, percdamp, damping, tol, max_iterations, backend)
    return DecorationLosses(*_OPS.decorate_exact_(weight, base, mask, gram, *options))


def factor_obs(
    gram: torch.Tensor, *, percdamp: float = 0.01, backend: Backend = "auto"
) -> ObsFactor:
    """Make what ``decorate_obs`` needs of a Gram, once for all layers that read one input.

    Args:
        gram: undamped mean Gram of the inputs, float32 ``[cols, cols]``.
        percdamp: λ as a share of the mean diagonal of ``gram``.
        backend: see ``tailor_fast.backends()``.

    Returns:
        The factor, for ``decorate_obs`` with the same Gram, which else makes and holds its own.

    Raises:
        TypeError, ValueError: as ``decorate_obs``, of a ``gram``.
    """
    op = "factor_obs"
    check_tensor(op, "gram", gram, ("cols", "cols"), FLOAT32, dict[str, int]())
    check_scale(op, "percdamp", percdamp)
    name = backend if gram.is_meta else _schema.backend_of(gram, backend)
    return ObsFactor._make((*_OPS.factor_obs(gram, percdamp, name), name))


def decorate_obs(
    delta: torch.Tensor,
    mask: torch.Tensor,
    gram: torch.Tensor,
    *,
    percdamp: float = 0.01,
    factor: ObsFactor | None = None,
    backend: Backend = "auto",
) -> Decorated:
    """Adjust the kept values by the optimal brain surgeon's sweep over the columns.

    The paper's decoration with the sign that OBS has: a dropped weight moves the weights to its
    right by ``-err U``. It is greedy: kept weights to the left of a dropped one stay as they are.
    So it is worse than ``decorate_exact`` and not proved to be better than the bare mask.

    Where the damped Gram does not factorise in float32, it is tried in float64, then with ten times
    the damping up to 0.1 of the mean diagonal, with a warning; losses are at what served.

    Args:
        delta: tuned minus base weight, float32 ``[rows, cols]``.
        mask: bool ``[rows, cols]``, True where the weight is kept.
        gram: undamped mean Gram of the inputs, float32 ``[cols, cols]``.
        percdamp: λ as a share of the mean diagonal of ``gram``.
        factor: what ``factor_obs`` made of ``gram``; ``percdamp`` and ``backend`` are then its own.
        backend: see ``tailor_fast.backends()``.

    Returns:
        Patch and losses, 0 iterations. The reference needs three float32 matrices like the Gram
        while it factorises, one while it sweeps, and 130 MiB.

    Raises:
        TypeError: not a tensor, another dtype, or an option that is not a number.
        ValueError: as ``decorate_exact``, or a Gram that cannot be factorised.

    Source: Zhu et al., ICML 2024, arXiv 2402.12048; Frantar & Alistarh, 2023, arXiv 2301.00774.
    """
    op, dims = "decorate_obs", dict[str, int]()
    check_tensor(op, "delta", delta, ("rows", "cols"), FLOAT32, dims)
    check_problem(op, delta, mask, gram, dims)
    check_scale(op, "percdamp", percdamp)
    parts, backend = check_factor(op, factor, gram, backend)
    return Decorated(*_OPS.decorate_obs(delta, mask, gram, percdamp, parts, backend))


def decorate_obs_(
    weight: torch.Tensor,
    base: torch.Tensor,
    mask: torch.Tensor,
    gram: torch.Tensor,
    *,
    percdamp: float = 0.01,
    factor: ObsFactor | None = None,
    backend: Backend = "auto",
) -> DecorationLosses:
    """Turn a tuned weight into ``base + patch`` in place, with the patch of ``decorate_obs``.

    Args:
        weight: tuned weight, float32/bfloat16/float16 ``[rows, cols]``; becomes ``base + patch``,
            rounded once, and holds the very words of ``base`` outside the mask.
        base: base weight of the same dtype; unchanged, in memory of its own.
        mask: bool ``[rows, cols]``, True where the weight is kept.
        gram: undamped mean Gram of the inputs, float32 ``[cols, cols]``.
        percdamp: λ as a share of the mean diagonal of ``gram``.
        factor: as for ``decorate_obs``.
        backend: see ``tailor_fast.backends()``.

    Returns:
        The losses of the patch before rounding. Memory as ``decorate_obs``, without the patch.

    Raises:
        TypeError: as ``decorate_obs``.
        ValueError: as ``decorate_obs``, or ``weight`` and ``base`` overlap in memory.
    """
    op, dims = "decorate_obs_", dict[str, int]()
    check_weights(op, ("weight", weight), ("base", base), dims)
    check_problem(op, weight, mask, gram, dims)
    check_scale(op, "percdamp", percdamp)
    parts, backend = check_factor(op, factor, gram, backend)
    return DecorationLosses(*_OPS.decorate_obs_(weight, base, mask, gram, percdamp, parts, backend))


def decorate_official(
    base: torch.Tensor,
    tuned: torch.Tensor,
    gram: torch.Tensor,
    *,
    sparsity: float,
    score_weights: tuple[float, float] = (0.5, 0.5),
    block_size: int = 128,
    percdamp: float = 0.01,
    prunen: int = 0,
    prunem: int = 0,
    tops_mask: torch.Tensor | None = None,
    reproduce_nan: bool = True,
    backend: Backend = "auto",
) -> OfficialResult:
    """Patch one weight as the authors' ``SparseGPT.fasterprune`` does, to the letter.

    Per block of columns: score ``a z(|D|) + b z(W^2 / U_jj^2)`` with the weight as the blocks
    before left it; everything up to the score at position ``int(n * sparsity)`` goes back to base;
    the sweep moves later columns by ``+err U``, the sign reversed against OBS.

    Args:
        base: base weight, float32/bfloat16/float16 ``[rows, cols]``.
        tuned: tuned weight of the same dtype.
        gram: the authors' H, ``(2/n) sum x x^T`` over ``n`` sequences, float32 ``[cols, cols]``.
            Columns with a zero diagonal get 1 before the damping is taken.
        sparsity: share of each block that goes back to base, in ``[0, 1)``.
        score_weights: ``(a, b)``; (0.5, 0.5) in the evaluation class, (0.8, 0.2) in the training
            class.
        block_size: columns of a block; the last one may be narrower.
        percdamp: λ as a share of the mean diagonal.
        prunen: where not 0, ``prunen`` of each ``prunem`` columns go back, by sensitivity alone.
        prunem: see ``prunen``.
        tops_mask: bool ``[rows, cols]``, True where the weight goes back, in place of a score.
        reproduce_nan: keep all weights of a row that was not tuned within a block, and of a block
            of one column, because their scores are NaN; with 10% of such rows nothing goes back.
            A warning says how many. False takes ``z = 0`` there.
        backend: see ``tailor_fast.backends()``.

    Returns:
        Weight, mask, loss. The reference needs a float32 copy of the weight, and three matrices of
        the Gram's size while it factorises, one while it sweeps.

    Raises:
        TypeError: not a tensor, another dtype, or an option of another type.
        ValueError: wrong shape, device or stride; an input that requires grad or is not finite; a
            Gram that is not symmetric; an option out of its range.
        torch.linalg.LinAlgError: the damped Gram does not factorise, as in the authors' code.

    Source: Zhu et al., ICML 2024, arXiv 2402.12048, ``llava/sparsegpt.py`` and
    ``llava/train/sparsegpt.py`` of their repository.
    """
    op, dims = "decorate_official", dict[str, int]()
    options = OfficialOptions(
        sparsity, score_weights, block_size, percdamp, prunen, prunem, reproduce_nan
    )
    check_weights(op, ("base", base), ("tuned", tuned), dims)
    check_official(op, tuned, gram, tops_mask, options, dims)
    return OfficialResult(*_OPS.decorate_official(base, tuned, gram, tops_mask, *options, backend))


def decorate_official_(
    weight: torch.Tensor,
    base: torch.Tensor,
    gram: torch.Tensor,
    *,
    sparsity: float,
    score_weights: tuple[float, float] = (0.5, 0.5),
    block_size: int = 128,
    percdamp: float = 0.01,
    prunen: int = 0,
    prunem: int = 0,
    tops_mask: torch.Tensor | None = None,
    reproduce_nan: bool = True,
    backend: Backend = "auto",
) -> OfficialResult:
    """Turn a tuned weight in place into what ``decorate_official`` gives.

    Args:
        weight: tuned weight, float32/bfloat16/float16 ``[rows, cols]``; becomes the result.
        base: base weight of the same dtype; unchanged, in memory of its own.
        gram: the authors' H, float32 ``[cols, cols]``.
        sparsity: share of each block that goes back to base, in ``[0, 1)``.
        score_weights: of the delta's size and of the sensitivity.
        block_size: columns of a block; the last one may be narrower.
        percdamp: λ as a share of the mean diagonal.
        prunen: where not 0, ``prunen`` of each ``prunem`` columns go back, by sensitivity alone.
        prunem: see ``prunen``.
        tops_mask: bool ``[rows, cols]``, True where the weight goes back, in place of a score.
        reproduce_nan: keep rows whose scores are NaN, see ``decorate_official``.
        backend: see ``tailor_fast.backends()``.

    Returns:
        ``weight`` itself, mask, loss. Memory as ``decorate_official``, without the result.

    Raises:
        TypeError: as ``decorate_official``.
        ValueError: as ``decorate_official``, or ``weight`` and ``base`` overlap in memory.
        torch.linalg.LinAlgError: as ``decorate_official``.
    """
    op, dims = "decorate_official_", dict[str, int]()
    options = OfficialOptions(
        sparsity, score_weights, block_size, percdamp, prunen, prunem, reproduce_nan
    )
    check_weights(op, ("weight", weight), ("base", base), dims)
    check_official(op, weight, gram, tops_mask, options, dims)
    result = _OPS.decorate_official_(weight, base, gram, tops_mask, *options, backend)
    return OfficialResult(weight, *result)
