"""Phase μ under a real Trainer, against autograd on dense float64 matrices."""

import logging
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file

import hlora
from hlora.core import store
from hlora.core.layers import effective_number, layer_weights
from hlora.core.steps import steps_of
from hlora.hf.peft import find_pairs
from tests.conftest import base_model, lora_model, make_trainer, perturb, token_rows
from tests.reference import equivalent_gradient
from tests.reference import penalty as dense_penalty


def tuned(nu, folder, model=None, callback=None, **settings):
    model = model or lora_model()
    callbacks = [] if callback is None else [callback]
    trainer = make_trainer(model, folder, callbacks, rows=token_rows(seed=2), **settings)
    trainer.train()
    return model, trainer


@torch.no_grad()
def distance(model, factors):
    return math.sqrt(
        sum(
            float(((p.s * (p.B @ p.A - factors[p.name][0] @ factors[p.name][1])) ** 2).sum())
            for p in find_pairs(model)
        )
    )


@pytest.mark.parametrize("how", ["softmax", "normalized", "uniform"])
@pytest.mark.parametrize("anchor", ["nu", "base"])
def test_value_and_gradients_are_autograd_s_on_dense_theta(nu, how, anchor):
    model = lora_model(dtype=torch.float64)
    callback = hlora.Penalty(nu, phi=0.7, layer_weights=how, anchor=anchor)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    callback.start(model, optimizer)
    perturb(model)
    pairs = find_pairs(model)
    stored = store.load(nu)
    Omega = {n: t.double() for n, t in stored.importance.tensors().items()}
    weights = layer_weights({n: float(t.norm()) for n, t in Omega.items()}, how)
    scale = sum(t.numel() for t in Omega.values()) / sum(
        weights[n] * float(t.sum()) for n, t in Omega.items()
    )
    changes = []
    for p in pairs:
        B_nu, A_nu = (f.double() for f in stored.factors[p.name])
        at = p.s * B_nu @ A_nu if anchor == "nu" else torch.zeros_like(Omega[p.name])
        changes.append(p.s * p.B @ p.A - at)
    R = dense_penalty(
        [Omega[p.name] for p in pairs], changes, [scale * weights[p.name] for p in pairs]
    )
    expected = torch.autograd.grad(0.7 * R, [f for p in pairs for f in (p.B, p.A)])
    assert float(callback.value()) == pytest.approx(float(R.detach()), rel=1e-6)
    for p in pairs:
        p.B.grad, p.A.grad = None, None
    steps_of(optimizer).regularize(optimizer)
    for ours, theirs in zip([f.grad for p in pairs for f in (p.B, p.A)], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-10)
        assert theirs.abs().max() > 0


def test_zero_with_zero_gradient_at_the_anchor(kept):
    model = lora_model()
    callback = hlora.Penalty(kept, phi=5.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    callback.start(model, optimizer)  # takes ν's weights
    assert float(callback.value()) == 0.0
    steps_of(optimizer).regularize(optimizer)
    assert all(not p.grad.any() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_penalty_does_not_grow_with_accumulation(kept, tmp_path, accumulation):
    """16 rows a step, cut into 1, 2 or 4 micro-batches: the same training."""

    def train(k, folder):
        model = lora_model(dtype=torch.float64)
        tuned(
            kept, folder, model, hlora.Penalty(kept, phi=10.0), per_device_train_batch_size=16 // k,
            gradient_accumulation_steps=k, max_steps=3,
        )  # fmt: skip
        return model

    one, several = train(1, tmp_path / "one"), train(accumulation, tmp_path / "several")
    for p, q in zip(one.parameters(), several.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)


def test_phi_zero_is_plain_peft_bit_for_bit(kept, tmp_path):
    from peft import PeftModel

    from tests.conftest import base_model

    def from_nu():
        return PeftModel.from_pretrained(base_model(), str(kept), is_trainable=True)

    plain, _ = tuned(kept, tmp_path / "a", from_nu())
    ours, _ = tuned(kept, tmp_path / "b", lora_model(), hlora.Penalty(kept, phi=0.0))
    for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_huge_phi_leaves_theta_at_the_anchor(kept, tmp_path):
    factors = store.load(kept).factors
    settings = {"max_steps": 40, "learning_rate": 1e-3}
    free, _ = tuned(kept, tmp_path / "a", lora_model(), hlora.Penalty(kept, phi=0.0), **settings)
    held, _ = tuned(
        kept, tmp_path / "b", lora_model(),
        hlora.Penalty(kept, phi=1e6, layer_weights="uniform"), **settings,
    )  # fmt: skip
    assert distance(held, factors) < 0.1 * distance(free, factors)


def test_more_phi_moves_less_and_every_factor_moves(kept, tmp_path):
    factors = store.load(kept).factors
    distances = []
    for phi in (0.0, 10.0, 1000.0):
        model, _ = tuned(
            kept,
            tmp_path / str(phi),
            lora_model(),
            hlora.Penalty(kept, phi=phi),
            max_steps=30,
        )
        distances.append(distance(model, factors))
        for p in find_pairs(model):
            assert not torch.equal(p.B, factors[p.name][0])
            assert not torch.equal(p.A, factors[p.name][1])
    assert distances[0] > distances[1] > distances[2] > 0


def test_base_anchor_starts_from_the_base_model(kept, tmp_path):
    model = lora_model()
    callback = hlora.Penalty(kept, anchor="base")
    callback.start(
        model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    )
    assert all(not p.B.any() for p in find_pairs(model))
    assert float(callback.value()) == 0.0


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_base_anchor_with_a_mutated_base_is_the_start(tmp_path, init):
    make_trainer(
        lora_model(init_lora_weights=init),
        tmp_path / "run",
        [hlora.Record(tmp_path / "nu", kind="dense")],
    ).train()
    model = lora_model(init_lora_weights=init)
    callback = hlora.Penalty(tmp_path / "nu", anchor="base")
    callback.start(
        model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    )
    assert float(callback.value()) == pytest.approx(0.0, abs=1e-9)
    perturb(model)
    assert float(callback.value()) > 0


def test_a_second_train_holds_a_mutated_base_still(tmp_path):
    def model():
        return lora_model(init_lora_weights="pissa")

    make_trainer(model(), tmp_path / "run", [hlora.Record(tmp_path / "nu", kind="dense")]).train()
    callback = hlora.Penalty(tmp_path / "nu", anchor="base")
    trainer = make_trainer(model(), tmp_path / "a", [callback], rows=token_rows(seed=2))
    trainer.train()
    optimizer = torch.optim.SGD([p for p in trainer.model.parameters() if p.requires_grad])
    callback.start(trainer.model, optimizer)
    assert float(callback.value()) > 0
    other = model()
    callback.start(
        other, torch.optim.SGD([p for p in other.parameters() if p.requires_grad], lr=0.1)
    )
    assert float(callback.value()) == pytest.approx(0.0, abs=1e-9)


def test_r_and_total_are_logged(kept, tmp_path):
    _, trainer = tuned(kept, tmp_path / "run", callback=hlora.Penalty(kept, phi=10.0))
    logged = [e for e in trainer.state.log_history if "loss" in e]
    assert len(logged) == 3
    for entry in logged:
        assert entry["total_loss"] == pytest.approx(entry["loss"] + 10.0 * entry["R"])
        assert entry["penalty"] == pytest.approx(10.0 * entry["R"])
        assert entry["R"] > 0
        assert entry["penalty_grad_ratio"] > 0


class Reporter(transformers.TrainerCallback):
    """What W&B's and TensorBoard's callbacks do: read the logs when their turn comes."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


def test_a_reporter_behind_it_sees_r(kept, tmp_path):
    reporter = Reporter()
    trainer = make_trainer(lora_model(), tmp_path / "run", [reporter], rows=token_rows(seed=2))
    hlora.attach(trainer, hlora.Penalty(kept, phi=10.0))
    trainer.train()
    assert all("R" in logs for logs in reporter.seen if "loss" in logs)


def test_the_recorder_sees_the_task_s_gradient_alone(nu, tmp_path):
    """With a penalty in place, whichever callback came first."""

    def importance(order, folder):
        callbacks = {
            "r": hlora.Record(tmp_path / folder, previous=None),
            "p": hlora.Penalty(nu, phi=50.0),
        }
        model = lora_model(dtype=torch.float64)
        make_trainer(
            model, tmp_path / f"run-{folder}", [callbacks[c] for c in order], max_steps=2,
            optim="sgd", learning_rate=1e-3,
        ).train()  # fmt: skip
        return store.load(tmp_path / folder).importance.tensors()

    first, second = importance("rp", "a"), importance("pr", "b")
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_with_a_penalty_the_recorder_sees_what_it_sees_alone(kept, tmp_path):
    """Away from the anchor the penalty pulls at the first step already."""
    model = lora_model(dtype=torch.float64)
    perturb(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    penalty, recorder = hlora.Penalty(kept, phi=50.0), hlora.Record(tmp_path / "r", kind="dense")
    penalty.start(model, optimizer)
    recorder.start(model, optimizer)
    rows = token_rows(4)
    model(**{k: torch.tensor([r[k] for r in rows]) for k in rows[0]}).loss.backward()
    pairs = find_pairs(model)
    before = [
        (p.B.detach().clone(), p.A.detach().clone(), p.B.grad.clone(), p.A.grad.clone())
        for p in pairs
    ]
    optimizer.step()
    assert any(not torch.equal(p.B.grad, b[2]) for p, b in zip(pairs, before, strict=True))
    trace = recorder._recorder.trace
    omega = {n: o for names, (t,) in trace.omega.items() for n, o in zip(names, t, strict=True)}
    for p, (B, A, gB, gA) in zip(pairs, before, strict=True):
        gradient = equivalent_gradient(B, A, gB, gA, 1e-2)
        expected = -gradient * p.s * (p.B @ p.A - B @ A).detach()
        torch.testing.assert_close(omega[p.name], expected, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("fused", [False, True])
def test_the_gradient_scaler_s_factor_is_heeded(kept, fused):
    """torch's scaler leaves its factor on the gradients that a fused optimizer gets."""

    def trained(scaler):
        model = lora_model()
        perturb(model)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=fused
        )
        hlora.Penalty(kept, phi=20.0).start(model, optimizer)
        rows = token_rows(4)
        batch = {k: torch.tensor([r[k] for r in rows]) for k in rows[0]}
        for _ in range(3):
            loss = model(**batch).loss
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        return model

    scaled = trained(torch.amp.GradScaler("cpu", init_scale=2.0**10))
    for p, q in zip(scaled.parameters(), trained(None).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_none(kept, tmp_path, fused):
    """Recorder and penalty together; R is that of the steps that were taken."""

    def trained(skipped):
        model = lora_model()
        perturb(model)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-2, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=skipped is not None)
        penalty = hlora.Penalty(kept, phi=20.0)
        record = hlora.Record(tmp_path / f"new-{skipped}", kind="dense", quiet=True)
        penalty.start(model, optimizer)
        record.start(model, optimizer)
        rows = token_rows(4)
        batch = {k: torch.tensor([r[k] for r in rows]) for k in rows[0]}
        for step in range(3 if skipped is None else 4):
            scaler.scale(model(**batch).loss).backward()
            if step == skipped:
                find_pairs(model)[0].A.grad[0, 0] = math.nan
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        told = steps_of(optimizer).report()
        return (
            model,
            record.finish(model),
            told,
            load_file(record.output / "importance.safetensors"),
        )

    plain, summary, told, importance = trained(None)
    for skipped in (0, 2):
        model, others, R, found = trained(skipped)
        assert others["steps"] == summary["steps"] == 3
        torch.testing.assert_close(R, told, rtol=1e-3, atol=1e-6)
        for p, q in zip(plain.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
        for name, of in importance.items():
            torch.testing.assert_close(found[name], of, rtol=5e-3, atol=1e-4)


def test_a_retried_or_trained_twice_penalty_adds_once(kept, tmp_path):
    """As auto_find_batch_size does it: training begins again with the same optimizer."""
    gradients = []
    for starts in (1, 3):
        model = lora_model(dtype=torch.float64)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        callback = hlora.Penalty(kept, phi=5.0)
        for _ in range(starts):
            callback.start(model, optimizer)
        perturb(model)
        steps_of(optimizer).regularize(optimizer)
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert any(a.any() for a in gradients[0])


def test_phi_may_change_while_training_and_is_restored(kept, tmp_path):
    class Steer(transformers.TrainerCallback):
        def __init__(self, penalty):
            self.penalty = penalty

        def on_step_begin(self, args, state, control, **kwargs):
            self.penalty.phi = 2.0 * (state.global_step + 1)

    settings = {"save_strategy": "steps", "save_steps": 3, "rows": token_rows(seed=2)}
    penalty = hlora.Penalty(kept, phi=1.0)
    model = lora_model(dtype=torch.float64)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    penalty.start(model, optimizer)
    perturb(model)
    pulls = []
    for phi in (1.0, 3.0):
        penalty.phi = phi
        optimizer.zero_grad()
        steps_of(optimizer).regularize(optimizer)
        pulls.append(find_pairs(model)[0].B.grad.clone())
    torch.testing.assert_close(pulls[1], 3 * pulls[0])
    with pytest.raises(hlora.InputError, match="phi"):
        penalty.phi = -1.0
    penalty.finish()

    penalty = hlora.Penalty(kept, phi=1.0)
    make_trainer(lora_model(), tmp_path, [Steer(penalty), penalty], **settings).train()
    assert penalty.phi == 12.0
    resumed = hlora.Penalty(kept, phi=1.0)
    trainer = make_trainer(lora_model(), tmp_path, [resumed], **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.phi == 6.0
    entry = [e for e in trainer.state.log_history if "R" in e][-1]
    assert entry["penalty"] == pytest.approx(6.0 * entry["R"])


def test_a_penalty_too_weak_to_act_warns(nu, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hlora"):
        tuned(nu, tmp_path / "run", callback=hlora.Penalty(nu, phi=1e-9))
    assert "did next to nothing" in caplog.text
    assert "Raise phi" in caplog.text


def test_one_layer_with_all_the_weight_warns(nu, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "hlora"):
        tuned(nu, tmp_path / "run", callback=hlora.Penalty(nu, softmax_scale=1e6))
    assert "of the layer weights" in caplog.text
    assert "normalized" in caplog.text


def test_a_trained_adapter_that_is_not_nu_warns(nu, tmp_path, caplog):
    model = lora_model()
    perturb(model)
    with caplog.at_level(logging.WARNING, "hlora"):
        tuned(nu, tmp_path / "run", model, hlora.Penalty(nu))
    assert "neither new nor the one in" in caplog.text


@pytest.mark.parametrize("anchor", ["nu", "base"])
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(kept, tmp_path, anchor):
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole, trainer = tuned(
        kept,
        tmp_path / "a",
        lora_model(),
        hlora.Penalty(kept, phi=5.0, anchor=anchor),
        **settings,
    )
    resumed = lora_model()
    again = make_trainer(
        resumed, tmp_path / "a", [hlora.Penalty(kept, phi=5.0, anchor=anchor)],
        rows=token_rows(seed=2), **settings,
    )  # fmt: skip
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    assert trainer.state.log_history[-2]["R"] == again.state.log_history[-2]["R"]


def test_a_resumed_pissa_run_keeps_its_base(tmp_path):
    def model():
        return lora_model(init_lora_weights="pissa")

    make_trainer(model(), tmp_path / "run", [hlora.Record(tmp_path / "nu", kind="dense")]).train()
    settings = {"save_strategy": "steps", "save_steps": 3, "rows": token_rows(seed=2)}
    whole, resumed = model(), model()
    make_trainer(
        whole, tmp_path / "a", [hlora.Penalty(tmp_path / "nu", anchor="base")], **settings
    ).train()
    make_trainer(
        resumed, tmp_path / "a", [hlora.Penalty(tmp_path / "nu", anchor="base")], **settings
    ).train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("phi", [-1.0, float("nan"), float("inf"), "0.05", True])
def test_an_impossible_phi_is_refused(nu, phi):
    with pytest.raises(hlora.InputError, match=f"phi.*{phi}"):
        hlora.Penalty(nu, phi=phi)
    with pytest.raises(hlora.InputError, match=f"phi.*{phi}"):
        hlora.Penalty(nu).phi = phi
    with pytest.raises(hlora.InputError, match=f"softmax_scale.*{phi}"):
        hlora.Penalty(nu, softmax_scale=phi)


def test_an_unknown_anchor_is_refused(nu):
    with pytest.raises(hlora.InputError, match=r"anchor.*'mu'"):
        hlora.Penalty(nu, anchor="mu")


@pytest.mark.parametrize("how", ["softmax", "normalized", "uniform"])
def test_layer_weights_sum_to_one(how):
    norms = {"a.q_proj": 1.0, "a.v_proj": 3.0, "b.q_proj": 700.0, "b.v_proj": 800.0}
    weights = layer_weights(norms, how)
    assert sum(weights.values()) == pytest.approx(1.0)
    assert list(weights) == list(norms)
    apart = layer_weights(norms, how, apart=True)
    assert apart["a.q_proj"] + apart["b.q_proj"] == pytest.approx(1.0)


def test_softmax_is_eq_15():
    norms = {"a": 0.1, "b": 0.5, "c": 2.0}
    total = sum(math.exp(v) for v in norms.values())
    expected = {k: math.exp(v) / total for k, v in norms.items()}
    assert layer_weights(norms) == pytest.approx(expected)


def test_effective_number_of_layers():
    assert effective_number({"a": 0.5, "b": 0.5}) == pytest.approx(2.0)
    assert effective_number({"a": 1.0, "b": 0.0}) == pytest.approx(1.0)


def test_presets_are_the_paper_s_and_the_authors_code_s(nu):
    paper, official = (
        hlora.Penalty(nu, preset="paper").rule,
        hlora.Penalty(nu, preset="official").rule,
    )
    assert (paper.phi, paper.normalize) == (math.exp(-3), False)
    assert (official.phi, official.softmax_scale, official.apart) == (1e-3, 1e-8, True)
    assert hlora.Penalty(nu, preset="paper", phi=1.0).rule.phi == 1.0


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal", False])
def test_a_start_at_another_b_is_refused_for_what_it_is(tmp_path, init):
    import peft

    def model():
        return lora_model(init_lora_weights=init)

    make_trainer(model(), tmp_path / "run", [hlora.Record(tmp_path / "nu")]).train()
    with pytest.raises(hlora.UnsupportedModelError, match=rf"init_lora_weights={init!r}.*B ≠ 0"):
        make_trainer(model(), tmp_path / "mu", [hlora.Penalty(tmp_path / "nu")]).train()
    started = peft.PeftModel.from_pretrained(base_model(), tmp_path / "nu", is_trainable=True)
    penalty = hlora.Penalty(tmp_path / "nu")
    trained = [p for p in started.parameters() if p.requires_grad]
    penalty.start(started, torch.optim.SGD(trained, lr=0.1))
    assert float(penalty.value()) == 0.0
    for pair in find_pairs(started):
        assert torch.equal(pair.B, penalty.stored.factors[pair.name][0])
