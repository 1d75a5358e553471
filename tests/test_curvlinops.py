"""The factors of whole sequences, against the empirical Fisher matrix of curvlinops."""

import pytest
import torch
from torch import nn

from hlora.core.importance.projected import project
from hlora.hf.peft import find_pairs
from tests.conftest import lora_model

curvlinops = pytest.importorskip("curvlinops", reason="curvlinops-for-pytorch is not installed")


class OfSequences(nn.Module):
    """A model whose prediction for a row is minus the log-likelihood of all its tokens."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, rows):
        logits = self.model(input_ids=rows[:, :-1]).logits
        return nn.functional.cross_entropy(logits.mT, rows[:, 1:], reduction="none").sum(1)[:, None]


@pytest.mark.filterwarnings("ignore")
def test_the_factors_are_partial_traces_of_the_empirical_fisher():
    """E[ggᵀ] and E[gᵀg] are those of E[vec(g) vec(g)ᵀ]."""
    model = lora_model(dtype=torch.float64).eval()
    model.set_attn_implementation("eager")  # it is differentiated forward too
    rows = torch.randint(3, 60, (6, 9), generator=torch.Generator().manual_seed(0))
    pairs = find_pairs(model)
    found = project(model, pairs, rows, rank=64, labels="corpus")
    of_sequences = OfSequences(model)
    # The squared error's gradient is the prediction's own where the two differ by a half.
    targets = of_sequences(rows).detach() - 0.5
    for pair in pairs:
        weight = pair.layer.base_layer.weight.requires_grad_()
        m, n = weight.shape
        fisher = curvlinops.EFLinearOperator(
            of_sequences, nn.MSELoss(), [weight], [(rows, targets)], check_deterministic=False
        )
        F = (fisher @ torch.eye(m * n, dtype=torch.float64)).reshape(m, n, m, n)
        of = found[pair.name]
        for kept, exact in (
            (of.U @ of.left @ of.U.mT, torch.einsum("ijkj->ik", F)),
            (of.V @ of.right @ of.V.mT, torch.einsum("ijik->jk", F)),
        ):
            assert exact.trace() > 0
            torch.testing.assert_close(kept, exact, rtol=1e-4, atol=1e-5 * float(exact.trace()))
