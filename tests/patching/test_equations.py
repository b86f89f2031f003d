"""The normal equations against equation (6) written out over explicit samples in fp64."""

from __future__ import annotations

import pytest
import torch

from tailor_fast.calibration.moments import MomentSums
from tailor_fast.patching.equations import Equations, Layer, positive_damping
from tailor_fast.testing import assert_within

ROWS, COLS, TOKENS = 7, 10, 200


def _moments(actual: torch.Tensor, target: torch.Tensor | None):
    sums = MomentSums("layer")
    half = TOKENS // 2
    for part in (slice(0, half), slice(half, TOKENS)):
        sums.add(actual[part], None, "batch", None if target is None else target[part])
    return sums.finish()


def _objective(p, layer, streams, retain_scale, damping):
    """Equation (6) at ``p``, in its dtype; streams are (X_t, X_p, X_b, X_q), rows are tokens."""
    x_t, x_p, x_b, x_q = (None if x is None else x.to(p.dtype) for x in streams)
    tensors = (layer.base, layer.tuned, layer.base_bias, layer.tuned_bias, layer.out_bias)
    w0, w1, b0, b1, b_out = (tensor.to(p.dtype) for tensor in tensors)
    answer = x_p @ (w0 + p).T + b_out
    total = (x_t @ w1.T + b1 - answer).square().sum() / TOKENS
    if x_b is not None:
        kept = x_b @ w0.T + b0 - x_q @ (w0 + p).T - b_out
        total += retain_scale * kept.square().sum() / TOKENS
    return total + damping * (w1 - w0 - p).square().sum()


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("bias", ["base", "tuned"])
def test_system_is_the_gradient_of_equation_6(retain: bool, moved: bool, bias: str) -> None:
    w0, x_p = torch.randn(ROWS, COLS), torch.randn(TOKENS, COLS) + 0.3
    w1 = w0 + 0.1 * torch.randn(ROWS, COLS)
    b0, b1 = torch.randn(ROWS), torch.randn(ROWS)
    layer = Layer(w0, w1, b0, b1, b0 if bias == "base" else b1)
    x_t = x_p + 0.2 * torch.randn(TOKENS, COLS) if moved else x_p
    x_b = torch.randn(TOKENS, COLS) - 0.2 if retain else None
    x_q = x_b + 0.1 * torch.randn(TOKENS, COLS) if retain and moved else x_b
    new = _moments(x_p, x_t if moved else None)
    old = None if x_b is None else _moments(x_q, x_b if moved else None)
    system = Equations(new, old, percdamp=0.05, retain_weight=0.3).system(layer)

    delta = w1 - w0
    rhs = delta @ system.gram if system.rhs is None else system.rhs
    p = torch.randn(ROWS, COLS)

    def written_out(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Gradient at ``p`` and objective at zero."""
        streams = (x_t, x_p, x_b, x_q)
        at = p.to(dtype).requires_grad_()
        value = _objective(at, layer, streams, system.retain_scale, system.damping)
        (gradient,) = torch.autograd.grad(value, at)
        zero = torch.zeros_like(at)
        return gradient, _objective(zero, layer, streams, system.retain_scale, system.damping)

    expected, plain = written_out(torch.float64), written_out(torch.float32)
    damped = system.gram + system.damping * torch.eye(COLS)
    gradient = 2 * (p @ damped - rhs - system.damping * delta)
    assert_within(gradient, expected[0], plain[0])
    assert (system.rhs is None) == (system.target_energy is None)
    if system.target_energy is None:
        return
    at_zero = system.target_energy + system.damping * delta.double().square().sum()
    assert_within(at_zero, expected[1].detach(), plain[1].detach())


def test_no_right_hand_side_where_the_answer_is_delta_x() -> None:
    w0, x = torch.randn(ROWS, COLS), torch.randn(TOKENS, COLS)
    layer = Layer(w0, w0 + 1.0, None, None, None)
    system = Equations(_moments(x, None), None, 0.01, 0.1).system(layer)
    assert system.rhs is None


def test_retention_is_scaled_to_the_new_task() -> None:
    w0, x = torch.randn(ROWS, COLS), torch.randn(TOKENS, COLS)
    layer = Layer(w0, w0 + 0.1, None, None, None)
    new = _moments(x, None)
    old, large = _moments(x, None), _moments(100.0 * x, None)
    damping = positive_damping(new.diag, 0.01)
    near = Equations(new, old, 0.01, 0.5).system(layer)
    far = Equations(new, large, 0.01, 0.5).system(layer)
    assert near.retain_scale == pytest.approx(0.5 * (1 + 0.01), rel=1e-5)
    assert far.retain_scale == pytest.approx(near.retain_scale / 1e4, rel=1e-5)
    assert far.damping == pytest.approx(damping)
    exact = (1 + near.retain_scale) * (x.double().T @ x.double()) / TOKENS
    plain = (1 + near.retain_scale) * (x.T @ x) / TOKENS
    assert_within(near.gram, exact, plain)
    assert_within(far.gram, exact, plain)
