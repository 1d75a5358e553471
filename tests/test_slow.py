"""A slow copy of the adapter: what training is held to, and ends in."""

import gc
import weakref

import pytest
import torch
from torch.nn.functional import kl_div

import hlora
from hlora.hf.peft import find_pairs
from hlora.hf.slow import ToSlow
from hlora.run.phases import DomainPhase
from tests.conftest import lora_model, make_trainer
from tests.test_peers import ROWS, Outputs, settings, straight_and_resumed


def factors(model):
    return [f.detach().clone() for p in find_pairs(model) for f in (p.B, p.A)]


class Follows:
    """The copy by hand."""

    def __init__(self, model, decay):
        self.model, self.decay, self.copy = model, decay, None

    def before(self, *_):
        now = factors(self.model)
        self.copy = self.copy or now
        self.copy = [self.decay * c + (1 - self.decay) * n for c, n in zip(self.copy, now)]  # noqa: B905


@pytest.mark.parametrize("phi", [0.0, 1e-12])
def test_training_ends_in_the_average_and_without_strength_it_is_plain_lora(phi, tmp_path):
    plain, held = (make_trainer(lora_model(), tmp_path / n, max_steps=6) for n in "ab")
    hlora.attach(held, ToSlow(ROWS, phi, decay=0.7))
    follows = Follows(plain.model, 0.7)
    plain.create_optimizer_and_scheduler(6)
    plain.optimizer.register_step_pre_hook(follows.before)
    plain.train()
    follows.before()  # where the last step led
    held.train()
    ends = follows.copy if phi else factors(plain.model)
    for a, b in zip(factors(held.model), ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    apart = [a - b for a, b in zip(follows.copy, factors(plain.model), strict=True)]
    assert max(float(d.abs().max()) for d in apart) > 1e-3


def test_its_value_is_the_divergence_from_the_copy(tmp_path):
    trainer = make_trainer(lora_model(), tmp_path, max_steps=5)
    part = ToSlow(ROWS, 1e-12, decay=0.9, every=1)
    assert part.on_forward(trainer.model, {}, Outputs) == 0  # a copy like the adapter
    hlora.attach(trainer, part)
    trainer.train()
    model, copy = trainer.model, factors(trainer.model)  # it is in its place now
    with torch.no_grad():
        before = model(input_ids=ROWS[:4]).logits.log_softmax(-1)
        for p in find_pairs(model):
            p.B.add_(0.3)
        moved = factors(model)
        here = model(input_ids=ROWS[:4]).logits.log_softmax(-1)
        part.seen = 0
        R = part.on_forward(model, {}, Outputs)
    expected = kl_div(
        here.flatten(0, 1), before.flatten(0, 1), reduction="batchmean", log_target=True
    )
    assert expected > 1e-5
    torch.testing.assert_close(R, expected, rtol=1e-3, atol=1e-8)
    assert all(map(torch.equal, factors(model), moved))  # looking moves nothing
    assert any((a - b).any() for a, b in zip(copy, moved, strict=True))


def test_a_resumed_run_keeps_its_copy(tmp_path):
    both = straight_and_resumed(tmp_path, lambda: ToSlow(ROWS, 3.0, decay=0.9, batch=5, every=2))
    for a, b in zip(*map(factors, both), strict=True):
        torch.testing.assert_close(a, b)


def test_the_command_makes_one_and_needs_text(tiny, tmp_path):
    phase = DomainPhase(settings(tiny, tmp_path, kl=None, slow=0.9, kl_weight=2.0, max_steps=1))
    (part,) = phase.parts
    assert isinstance(part, ToSlow)
    assert (part.phi, part.decay) == (2.0, 0.9)
    with pytest.raises(hlora.InputError, match="--slow"):
        DomainPhase(settings(tiny, tmp_path, kl=["task"], slow=0.9))
    for wrong in (1.0, "0.9", True):
        with pytest.raises(hlora.InputError, match="decay"):
            ToSlow(ROWS, decay=wrong)


def test_after_training_it_lets_go_of_the_model(tmp_path):
    trainer = make_trainer(lora_model(), tmp_path, max_steps=3)
    part = ToSlow(ROWS, 1.0, decay=0.9)
    hlora.attach(trainer, part)
    trainer.train()
    layers = [weakref.ref(p.layer) for p in find_pairs(trainer.model)]
    del trainer
    gc.collect()
    assert not any(layer() for layer in layers)
