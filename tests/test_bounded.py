"""Sums in which a few runaways do not outweigh all others, against the same in one go."""

import pytest
import torch

from hlora.core.importance import bounded
from hlora.core.importance.bounded import Bounded
from hlora.errors import DivergedError


def in_one_go(sizes, part):
    """The shares and the sum, with all sequences at hand."""
    limit = bounded.LIMIT * sizes[sizes > 0].median() if sizes.any() else sizes.sum()
    most = -(-len(sizes) // bounded.RARE)
    if (sizes > limit).sum() > most:
        limit = sizes.sort().values[-most - 1]
    shares = torch.tensor([min(1.0, float(limit / s)) if s else 1.0 for s in sizes])
    return shares.double(), sum(w * p for w, p in zip(shares.tolist(), part, strict=True))


def summed(sizes, part, batch, count=None):
    sums = Bounded("layer", count or len(sizes))
    for s, p in zip(sizes.split(batch), part.split(batch), strict=True):
        sums.add(s, p, p.sum(1))
    shares, (total, of_rows) = sums.finish()
    torch.testing.assert_close(of_rows, total.sum(0))
    return shares, total


@pytest.mark.parametrize("batch", [1, 3, 40])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", [2, 5, 16, 17, 40])
def test_it_is_the_sum_in_one_go(count, seed, batch):
    draw = torch.Generator().manual_seed(seed)
    sizes = torch.rand(count, generator=draw, dtype=torch.float64) + 0.5
    sizes[torch.randperm(count, generator=draw)[: 1 + seed]] *= 10.0 ** (2 + seed)
    part = torch.randn(count, 3, 2, generator=draw, dtype=torch.float64)
    shares, total = summed(sizes, part, batch)
    expected, sums = in_one_go(sizes, part)
    torch.testing.assert_close(shares, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(total, sums, rtol=1e-6, atol=1e-6)


def test_a_runaway_counts_for_ten_medians_wherever_it_comes():
    for place in (0, 7, 63):
        sizes = torch.ones(64)
        sizes[place] = 1e6
        shares, total = summed(sizes, sizes[:, None, None].expand(-1, 1, 1), 8)
        assert float(total) == pytest.approx(63 + bounded.LIMIT)
        assert shares.argmin() == place
        assert (shares < 1).sum() == 1


def test_sequences_that_are_unlike_are_taken_as_they_are():
    """Each of many that are far from the median is no runaway: the largest sixteenth alone is cut
    down, to the next."""
    sizes = 2.0 ** torch.arange(32)
    shares, _ = summed(sizes, sizes[:, None, None], 8)
    assert (shares < 1).nonzero()[:, 0].tolist() == [30, 31]
    assert float((shares * sizes)[-1]) == 2.0**29


def test_an_expert_is_judged_by_the_sequences_that_reach_it():
    sizes = torch.zeros(64)
    sizes[5:15] = 1.0
    sizes[9] = 1e6
    shares, total = summed(sizes, sizes[:, None, None], 8)
    assert float(total) == pytest.approx(9 + bounded.LIMIT)
    sizes = torch.zeros(64)
    sizes[3] = 4.0
    shares, total = summed(sizes, sizes[:, None, None], 8)
    assert (shares == 1).all()
    assert float(total) == 4.0
    shares, total = summed(torch.zeros(4), torch.zeros(4, 2, 2), 2)
    assert (shares == 1).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 7])
def test_what_is_not_finite_is_named(bad, place):
    sizes = torch.ones(8)
    sizes[place] = bad
    with pytest.raises(DivergedError, match="at layer is not finite: try --dtype fp32"):
        summed(sizes, torch.ones(8, 2, 2), 3)
