"""Looks at the predictions that correct a quadratic while training."""

import pytest
import torch

import hlora
from hlora.core import looks
from hlora.core.pairs import group
from hlora.hf.divergence import divergences
from hlora.hf.gauge import Gauge
from hlora.hf.peft import find_pairs
from tests.conftest import lora_model, perturb
from tests.test_budget import WATCHED, gathered


@pytest.fixture
def base(tmp_path):
    return gathered(tmp_path / "base", WATCHED, WATCHED)


def reference(model, rows):
    """∇KL by autograd, by parameter."""
    ids = rows[:, :-1].long()
    with torch.no_grad(), model.disable_adapter():
        before = model(input_ids=ids).logits
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    kl = divergences(before, model(input_ids=ids).logits).mean()
    return dict(zip(trained, torch.autograd.grad(kl, list(trained.values())), strict=True))


def test_a_look_is_the_gradient_of_the_divergence_and_leaves_the_tasks_alone():
    model = lora_model()
    perturb(model)
    groups = group(find_pairs(model))
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0) if p.requires_grad else None
    found = Gauge(model, WATCHED).pull(WATCHED[:4], groups)
    assert all(p.grad.eq(7).all() for p in model.parameters() if p.requires_grad)
    wanted = reference(model, WATCHED[:4])
    for g, (dB, dA) in zip(groups, found, strict=True):
        for pair, b, a in zip(g.pairs, dB, dA, strict=True):
            for factor, d in ((pair.B, b), (pair.A, a)):
                name = next(n for n, p in model.named_parameters() if p is factor)
                torch.testing.assert_close(d, wanted[name], rtol=1e-3, atol=1e-7)
                assert d.any()


def test_at_a_look_the_pull_is_that_of_the_divergence(base, tmp_path):
    """With one step between looks and no earlier ones, R's own gradient is gone from it."""
    model = lora_model()
    perturb(model)
    penalty = hlora.Penalty(base, phi=0.25, look_every=1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    penalty.start(model, optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    wanted = reference(model, WATCHED[: looks.BATCH])
    optimizer.step()
    for n, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(before[n] - p, 0.25 * wanted[n], rtol=1e-3, atol=1e-6)
