"""LoRA from CorDA's start: the base model at first, and plain LoRA at last."""

import pytest
import torch

import hlora
from hlora.hf.corda import Corda
from hlora.hf.peft import find_pairs, starts_at_base
from hlora.run.models import load, load_adapter
from hlora.run.phases import DomainPhase
from tests.conftest import base_model, token_rows
from tests.test_peers import settings

IDS = torch.arange(3, 40)[None]
# PEFT 0.18 says it of the settings that its own preparation has left in the model.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


@torch.no_grad()
def logits(model, ids=IDS):
    return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("rslora", [False, True])
def test_it_starts_at_the_base_model_and_ends_as_plain_lora_there(rslora, tiny, tmp_path):
    given = settings(
        tiny, tmp_path, corda=None, dtype="fp32", max_steps=6, learning_rate=0.02, lora_rank=2,
        rslora=rslora,
    )  # fmt: skip
    phase, base = DomainPhase(given), load(str(tiny))[0]
    before = logits(base)
    torch.testing.assert_close(logits(phase.model), before, rtol=1e-4, atol=1e-5)
    assert all(p.B.any() for p in find_pairs(phase.model))
    inside = phase.corda.model
    phase.run()
    loaded = load_adapter(base, tmp_path / "o", trainable=True)
    assert {p.shape[2] for p in find_pairs(loaded)} == {4}
    assert starts_at_base(loaded)
    found = logits(loaded)
    assert (found - before).abs().max() > 1e-3
    torch.testing.assert_close(found, logits(phase.model), rtol=1e-4, atol=1e-5)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded), before)
    assert inside is not phase.model


def test_the_change_is_what_was_learned(tmp_path):
    """s(BA − B₀A₀), by matrix."""
    from peft import LoraConfig

    rows = torch.tensor([r["input_ids"] for r in token_rows(12)])
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
    base = base_model()
    of = Corda(base, config, rows)
    first = {p.name: p.s * (p.B @ p.A).detach() for p in of.pairs}
    weights = dict(base_model().named_modules())
    for p in of.pairs:  # taken out of the base weights: the least of W·C, not of W
        torch.testing.assert_close(
            p.weight + first[p.name], weights[p.name].weight, rtol=1e-4, atol=1e-6
        )
        least = torch.linalg.svdvals(weights[p.name].weight)[-2:].norm()
        assert first[p.name].norm() > 1.001 * least
    with torch.no_grad():
        for p in of.pairs:
            p.B.add_(0.1 * torch.randn_like(p.B))
    moved = {p.name: p.s * (p.B @ p.A).detach() - first[p.name] for p in of.pairs}
    for p in of.plain()[1]:
        torch.testing.assert_close(p.s * (p.B @ p.A), moved[p.name], rtol=1e-4, atol=1e-6)


def test_what_it_cannot_go_with_is_refused(tiny, tmp_path):
    with pytest.raises(hlora.InputError, match="--corda"):
        DomainPhase(settings(tiny, tmp_path, corda=None, kl=["task"]))
    with pytest.raises(hlora.InputError, match="--peft"):
        DomainPhase(settings(tiny, tmp_path, corda=None, peft={"peft_type": "OFT"}))
