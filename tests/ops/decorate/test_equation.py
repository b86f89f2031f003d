"""The losses of ``decorate_exact`` against equation (6) of the design, on explicit activations."""

from typing import NamedTuple

import pytest
import torch

from tailor_fast.ops.decorate import decorate_exact
from tailor_fast.testing import assert_within

ROWS, COLS, TOKENS, OLD = 9, 14, 60, 45
DAMPING = 0.07


class Streams(NamedTuple):
    """Two weights with biases, and the inputs of equation (6), ``[cols, tokens]``; all float64."""

    w0: torch.Tensor
    w1: torch.Tensor
    b0: torch.Tensor
    b1: torch.Tensor
    b_out: torch.Tensor
    x_t: torch.Tensor
    x_p: torch.Tensor
    x_b: torch.Tensor
    x_q: torch.Tensor
    beta: float

    def residual(self, patch: torch.Tensor) -> torch.Tensor:
        """The sum of squares of equation (6), as it is written."""
        out = self.w0 + patch
        new = self.w1 @ self.x_t + self.b1[:, None] - out @ self.x_p - self.b_out[:, None]
        old = self.w0 @ self.x_b + self.b0[:, None] - out @ self.x_q - self.b_out[:, None]
        pull = self.w1 - self.w0 - patch
        total = new.square().sum() / TOKENS + self.beta * old.square().sum() / OLD
        return (total + DAMPING * pull.square().sum()).reshape(1)

    def system(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Undamped Gram and right side in float32, and the target energy."""
        new = self.w1 @ self.x_t - self.w0 @ self.x_p + (self.b1 - self.b_out)[:, None]
        old = self.w0 @ (self.x_b - self.x_q) + (self.b0 - self.b_out)[:, None]
        gram = self.x_p @ self.x_p.T / TOKENS + self.beta * self.x_q @ self.x_q.T / OLD
        rhs = new @ self.x_p.T / TOKENS + self.beta * old @ self.x_q.T / OLD
        energy = new.square().sum() / TOKENS + self.beta * old.square().sum() / OLD
        return ((gram + gram.T) / 2).float(), rhs.float(), energy


def streams(beta: float) -> Streams:
    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float64)

    w0, x_t, x_b = normal(ROWS, COLS), normal(COLS, TOKENS), normal(COLS, OLD)
    w1 = (w0 + 0.1 * normal(ROWS, COLS)).float().double()
    w0 = w0.float().double()
    b0 = normal(ROWS)
    return Streams(
        w0,
        w1,
        b0,
        b0 + 0.1 * normal(ROWS),
        b0,
        x_t,
        x_t + 0.1 * normal(COLS, TOKENS),
        x_b,
        x_b + 0.1 * normal(COLS, OLD),
        beta,
    )


def plain_objective(
    s: Streams, gram: torch.Tensor, rhs: torch.Tensor, energy: torch.Tensor, patch: torch.Tensor
) -> torch.Tensor:
    """The objective from the normal equations, in float32."""
    p, pull = patch.float(), (s.w1 - s.w0 - patch).float()
    value = energy.float() - 2 * (p * rhs).sum() + (p @ gram * p).sum()
    return (value + DAMPING * pull.square().sum()).reshape(1)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_losses_are_the_residuals_of_the_streams(beta: float) -> None:
    s = streams(beta)
    gram, rhs, energy = s.system()
    delta, mask = (s.w1 - s.w0).float(), torch.rand(ROWS, COLS) < 0.4
    result = decorate_exact(delta, mask, gram, rhs, damping=DAMPING, target_energy=energy)
    for reported, patch in [
        (result.loss, result.patch.double()),
        (result.loss_undecorated, torch.where(mask, s.w1 - s.w0, 0)),
        (result.loss_reverted, torch.zeros_like(s.w0)),
    ]:
        plain = plain_objective(s, gram, rhs, energy, patch)
        assert_within(reported.reshape(1), s.residual(patch), plain)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_no_other_patch_answers_better(beta: float) -> None:
    """The patch against least squares on the stacked activations, row by row."""
    s = streams(beta)
    gram, rhs, energy = s.system()
    mask = torch.rand(ROWS, COLS) < 0.4
    delta = (s.w1 - s.w0).float()
    found = decorate_exact(delta, mask, gram, rhs, damping=DAMPING, target_energy=energy, tol=1e-12)
    scales = (TOKENS**-0.5, (s.beta / OLD) ** 0.5, DAMPING**0.5)
    eye = torch.eye(COLS, dtype=torch.float64)
    inputs = torch.cat([s.x_p.T * scales[0], s.x_q.T * scales[1], eye * scales[2]])
    new = s.w1 @ s.x_t - s.w0 @ s.x_p + (s.b1 - s.b_out)[:, None]
    old = s.w0 @ (s.x_b - s.x_q) + (s.b0 - s.b_out)[:, None]
    pull = s.w1 - s.w0
    answers = torch.cat([new * scales[0], old * scales[1], pull * scales[2]], dim=1)
    best, plain = torch.zeros_like(s.w0), torch.zeros_like(delta)
    for row, kept in enumerate(mask):
        index = kept.nonzero()[:, 0]
        best[row, index] = torch.linalg.lstsq(inputs[:, index], answers[row, :, None])[0][:, 0]
        a, b = gram + DAMPING * torch.eye(COLS), rhs + DAMPING * delta
        plain[row, index] = torch.linalg.solve(a[index][:, index], b[row, index])
    assert_within(found.patch, best, plain)
