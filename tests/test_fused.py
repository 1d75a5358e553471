"""The kernels against the reference in float64, under Triton's interpreter where no GPU is."""

import pytest
import torch

from hlora.logcodes import LogCodes
from hlora.lowrank import LowRank
from hlora.ops import reference
from tests.test_ops import error
from tests.test_storage import heavy_tailed

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 16, 16, 1), (2, 65, 130, 3), (3, 7, 200, 8), (1, 129, 33, 20), (2, 1, 1, 2)]


@pytest.fixture(scope="module")
def fused():
    from hlora.ops import fused

    return fused


def rand(*shape):
    return torch.randn(*shape, device=DEVICE)


def doubled(change):
    return LowRank(change.P.double(), change.Q.double())


@pytest.mark.parametrize(("L", "m", "n", "r"), SHAPES)
def test_accumulate(fused, L, m, n, r):
    omega = rand(L, m, n)
    gradient, step = (
        LowRank(rand(L, m, r), rand(L, r, n)),
        LowRank(rand(L, m, 2 * r), rand(L, 2 * r, n)),
    )
    truth, plain = omega.double(), omega.clone()
    reference.accumulate(truth, doubled(gradient), doubled(step))
    reference.accumulate(plain, gradient, step)
    fused.accumulate(omega, gradient, step)
    assert error(omega.double(), truth) <= 2 * error(plain.double(), truth) + 1e-7


@pytest.mark.parametrize(("L", "m", "n", "r"), SHAPES)
@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16", "int8"])
def test_weigh(fused, L, m, n, r, storage):
    Omega = heavy_tailed(L, m, n).to(DEVICE)
    if storage == "int8":
        kept = LogCodes.encode(Omega)
    elif storage == "fp16":
        kept = (Omega / Omega.max()).half()
    else:
        kept = Omega.to({"fp32": torch.float32, "bf16": torch.bfloat16}[storage])
    change = LowRank(rand(L, m, r), rand(L, r, n))
    truth = reference.weigh(kept.to(torch.float64), doubled(change))
    plain = reference.weigh(kept, change)
    ours = fused.weigh(kept, change)
    for a, b, t in zip(ours, plain, truth, strict=True):
        assert error(a.double(), t) <= 2 * error(b.double(), t) + 1e-6


def test_the_same_input_gives_the_same_bits(fused):
    change, Omega = LowRank(rand(2, 65, 4), rand(2, 4, 90)), heavy_tailed(2, 65, 90).to(DEVICE)
    one, two = fused.weigh(Omega, change), fused.weigh(Omega, change)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_factors_that_are_views_are_read_right(fused):
    P, Q = rand(2, 4, 33).mT, rand(2, 50, 4).mT
    Omega = heavy_tailed(2, 33, 50).to(DEVICE)
    ours, plain = fused.weigh(Omega, LowRank(P, Q)), reference.weigh(Omega, LowRank(P, Q))
    for a, b in zip(ours, plain, strict=True):
        assert error(a, b) < 1e-5
