"""The tiled operations against the equations on dense float64 matrices."""

import pytest
import torch

from hlora.core import ops
from hlora.core.estimators import equivalent, projected
from hlora.core.lowrank import LowRank
from hlora.core.ops import reference as tiled
from tests import reference

SHAPES = [(1, 5, 7, 2), (3, 8, 8, 4), (2, 33, 17, 3), (4, 1, 9, 1), (2, 12, 1, 8)]


def rand(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def eye(L, n):
    return torch.eye(n, dtype=torch.float64).expand(L, n, n)


def error(a, b):
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


@pytest.fixture(params=[1 << 20, 16], ids=["one tile", "many tiles"])
def _tile(request, monkeypatch):
    monkeypatch.setattr(tiled, "TILE", request.param)


@pytest.mark.usefixtures("_tile")
@pytest.mark.parametrize(("L", "m", "n", "r"), SHAPES)
def test_one_recorded_step_is_eq_10_to_12(L, m, n, r):
    B0, A0, B1, A1 = rand(L, m, r), rand(L, r, n), rand(L, m, r), rand(L, r, n)
    gB, gA, s, omega = rand(L, m, r), rand(L, r, n), rand(L, 1, 1).abs(), rand(L, m, n)
    dense = reference.equivalent_gradient(B0, A0, gB, gA, 0.3)
    expected = reference.path_integral_step(omega, dense, B0, A0, B1, A1, s)
    ops.accumulate(omega, equivalent(B0, A0, gB, gA, s, 0.3), LowRank.moved(B0, A0, B1, A1, s))
    assert error(omega, expected) < 1e-12


@pytest.mark.usefixtures("_tile")
@pytest.mark.parametrize(("L", "m", "n", "r"), SHAPES)
def test_consolidation_is_eq_13(L, m, n, r):
    delta, omega = LowRank(rand(L, m, r), rand(L, r, n)), rand(L, m, n)
    expected = reference.consolidated(omega, delta.P @ delta.Q, 1e-3)
    negatives = int((omega < 0).sum())
    assert int(ops.consolidate(omega, delta, torch.tensor(1e-3, dtype=torch.float64))) == negatives
    assert error(omega, expected) < 1e-12
    assert (omega >= 0).all()


@pytest.mark.usefixtures("_tile")
@pytest.mark.parametrize(("L", "m", "n", "r"), SHAPES)
def test_penalty_and_gradients_are_autograd_s(L, m, n, r):
    D, Omega = rand(L, m, n), rand(L, m, n).abs()
    B, A = rand(L, m, r).requires_grad_(), rand(L, r, n).requires_grad_()
    change = LowRank(torch.cat([B.detach(), D], dim=2), torch.cat([A.detach(), eye(L, n)], dim=1))
    expected = (Omega * (B @ A + D) ** 2).sum(dim=(1, 2))
    eB, eA = torch.autograd.grad(expected.sum(), (B, A))
    values, dB, dA = ops.weigh(Omega, change, B.detach(), A.detach())
    assert error(values, expected.detach()) < 1e-12
    assert error(2 * dB, eB) < 1e-12
    assert error(2 * dA, eA) < 1e-12


@pytest.mark.parametrize(("L", "m", "n", "r"), SHAPES)
def test_float32_errs_at_most_twice_as_much_as_plain_torch(L, m, n, r):
    P, Q, Omega = rand(L, m, r), rand(L, r, n), rand(L, m, n).abs()
    truth = (Omega * (P @ Q) ** 2).sum(dim=(1, 2))
    P32, Q32, O32 = P.float(), Q.float(), Omega.float()
    plain = (O32 * (P32 @ Q32) ** 2).sum(dim=(1, 2))
    ours = ops.weigh(O32, LowRank(P32, Q32), P32, Q32)[0]
    assert error(ours.double(), truth) <= 2 * error(plain.double(), truth) + 1e-6


def test_projection_needs_only_the_factors_gradients():
    L, m, n, r = 3, 9, 7, 2
    B, A, G, s = rand(L, m, r), rand(L, r, n), rand(L, m, n), rand(L, 1, 1).abs()
    gB, gA = s * G @ A.mT, s * B.mT @ G
    ours = projected(B, A, gB, gA, s, 0.0)
    for l in range(L):
        expected = reference.projected_gradient(G[l], B[l], A[l])
        assert error(ours.P[l] @ ours.Q[l], expected) < 1e-8


def test_projection_at_the_start_has_only_directions_of_b():
    B, A, G, s = torch.zeros(1, 5, 2, dtype=torch.float64), rand(1, 2, 6), rand(1, 5, 6), 1.0
    ours = projected(B, A, s * G @ A.mT, s * B.mT @ G, torch.ones(1, 1, 1), 0.0)
    expected = G[0] @ torch.linalg.pinv(A[0]) @ A[0]
    assert error(ours.P[0] @ ours.Q[0], expected) < 1e-8


@pytest.mark.parametrize("frozen", ["A", "B"])
def test_projection_with_a_frozen_factor(frozen):
    B, A, G = rand(1, 5, 2), rand(1, 2, 6), rand(1, 5, 6)
    gB, gA = G @ A.mT, B.mT @ G
    zero = torch.zeros_like
    ours = projected(
        B, A, zero(gB) if frozen == "B" else gB, zero(gA) if frozen == "A" else gA,
        torch.ones(1, 1, 1), 0.0, trains_A=frozen != "A", trains_B=frozen != "B",
    )  # fmt: skip
    P_A, P_B = torch.linalg.pinv(A[0]) @ A[0], B[0] @ torch.linalg.pinv(B[0])
    expected = G[0] @ P_A if frozen == "A" else P_B @ G[0]
    assert error(ours.P[0] @ ours.Q[0], expected) < 1e-8


def test_a_small_move_keeps_its_digits():
    """In float32, B₁A₁ − B₀A₀ of a step of 1e-6 would keep about one digit."""
    B0, A0 = rand(1, 20, 4), rand(1, 4, 30)
    B0, A0 = B0.float(), A0.float()
    B1, A1 = B0 + 1e-6 * torch.randn_like(B0), A0 + 1e-6 * torch.randn_like(A0)
    s = torch.full((1, 1, 1), 2.0)
    truth = 2 * (B1.double() @ A1.double() - B0.double() @ A0.double())
    moved = LowRank.moved(B0, A0, B1, A1, s)
    assert error(moved.P.double() @ moved.Q.double(), truth) < 1e-6
    assert float(moved.sum_of_squares()) == pytest.approx(float((truth**2).sum()), rel=1e-4)


def test_thin_matrices_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="do not fit"):
        LowRank(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2))
