"""Tokens drawn in two steps are distributed as those of torch.multinomial."""

from __future__ import annotations

import pytest
import torch

from hlora.core import sampling
from hlora.core.sampling import drawn, in_two_steps

DRAWS = 40_000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("vocabulary", [3, 256, 257, 700])
@pytest.mark.parametrize("draw", [in_two_steps, torch.multinomial])
def test_each_token_comes_as_often_as_it_should(draw, vocabulary):
    weights = torch.rand(vocabulary, generator=seeded(vocabulary)) ** 4
    weights[::3] *= torch.rand(1, generator=seeded(1))
    rows = weights.expand(DRAWS, -1)
    found = draw(rows, *([1] * (draw is torch.multinomial)), generator=seeded()).flatten()
    counts = torch.bincount(found, minlength=vocabulary).double()
    expected = DRAWS * (weights / weights.sum()).double()
    large = expected > 5  # the others together, as chi-square needs
    pairs = [(counts[large], expected[large]), (counts[~large].sum(), expected[~large].sum())]
    chi2 = sum(float(((o - e) ** 2 / e.clamp(min=1e-9)).sum()) for o, e in pairs if e.sum() > 5)
    freedom = int(large.sum())
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5 + 5


@pytest.mark.parametrize("uniform", [0.0, 1.0])  # below 1, and rounded up when it is multiplied
def test_what_has_no_weight_is_never_drawn(uniform, monkeypatch):
    monkeypatch.setattr(
        torch, "rand", lambda *size, **kind: torch.full(size, uniform, dtype=kind["dtype"])
    )
    weights = torch.zeros(4, 600)
    weights[0, 0] = weights[1, 599] = weights[2, 255] = weights[3, 256] = 1e-30
    assert in_two_steps(weights, seeded()).tolist() == [0, 599, 255, 256]
    some = torch.zeros(1, 600)
    some[0, [300, 310, 320]] = torch.tensor([0.1, 0.7, 0.2])
    assert in_two_steps(some, seeded()).tolist() == [300 if uniform == 0 else 320]


def test_rows_are_drawn_each_by_its_own_logits():
    logits = torch.full((3, 500), -40.0)
    logits[0, 7] = logits[1, 499] = logits[2, 256] = 40.0
    assert drawn(logits, seeded()).tolist() == [7, 499, 256]
    assert (
        drawn(torch.randn(5, 500), seeded(3)).tolist()
        != drawn(torch.randn(5, 500), seeded(4)).tolist()
    )


def test_another_device_draws_by_itself(monkeypatch):
    monkeypatch.setattr(sampling, "in_two_steps", lambda *given: pytest.fail("meant for a CPU"))

    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("cuda")

    logits = torch.zeros(2, 3)
    monkeypatch.setattr(
        torch.Tensor, "softmax", lambda t, d: torch.softmax(t, d).as_subclass(Elsewhere)
    )
    assert drawn(logits, seeded()).shape == (2,)
