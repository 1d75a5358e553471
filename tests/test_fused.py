"""The kernels against the reference in float64, under Triton's interpreter where no GPU is."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hlora.core import ops
from hlora.core.logcodes import LogCodes
from hlora.core.lowrank import LowRank
from hlora.core.ops import reference
from tests.test_ops import error
from tests.test_storage import heavy_tailed

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def some_shapes(count, seed=0):
    """(L, m, n, r), any of them odd, with the extremes among them."""
    draw = random.Random(seed)
    extremes = [(2, 1, 1, 2), (1, 16, 16, 1), (1, 520, 33, 20), (1, 33, 70, 128)]
    return extremes + [
        (draw.randint(1, 3), draw.randint(1, 200), draw.randint(1, 200), draw.randint(1, 40))
        for _ in range(count)
    ]


SHAPES = some_shapes(8)


@pytest.fixture(scope="module")
def fused():
    from hlora.core.ops import fused

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


@pytest.mark.parametrize("block", [64, 512], ids=["many blocks", "large blocks"])
@pytest.mark.parametrize(("L", "m", "n", "r"), SHAPES)
@pytest.mark.parametrize("storage", ["fp32", "fp16", "bf16", "int8"])
def test_weigh(fused, L, m, n, r, storage, block, monkeypatch):
    monkeypatch.setattr(fused, "BLOCK", block)
    Omega = heavy_tailed(L, m, n).to(DEVICE)
    if storage == "int8":
        kept = LogCodes.encode(Omega)
    elif storage == "fp16":
        kept = (Omega / Omega.max()).half()
    else:
        kept = Omega.to({"fp32": torch.float32, "bf16": torch.bfloat16}[storage])
    change = LowRank(rand(L, m, 2 * r), rand(L, 2 * r, n))
    left, right = rand(L, m, r), rand(L, r, n)
    exact = left.double(), right.double()
    truth = reference.weigh(kept.to(torch.float64), doubled(change), *exact)
    plain = reference.weigh(kept, change, left, right)
    ours = fused.weigh(kept, change, left, right)
    for a, b, t in zip(ours, plain, truth, strict=True):
        assert error(a.double(), t) <= 2 * error(b.double(), t) + 1e-6


def sides(change):
    return change, change.P, change.Q


@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_several_launches_find_what_one_does(fused, storage, monkeypatch):
    """Matrices whose partial gradients do not fit beside each other are taken in turn."""
    Omega = heavy_tailed(5, 600, 40).to(DEVICE)
    kept = LogCodes.encode(Omega) if storage == "int8" else Omega
    change = LowRank(rand(5, 600, 4), rand(5, 4, 40))
    one = fused.weigh(kept, *sides(change))
    monkeypatch.setattr(fused, "PARTIAL", 2 * 4 * 4 * (2 * 40 + 600))  # two of the five matrices
    two = fused.weigh(kept, *sides(change))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_what_the_kernels_take():
    omega = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    assert ops._fits(omega, rank=128)
    assert not ops._fits(omega, rank=129)
    assert not ops._fits(SimpleNamespace(is_cuda=True, dtype=torch.float64))
    assert not ops._fits(torch.ones(1).cpu())


def compilation_error():
    from triton.compiler.errors import CompilationError

    return CompilationError("", SimpleNamespace(lineno=1, col_offset=1), "no such type")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Failed to find C compiler."), ImportError("no libcuda"), compilation_error()],
    ids=["compiler", "import", "kernel"],
)
def test_plain_torch_takes_over_where_triton_does_not_work(fused, monkeypatch, caplog, error):
    tried = []

    def broken(*args):
        tried.append(args)
        raise error

    monkeypatch.setattr(ops, "_fits", lambda *_, **__: True)
    monkeypatch.setattr(ops, "_given_up", False)
    monkeypatch.setattr(fused, "weigh", broken)
    monkeypatch.setattr(fused, "accumulate", broken)
    Omega, change = rand(2, 9, 7), LowRank(rand(2, 9, 4), rand(2, 4, 7))
    for ours, plain in zip(
        ops.weigh(Omega, *sides(change)), reference.weigh(Omega, *sides(change)), strict=True
    ):
        assert torch.equal(ours, plain)
    before = Omega.clone()
    ops.accumulate(Omega, change, change)
    assert not torch.equal(Omega, before)
    assert len(tried) == 1  # not again at each step
    assert [r.getMessage() for r in caplog.records if type(error).__name__ in r.getMessage()]


@pytest.mark.parametrize("raised", [torch.OutOfMemoryError, ValueError, IndexError, RuntimeError])
def test_a_full_gpu_or_a_bug_is_no_reason_to_give_the_kernels_up(fused, monkeypatch, raised):
    def full(*args):
        raise raised

    monkeypatch.setattr(ops, "_fits", lambda *_, **__: True)
    monkeypatch.setattr(fused, "weigh", full)
    change = LowRank(rand(1, 9, 4), rand(1, 4, 7))
    with pytest.raises(raised):
        ops.weigh(rand(1, 9, 7), *sides(change))
    assert not ops._given_up


def test_the_same_input_gives_the_same_bits(fused):
    change, Omega = LowRank(rand(2, 65, 4), rand(2, 4, 90)), heavy_tailed(2, 65, 90).to(DEVICE)
    one, two = fused.weigh(Omega, *sides(change)), fused.weigh(Omega, *sides(change))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_factors_that_are_views_are_read_right(fused):
    change = LowRank(rand(2, 4, 33).mT, rand(2, 50, 4).mT)
    Omega = heavy_tailed(2, 33, 50).to(DEVICE)
    ours = fused.weigh(Omega, *sides(change))
    for a, b in zip(ours, reference.weigh(Omega, *sides(change)), strict=True):
        assert error(a, b) < 1e-5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_the_kernels_fit_a_small_gpu():
    """Compiled for compute capability 8.9, whose 99 KiB a block are the least of the usual ones.

    In a process of its own: where the interpreter is on, nothing can be compiled.
    """
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels", "--capability", "89", "--print"],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300,
        env={**os.environ, "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    rows = json.loads(run.stdout.splitlines()[-1])["rows"]
    assert {r["kernel"] for r in rows} == {"record", "penalty"}
    assert [r for r in rows if not 0 < r["shared_bytes"] <= 99 * 1024] == []
    assert [r for r in rows if r["stack_bytes"] > 32] == []  # spilled registers
