"""Phase ν under a real Trainer, against the equations on dense float64 matrices."""

import gc
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import hlora
from hlora.core import store
from hlora.core.pairs import group
from hlora.core.steps import steps_of
from hlora.hf.peft import find_pairs
from tests.conftest import lora_model, make_trainer, perturb, token_rows


class Spy:
    """What the recorder should have seen: factors before and after, gradients, η, each step."""

    def __init__(self, model):
        self.pairs, self.steps = find_pairs(model), []

    def watch(self, optimizer):
        def before(opt, args, kwargs):
            self.seen = [
                (
                    p.B.detach().double().clone(), p.A.detach().double().clone(),
                    p.B.grad.double().clone(), p.A.grad.double().clone(),
                    opt.param_groups[0]["lr"],
                )
                for p in self.pairs
            ]  # fmt: skip

        def after(opt, args, kwargs):
            self.steps.append(
                [
                    (*seen, p.B.detach().double().clone(), p.A.detach().double().clone())
                    for seen, p in zip(self.seen, self.pairs, strict=True)
                ]
            )

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)


def expected_omega(spy, index, s, gradient=None):
    from tests.reference import equivalent_gradient

    omega = 0
    for step in spy.steps:
        B0, A0, gB, gA, eta, B1, A1 = step[index]
        g = equivalent_gradient(B0, A0, gB, gA, eta)
        omega = omega - g * s * (B1 @ A1 - B0 @ A0)
    return omega


def record(tmp_path, model=None, rule=None, **settings):
    model = model or lora_model()
    callback = hlora.Record(tmp_path / "nu", **{"kind": "dense", **(rule or {})})
    trainer = make_trainer(model, tmp_path / "run", [callback], **settings)
    spy = Spy(model)
    trainer.create_optimizer()
    spy.watch(trainer.optimizer)
    trainer.train()
    return callback, spy, model


@pytest.mark.parametrize("architecture", ["llama", "gptj", "gpt2"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.01},
        {"lr_scheduler_type": "cosine"},
    ],
    ids=["adamw", "accumulated", "clipped", "cosine"],
)
def test_importance_is_eq_11_to_13(tmp_path, architecture, settings):
    model = lora_model(architecture, dtype=torch.float64)
    _, spy, model = record(tmp_path, model, **settings)
    stored = store.load(tmp_path / "nu").importance.tensors()
    for i, pair in enumerate(find_pairs(model)):
        omega = expected_omega(spy, i, pair.s)
        delta = pair.s * (pair.B @ pair.A).detach()
        expected = omega.clamp(min=0) / (delta**2 + 1e-3)
        torch.testing.assert_close(stored[pair.name].double(), expected, rtol=1e-5, atol=1e-9)
        assert expected.max() > 0


@pytest.mark.parametrize("use_rslora", [False, True])
def test_under_sgd_omega_is_the_squared_step(tmp_path, use_rslora):
    """ω = Σ Δθ²/(ηs), so Ω = that over (Δ² + ξ)."""
    model = lora_model(
        dtype=torch.float64, use_rslora=use_rslora,
        rank_pattern={"v_proj": 3}, alpha_pattern={"v_proj": 9},
    )  # fmt: skip
    callback, spy, model = record(tmp_path, model, optim="sgd", learning_rate=0.1)
    stored = store.load(tmp_path / "nu").importance.tensors()
    for i, pair in enumerate(find_pairs(model)):
        squared = sum(
            (pair.s * (step[i][5] @ step[i][6] - step[i][0] @ step[i][1])) ** 2
            / (step[i][4] * pair.s)
            for step in spy.steps
        )
        delta = pair.s * (pair.B @ pair.A).detach()
        torch.testing.assert_close(
            stored[pair.name].double(), squared / (delta**2 + 1e-3), rtol=1e-5, atol=1e-12
        )
    assert callback.summary["negative_share"] == 0.0


@pytest.mark.parametrize(
    ("optim", "rate", "steps"), [("sgd", 0.02, 150), ("adamw_torch", 1e-4, 60)]
)
def test_projected_path_integral_is_the_loss_drop(tmp_path, optim, rate, steps):
    """Eq. 3, full batch, small steps: within 2 %."""
    rows = token_rows(8)
    batch = {k: torch.tensor([r[k] for r in rows]) for k in rows[0]}
    model = lora_model(dtype=torch.float64)

    def loss():
        with torch.no_grad():
            return float(model.eval()(**batch).loss)

    before = loss()
    callback, _, model = record(
        tmp_path, model, {"estimator": "projected"}, rows=rows, optim=optim, learning_rate=rate,
        max_steps=steps, per_device_train_batch_size=8, max_grad_norm=0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    drop = before - loss()
    assert drop > 1e-4
    assert callback.summary["path_integral"] == pytest.approx(drop, rel=0.02)


def test_recording_changes_nothing_in_training(tmp_path):
    plain, recorded = lora_model(), lora_model()
    make_trainer(plain, tmp_path / "a").train()
    make_trainer(recorded, tmp_path / "b", [hlora.Record(tmp_path / "nu", kind="dense")]).train()
    for p, q in zip(plain.parameters(), recorded.parameters(), strict=True):
        assert torch.equal(p, q)


def test_importance_adds_up_over_two_tasks(tmp_path):
    """Eq. 13's sum over ν, with ω and Δ of the second task its own."""
    model = lora_model(dtype=torch.float64)
    record(tmp_path, model)
    first = {k: v.clone() for k, v in store.load(tmp_path / "nu").importance.tensors().items()}
    start = {p.name: (p.s * p.B @ p.A).detach().clone() for p in find_pairs(model)}

    callback = hlora.Record(tmp_path / "both", previous=tmp_path / "nu")
    trainer = make_trainer(model, tmp_path / "run2", [callback], rows=token_rows(seed=1))
    spy = Spy(model)
    trainer.create_optimizer()
    spy.watch(trainer.optimizer)
    trainer.train()

    both = store.load(tmp_path / "both").importance.tensors()
    for i, pair in enumerate(find_pairs(model)):
        omega = expected_omega(spy, i, pair.s)
        delta = (pair.s * pair.B @ pair.A).detach() - start[pair.name]
        second = omega.clamp(min=0) / (delta**2 + 1e-3)
        torch.testing.assert_close(
            both[pair.name].double(), first[pair.name].double() + second, rtol=1e-4, atol=1e-8
        )


def test_official_preset_adds_up_over_epochs_and_clamps_each_step(tmp_path):
    model = lora_model(dtype=torch.float64)
    callback, spy, model = record(
        tmp_path, model, {"preset": "official", "xi": 1e-3}, max_steps=-1, num_train_epochs=2
    )
    stored = store.load(tmp_path / "nu").importance.tensors()
    per_epoch = len(spy.steps) // 2
    from tests.reference import equivalent_gradient

    for i, pair in enumerate(find_pairs(model)):
        total = 0
        for epoch in range(2):
            omega = 0
            for step in spy.steps[epoch * per_epoch : (epoch + 1) * per_epoch]:
                B0, A0, gB, gA, eta, B1, A1 = step[i]
                g = pair.s * equivalent_gradient(B0, A0, gB, gA, eta)
                omega = (omega - g * pair.s * (B1 @ A1 - B0 @ A0)).clamp(min=0)
            total = total + omega / ((pair.s * B1 @ A1) ** 2 + 1e-3)
        torch.testing.assert_close(stored[pair.name].double(), total, rtol=1e-4, atol=1e-8)
    assert callback.summary["negative_share"] is None


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_delta_counts_from_the_start_where_b_is_not_zero(tmp_path, init):
    model = lora_model(init_lora_weights=init)
    start = {p.name: (p.s * p.B @ p.A).detach().double() for p in find_pairs(model)}
    _, spy, model = record(tmp_path, model, learning_rate=1e-3)
    stored = store.load(tmp_path / "nu").importance.tensors()
    for i, pair in enumerate(find_pairs(model)):
        omega = expected_omega(spy, i, pair.s)
        delta = (pair.s * pair.B @ pair.A).detach().double() - start[pair.name]
        expected = omega.clamp(min=0) / (delta**2 + 1e-3)
        torch.testing.assert_close(stored[pair.name].double(), expected, rtol=1e-2, atol=1e-6)


def test_xi_relative_to_the_mean_squared_change(tmp_path):
    model = lora_model(dtype=torch.float64)
    _, spy, model = record(tmp_path, model, {"xi": 2.0, "xi_relative": True})
    stored = store.load(tmp_path / "nu").importance.tensors()
    pairs = find_pairs(model)
    deltas = [(p.s * p.B @ p.A).detach() for p in pairs]
    mean = sum((d**2).sum() for d in deltas) / sum(d.numel() for d in deltas)
    for i, (pair, delta) in enumerate(zip(pairs, deltas, strict=True)):
        expected = expected_omega(spy, i, pair.s).clamp(min=0) / (delta**2 + 2 * mean)
        torch.testing.assert_close(stored[pair.name].double(), expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["dense", "factored"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_fp16_step_leaves_no_nan(fused, kind, tmp_path):
    """torch's scaler skips the first step, whose gradients overflow, and fused AdamW unscales
    inside its own step."""
    model = lora_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=fused
    )
    callback = hlora.Record(tmp_path / "nu", kind=kind)
    callback.start(model, optimizer)
    plain = lora_model()
    plain_optimizer = torch.optim.AdamW(
        [p for p in plain.parameters() if p.requires_grad], lr=1e-2, fused=fused
    )
    expected = hlora.Record(tmp_path / "plain", kind=kind)
    expected.start(plain, plain_optimizer)
    rows = token_rows(4)
    batch = {k: torch.tensor([r[k] for r in rows]) for k in rows[0]}
    for step in range(4):
        scaler.scale(model(**batch).loss).backward()
        if step == 0:
            find_pairs(model)[0].B.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if step > 0:
            plain(**batch).loss.backward()
            plain_optimizer.step()
            plain_optimizer.zero_grad()
    callback.finish(model)
    expected.finish(plain)
    ours = load_file(tmp_path / "nu" / store.TENSORS)
    theirs = load_file(tmp_path / "plain" / store.TENSORS)
    for name in ours:
        assert torch.isfinite(ours[name]).all()
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)
    assert max(float(t.max()) for t in ours.values()) > 0


@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_bf16_training_is_recorded(kind, tmp_path):
    record(tmp_path, rule={"kind": kind}, bf16=True)
    stored = store.load(tmp_path / "nu").importance
    assert all(v > 0 for v in stored.norms().values())


def test_a_frozen_factor_counts_as_zero_gradient(tmp_path):
    model = lora_model(dtype=torch.float64)
    for name, p in model.named_parameters():
        if "lora_A" in name:
            p.requires_grad_(False)
    callback, _, _ = record_frozen(tmp_path, model)
    assert callback.summary["steps"] == 6
    assert all(v > 0 for v in store.load(tmp_path / "nu").importance.norms().values())


def record_frozen(tmp_path, model):
    callback = hlora.Record(tmp_path / "nu", kind="dense")
    make_trainer(model, tmp_path / "run", [callback]).train()
    return callback, None, model


def test_the_summary_is_printed_and_stored(tmp_path, capsys):
    callback, _, _ = record(tmp_path, max_grad_norm=1e-4)
    out = capsys.readouterr().out
    for words in ("negative ω", "largest ‖Ω_l‖₂", "smallest ‖Ω_l‖₂", "effective number of layers"):
        assert words in out
    info = json.loads((tmp_path / "nu" / store.MARKER).read_text())
    assert info["summary"] == callback.summary
    assert info["summary"]["clipped_share"] == 1.0
    assert 0 <= info["summary"]["negative_share"] < 1
    assert 1 <= info["summary"]["effective_layers"] <= 4 + 1e-9
    assert info["summary"]["largest_norm"]["value"] >= info["summary"]["smallest_norm"]["value"] > 0
    record(tmp_path, rule={"quiet": True, "overwrite": True})
    assert "effective" not in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_a_resumed_recording_ends_bit_for_bit_like_an_uninterrupted_one(kind, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}
    whole = lora_model(lora_dropout=0.1)
    first, second = (hlora.Record(tmp_path / f"nu-{x}", kind=kind) for x in "ab")
    make_trainer(whole, tmp_path / "a", [first], **settings).train()
    resumed = lora_model(lora_dropout=0.1, seed=5)  # its weights come from the checkpoint
    resumed.base_model.model.load_state_dict(
        lora_model(lora_dropout=0.1).base_model.model.state_dict()
    )
    trainer = make_trainer(resumed, tmp_path / "a", [second], **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    one, two = ({**c.summary, "seconds": 0} for c in (first, second))
    assert one == two
    assert one["steps"] == 6
    a, b = (load_file(tmp_path / f"nu-{x}" / store.TENSORS) for x in "ab")
    assert all(torch.equal(a[k], b[k]) for k in a)
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_resuming_without_the_recorder_s_state_is_refused(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}
    make_trainer(lora_model(), tmp_path / "a", **settings).train()
    trainer = make_trainer(
        lora_model(), tmp_path / "a", [hlora.Record(tmp_path / "nu", kind="dense")], **settings
    )
    with pytest.raises(hlora.StoreError, match=r"hlora_record\.safetensors"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))


def test_an_output_with_a_result_is_refused(nu):
    with pytest.raises(hlora.InputError, match=r"nu.*importance\.json"):
        hlora.Record(nu, kind="dense").check_folders()
    hlora.Record(nu, overwrite=True).check_folders()
    with pytest.raises(hlora.InputError, match=r"nu.*importance\.json"):
        make_trainer(lora_model(), nu.parent / "again", [hlora.Record(nu)]).train()


def test_training_again_replaces_its_own_result(tmp_path):
    model, callback = lora_model(), hlora.Record(tmp_path / "nu", preset="official")
    trainer = make_trainer(model, tmp_path / "run", [callback], max_steps=2)
    trainer.train()
    first = load_file(tmp_path / "nu" / store.TENSORS)
    assert trainer.args.max_grad_norm == 1.0  # the preset's 0 was for the recording
    trainer.train()
    again = load_file(tmp_path / "nu" / store.TENSORS)
    assert any(not torch.equal(first[k], again[k]) for k in first)


def test_making_a_record_touches_no_disk(tmp_path):
    hlora.Record(tmp_path / "new", previous=tmp_path / "not yet there")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"estimator": "magic"}, r"estimator.*'magic'"),
        ({"xi": 0.0}, r"xi.*0\.0"),
        ({"xi": float("nan")}, "xi.*nan"),
        ({"xi": "1e-3"}, "xi.*'1e-3'"),
        ({"xi": True}, "xi.*True"),
        ({"max_grad_norm": "1"}, "max_grad_norm.*'1'"),
        ({"preset": "ours"}, r"preset.*'ours'"),
        ({"speed": 3}, "'speed'"),
    ],
)
def test_bad_settings_are_named(tmp_path, rule, message):
    with pytest.raises(hlora.InputError, match=message):
        hlora.Record(tmp_path / "nu", **rule)


def test_pairs_of_one_shape_take_their_own_learning_rate(tmp_path):
    """η of Eq. 11, where the optimizer's groups cut through pairs of one shape."""
    model = lora_model(dtype=torch.float64)
    rates = {p.name: 1e-2 * (i + 1) for i, p in enumerate(find_pairs(model))}
    optimizer = torch.optim.SGD(
        [{"params": [p.A, p.B], "lr": rates[p.name]} for p in find_pairs(model)]
    )
    callback = hlora.Record(tmp_path / "nu", kind="dense")
    callback.start(model, optimizer)
    rows = token_rows(4)
    batch = {k: torch.tensor([r[k] for r in rows]) for k in rows[0]}
    seen = {}
    for _ in range(2):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        before = {p.name: (p.s * p.B @ p.A).detach() for p in find_pairs(model)}
        optimizer.step()
        for p in find_pairs(model):
            moved = (p.s * p.B @ p.A).detach() - before[p.name]
            squared = moved**2 / (rates[p.name] * p.s)  # under SGD g̃ is −Δθ/(ηs)
            seen[p.name] = seen.get(p.name, 0) + squared
    callback.finish(model)
    stored = store.load(tmp_path / "nu").importance.tensors()
    for p in find_pairs(model):
        expected = seen[p.name] / ((p.s * p.B @ p.A).detach() ** 2 + 1e-3)
        torch.testing.assert_close(stored[p.name].double(), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("rate", ["sgd", "adamw"])
def test_a_and_b_in_groups_of_different_learning_rates(tmp_path, rate):
    """LoRA+: η of Eq. 11 is B's, whose gradient the term goes with."""
    model = lora_model(dtype=torch.float64)
    perturb(model)
    pairs = find_pairs(model)
    parted = [{"params": [p.A for p in pairs], "lr": 1e-3}]
    parted = [{"params": [p.B for p in pairs], "lr": 1.6e-2}, *parted]  # the spy reads the first
    optimizer = (torch.optim.SGD if rate == "sgd" else torch.optim.AdamW)(parted)
    callback, spy = hlora.Record(tmp_path / "nu", kind="dense"), Spy(model)
    start = [(p.B.detach().clone(), p.A.detach().clone()) for p in pairs]
    callback.start(model, optimizer)
    spy.watch(optimizer)
    rows = token_rows(4)
    batch = {k: torch.tensor([r[k] for r in rows]) for k in rows[0]}
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    callback.finish(model)
    stored = store.load(tmp_path / "nu").importance.tensors()
    for i, (p, (B, A)) in enumerate(zip(pairs, start, strict=True)):
        delta = p.s * (p.B @ p.A - B @ A).detach()
        expected = expected_omega(spy, i, p.s).clamp(min=0) / (delta**2 + 1e-3)
        torch.testing.assert_close(stored[p.name].double(), expected, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("part", ["A", "B", "all"])
def test_an_optimizer_that_lacks_a_factor_is_refused(tmp_path, nu, part):
    model = lora_model()
    trained = [p for p in model.parameters() if p.requires_grad]
    gone = {id(getattr(p, f)) for p in find_pairs(model)[:1] for f in ("A", "B") if f == part}
    kept = [p for p in trained if id(p) not in gone] if part != "all" else [torch.ones(1)]
    optimizer = torch.optim.SGD(kept, lr=0.1)
    for callback in (hlora.Record(tmp_path / "new"), hlora.Penalty(nu)):
        with pytest.raises(hlora.UnsupportedModelError, match="does not hold"):
            callback.start(model, optimizer)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 3


@pytest.mark.parametrize("first", [True, False])
def test_a_user_s_callback_that_stops_the_training_leaves_right_results(tmp_path, nu, first):
    """Before ours or after them; the record is that of as many steps."""
    found = []
    for name, stops in (("whole", []), ("stopped", [Stop()])):
        model, record = lora_model(), hlora.Record(tmp_path / name, quiet=True)
        steps = 6 if stops else 3
        settings = {"max_steps": steps, "lr_scheduler_type": "constant", "logging_steps": 1}
        trainer = make_trainer(model, tmp_path / f"run-{name}", stops if first else [], **settings)
        hlora.attach(trainer, record, hlora.Penalty(nu, phi=0.1))
        for callback in [] if first else stops:
            trainer.add_callback(callback)
        trainer.train()
        assert record.summary["steps"] == trainer.state.global_step == 3
        log = [(e["loss"], e["R"], e["penalty"]) for e in trainer.state.log_history if "R" in e]
        found.append((log, store.load(tmp_path / name)))
        assert steps_of(trainer.optimizer).regularizers == []
    (log, one), (other_log, other) = found
    assert log == other_log
    assert len(log) == 3
    for name, both in one.factors.items():
        assert all(map(torch.equal, both, other.factors[name]))
    a, b = one.importance.tensors(), other.importance.tensors()
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_a_retried_or_repeated_training_is_recorded_once(kind, tmp_path):
    """As auto_find_batch_size does it: training begins again with the same optimizer."""
    model = lora_model()
    callback = hlora.Record(tmp_path / "nu", kind=kind)
    trainer = make_trainer(model, tmp_path / "run", [callback])
    trainer.create_optimizer()
    callback.start(model, trainer.optimizer)
    callback.start(model, trainer.optimizer)
    steps = steps_of(trainer.optimizer)
    assert (len(steps.observers), len(steps.after)) == (1, 1)
    trainer.train()
    assert callback.summary["steps"] == 6
    plain, other = lora_model(), hlora.Record(tmp_path / "once", kind=kind)
    make_trainer(plain, tmp_path / "run", [other]).train()
    one, two = (load_file(tmp_path / n / store.TENSORS) for n in ("once", "nu"))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_groups_hold_all_pairs_of_a_shape():
    groups = group(find_pairs(lora_model()))
    assert sorted(len(g.pairs) for g in groups) == [2, 2]  # q_proj 16x16, v_proj 8x16


def test_going_back_to_the_best_weights_is_refused(tmp_path):
    trainer = make_trainer(lora_model(), tmp_path / "run", [hlora.Record(tmp_path / "nu")])
    trainer.args.load_best_model_at_end = True  # needs an evaluation to be accepted
    with pytest.raises(hlora.InputError, match="load_best_model_at_end"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("how", ["record", "penalty", "attached"])
def test_an_optimizer_whose_steps_do_nothing_ends_with_an_error(tmp_path, nu, how):
    class Idle(torch.optim.SGD):
        def step(self, closure=None):
            return None

    model = lora_model()
    trainer = make_trainer(model, tmp_path / "run")
    trainer.optimizer = Idle([p for p in model.parameters() if p.requires_grad], lr=0.1)
    parts = {"record": [hlora.Record(tmp_path / "new")], "penalty": [hlora.Penalty(nu)]}
    hlora.attach(trainer, *parts.get(how, []))
    trainer.create_optimizer_and_scheduler(6)
    with pytest.raises(hlora.UnsupportedModelError, match="moved any weight"):
        trainer.train()
    assert not (tmp_path / "new" / store.MARKER).exists()


def test_a_finished_recording_lets_go_of_the_model(tmp_path):
    record = hlora.Record(tmp_path / "nu", quiet=True)
    trainer = make_trainer(lora_model(), tmp_path / "a", max_steps=2)
    hlora.attach(trainer, record)
    trainer.train()
    record.write(trainer.model, store.load(tmp_path / "nu").importance)  # it can be asked for again
    layers = [weakref.ref(p.layer) for p in find_pairs(trainer.model)]
    del trainer
    gc.collect()
    assert record.summary["steps"] == 2
    assert not any(layer() for layer in layers)
