"""Regularizers of one's own, attached to a real Trainer."""

import shutil

import pytest
import torch
import transformers

import hlora
from hlora.core.pairs import group
from hlora.core.steps import steps_of
from hlora.hf.peft import find_pairs
from hlora.hf.regularize import Regularization
from tests.conftest import lora_model, make_trainer, token_rows


class Decay(hlora.Regularizer):
    """R = Σ ‖B‖²/2: a closed form."""

    def __init__(self, phi):
        self.phi = phi

    def before_step(self, groups):
        B = [g.factors()[0] for g in groups]
        R = sum(b.double().square().sum() for b in B) / 2
        gradients = [(self.phi * b, torch.zeros_like(g.factors()[1]))
                     for b, g in zip(B, groups, strict=True)]  # fmt: skip
        return hlora.Pull(R, gradients)


class Entropy(hlora.Regularizer):
    """R = mean negative entropy of the predictions: depends on the data."""

    def __init__(self, phi):
        self.phi, self.calls = phi, 0

    def on_forward(self, model, inputs, outputs):
        self.calls += 1
        p = outputs.logits.log_softmax(-1)
        return (p.exp() * p).sum(-1).mean()


def train(folder, *parts, rows=None, **settings):
    model = lora_model(dtype=torch.float64)
    trainer = make_trainer(model, folder, rows=rows or token_rows(seed=2), **settings)
    hlora.attach(trainer, *parts)
    trainer.train()
    return model, trainer


def test_a_closed_form_is_added_to_the_gradients_once(tmp_path):
    """Against weight decay of plain SGD on B alone."""
    ours, _ = train(tmp_path / "a", Decay(0.3), optim="sgd", max_grad_norm=0)
    model = lora_model(dtype=torch.float64)
    pairs = find_pairs(model)
    trainer = make_trainer(model, tmp_path / "b", rows=token_rows(seed=2), max_grad_norm=0)
    trainer.optimizer = torch.optim.SGD(
        [{"params": [p.B for p in pairs], "weight_decay": 0.3}, {"params": [p.A for p in pairs]}],
        lr=1e-2,
    )
    trainer.train()
    for p, q in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
def test_what_depends_on_data_does_not_grow_with_accumulation(tmp_path, micro_batches):
    """One row a micro-batch has as many tokens as another, so means of means are means."""

    def run(name, k):
        return train(
            tmp_path / name, Entropy(5.0), per_device_train_batch_size=8 // k,
            gradient_accumulation_steps=k, max_steps=3,
        )  # fmt: skip

    (whole, one), (cut, several) = run("one", 1), run("several", micro_batches)
    for p, q in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-8)
    a, b = one.state.log_history[0], several.state.log_history[0]
    for key in ("loss", "R", "penalty", "total_loss"):
        assert a[key] == pytest.approx(b[key], rel=1e-4)


def test_it_acts_on_training_and_leaves_the_logged_loss_the_task_s(tmp_path):
    free, plain = train(tmp_path / "a", max_steps=1, logging_steps=1)
    entropy = Entropy(5.0)
    held, trainer = train(tmp_path / "b", entropy, max_steps=1, logging_steps=1)
    entry = trainer.state.log_history[0]
    assert entropy.calls == 1
    assert entry["loss"] == pytest.approx(plain.state.log_history[0]["loss"])
    assert entry["total_loss"] == pytest.approx(entry["loss"] + 5.0 * entry["R"])
    assert entry["R"] < 0
    assert any(
        not torch.equal(p, q) for p, q in zip(free.parameters(), held.parameters(), strict=True)
    )


def test_two_add_up_in_gradient_and_log(tmp_path):
    one, _ = train(tmp_path / "a", Decay(0.5), max_grad_norm=0)
    two, trainer = train(tmp_path / "b", Decay(0.2), Decay(0.3), max_grad_norm=0)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    entry = trainer.state.log_history[-2]
    assert entry["penalty"] == pytest.approx(0.25 * entry["R"])  # R is the sum of both
    assert sum("R" in e for e in trainer.state.log_history) == 3


def test_phi_may_change_while_training(tmp_path):
    class Steer(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            decay.phi = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2][state.global_step]

    decay, values = Decay(0.0), []
    before = decay.before_step

    def watched(groups):
        pull = before(groups)
        values.append((float(pull.R), decay.phi))
        return pull

    decay.before_step = watched
    model = lora_model(dtype=torch.float64)
    trainer = make_trainer(model, tmp_path, [Steer()], logging_steps=3)
    hlora.attach(trainer, decay)
    trainer.train()
    logged = [e for e in trainer.state.log_history if "R" in e]
    for entry, part in zip(logged, (values[:3], values[3:]), strict=True):
        assert entry["penalty"] == pytest.approx(sum(R * phi for R, phi in part) / 3)
        assert entry["R"] == pytest.approx(sum(R for R, _ in part) / 3)


def test_two_may_act_on_different_matrices(tmp_path):
    """Each pulls its own: q_proj by one, v_proj by another."""
    model = lora_model(dtype=torch.float64)
    for p in find_pairs(model):
        torch.nn.init.normal_(p.B)
    groups = {g.pairs[0].target: g for g in group(find_pairs(model))}
    optimizer = torch.optim.SGD([f for p in find_pairs(model) for f in (p.A, p.B)], lr=0.1)
    steps = steps_of(optimizer)
    steps.add(Decay(0.5), [groups["q_proj"]])
    steps.add(Decay(0.25), [groups["v_proj"], groups["q_proj"]])
    steps.regularize(optimizer)
    for p in find_pairs(model):
        torch.testing.assert_close(p.B.grad, (0.75 if p.target == "q_proj" else 0.25) * p.B)


def test_what_acts_on_data_must_join_the_loss(tmp_path):
    trainer = make_trainer(lora_model(), tmp_path)
    trainer.add_callback(Regularization(Entropy(1.0)))
    with pytest.raises(hlora.InputError, match="attach"):
        trainer.train()


def test_a_tensor_phi_survives_the_start_and_a_resume(tmp_path, nu):
    phi = torch.tensor(0.5)
    settings = {"save_strategy": "steps", "save_steps": 3}
    penalty = hlora.Penalty(nu)
    penalty.phi = phi
    make_trainer(lora_model(), tmp_path, [penalty], **settings).train()
    assert penalty.phi is phi
    resumed = hlora.Penalty(nu)
    resumed.phi = steered = torch.tensor(9.0)
    trainer = make_trainer(lora_model(), tmp_path, [resumed], **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.phi is steered
    assert float(steered) == 0.5


def test_a_penalty_without_its_state_goes_on_with_a_warning(tmp_path, nu, caplog):
    settings = {"save_strategy": "steps", "save_steps": 3}
    make_trainer(lora_model(), tmp_path, **settings).train()
    trainer = make_trainer(lora_model(), tmp_path, [hlora.Penalty(nu)], **settings)
    with caplog.at_level("WARNING", "hlora"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "hlora_penalty" in caplog.text


def test_attached_twice_or_trained_twice_it_acts_once(tmp_path):
    decay = Decay(0.3)
    model = lora_model(dtype=torch.float64)
    trainer = make_trainer(model, tmp_path, max_steps=2)
    hlora.attach(trainer, decay)
    trainer.train()
    trainer.args.max_steps = 4
    trainer.train()
    assert [r for r, _ in steps_of(trainer.optimizer).regularizers] == []
    calls = []
    decay.before_step = lambda groups: calls.append(1)
    trainer.train()
    assert len(calls) == 4


def test_an_importance_is_held_to_once_and_a_folder_written_once(tmp_path, nu):
    again = shutil.copytree(nu, tmp_path / "again")
    trainer = make_trainer(lora_model(), tmp_path)
    with pytest.raises(hlora.InputError, match="which would count twice"):
        hlora.attach(trainer, hlora.Penalty(nu), hlora.Penalty(again))
    held = hlora.Penalty(nu)
    hlora.attach(trainer, held)
    hlora.attach(trainer, held)  # itself is no second one
    with pytest.raises(hlora.InputError, match="which would count twice"):
        hlora.attach(trainer, hlora.Penalty(nu, phi=1.0))
    assert [c for c in trainer.callback_handler.callbacks if isinstance(c, hlora.Penalty)] == [held]
    assert held.leads
    hlora.attach(trainer, hlora.Penalty(nu, anchor="base"))  # another R
    hlora.attach(trainer, hlora.Record(tmp_path / "new", quiet=True))
    with pytest.raises(hlora.InputError, match="Two recordings write to"):
        hlora.attach(trainer, hlora.Record(tmp_path / "x" / ".." / "new", quiet=True))


def test_phi_zero_is_plain_training(tmp_path):
    plain, _ = train(tmp_path / "a")
    ours, trainer = train(tmp_path / "b", Decay(0.0), Entropy(0.0))
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.equal(p, q)
    assert trainer.state.log_history[0]["penalty"] == 0.0


def test_what_is_no_part_is_refused(tmp_path):
    with pytest.raises(hlora.InputError, match="'nu'"):
        hlora.attach(make_trainer(lora_model(), tmp_path), "nu")


def test_an_optimizer_that_never_steps_ends_with_an_error(tmp_path, nu):
    class Hidden(torch.optim.SGD):
        """As under a launcher that takes the step elsewhere: no hook of torch's ever runs."""

        def step(self, closure=None):
            return None

        step.hooked = True  # what torch marks a step with that it need not wrap

    model = lora_model()
    trainer = make_trainer(model, tmp_path)
    trainer.optimizer = Hidden([p for p in model.parameters() if p.requires_grad], lr=0.1)
    hlora.attach(trainer, hlora.Penalty(nu))
    trainer.create_optimizer_and_scheduler(6)
    with pytest.raises(hlora.UnsupportedModelError, match="step"):
        trainer.train()


def test_an_optimizer_that_steps_during_backward_ends_with_an_error(tmp_path, nu):
    """As layerwise optimizers do: weights move, and no gradient is left to add to."""

    class Dummy(torch.optim.SGD):
        def step(self, closure=None):
            return None

    model = lora_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        inner = torch.optim.SGD([p], lr=0.1)
        p.register_post_accumulate_grad_hook(lambda p, o=inner: o.step() or o.zero_grad())
    trainer = make_trainer(model, tmp_path)
    trainer.optimizer = Dummy(trained, lr=0.1)
    hlora.attach(trainer, hlora.Penalty(nu))
    trainer.create_optimizer_and_scheduler(6)
    with pytest.raises(hlora.UnsupportedModelError, match="never took a step"):
        trainer.train()
