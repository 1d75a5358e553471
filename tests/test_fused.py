"""The kernels against the reference in float64, under Triton's interpreter where no GPU is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hlora.logcodes import LogCodes
from hlora.lowrank import LowRank
from hlora.ops import reference
from tests.test_ops import error
from tests.test_storage import heavy_tailed

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [
    (1, 16, 16, 1),
    (2, 65, 130, 3),
    (3, 7, 200, 8),
    (1, 520, 33, 20),
    (2, 1, 1, 2),
    (1, 70, 40, 33),
    (1, 40, 35, 100),
    (1, 34, 33, 130),
]


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


@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_several_launches_find_what_one_does(fused, storage, monkeypatch):
    """Matrices whose partial gradients do not fit beside each other are taken in turn."""
    Omega = heavy_tailed(5, 300, 40).to(DEVICE)
    kept = LogCodes.encode(Omega) if storage == "int8" else Omega
    change = LowRank(rand(5, 300, 4), rand(5, 4, 40))
    one = fused.weigh(kept, change)
    monkeypatch.setattr(fused, "PARTIAL", 2 * 4 * 2 * 4 * 40)  # two of the five matrices
    two = fused.weigh(kept, change)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_wide_factors_are_left_to_plain_torch(fused):
    assert fused.fits(LowRank(rand(1, 4, 256), rand(1, 256, 4)))
    assert not fused.fits(LowRank(rand(1, 4, 257), rand(1, 257, 4)))


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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_tiles_fit_the_shared_memory_of_small_gpus():
    """Compiled for compute capability 8.9, whose 99 KiB a block are the least of the usual ones."""
    root = Path(__file__).parents[1]
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernel_resources", "89"], cwd=root, capture_output=True,
        text=True, env={**os.environ, "TRITON_INTERPRET": "0"}, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert len(found) == 6
    assert {k: v for k, v in found.items() if not 0 < v <= 99 * 1024} == {}
