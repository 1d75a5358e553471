"""A budget of forgetting in place of φ."""

import gc
import weakref

import pytest
import torch
from transformers import TrainerCallback

import hlora
from hlora import files
from hlora.core import budget, statefile
from hlora.core.evaluating import evaluating
from hlora.core.importance.blend import Blend
from hlora.core.pairs import group
from hlora.core.quadratic import Quadratic
from hlora.hf.gauge import Gauge
from hlora.hf.peft import find_pairs
from hlora.hf.record import save_importance
from hlora.run.evaluate import divergence
from tests.conftest import lora_model, make_trainer, perturb, token_rows

WATCHED = torch.tensor([r["input_ids"] for r in token_rows(9, seed=6)])
TRAINING = {"max_steps": 40, "learning_rate": 2e-2, "logging_steps": 10}


def gathered(folder, watched=None, written=None):
    """A blend at the tiny LLaMA."""
    model = lora_model()
    pairs = find_pairs(model)
    rows = torch.tensor([r["input_ids"] for r in token_rows(32, seed=5)])
    importance, summary = Blend.gather(model, pairs, rows)
    if watched is not None:
        importance = importance.watching(watched, written)
    notes = {"recording": {"storage": "fp32"}, "summary": summary, "settings": {}}
    save_importance(folder, model, pairs, importance, notes)
    return folder


@pytest.fixture
def base(tmp_path):
    """Without text to measure on."""
    return gathered(tmp_path / "base")


@pytest.fixture
def watching(tmp_path):
    return gathered(tmp_path / "watching", WATCHED)


def trained(folder, penalty, callbacks=(), resume=None, **settings):
    trainer = make_trainer(lora_model(), folder, callbacks, **{**TRAINING, **settings})
    hlora.attach(trainer, penalty)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def predicted(model, base):
    """By a penalty that is not the one of the training."""
    groups = group(find_pairs(model))
    importance = hlora.load(base).importance
    anchor = {g.names: (torch.zeros_like(g.factors()[0]), g.factors()[1]) for g in groups}
    rule = hlora.Penalty(base).rule
    return float(Quadratic(importance, groups, anchor, rule).predict(groups))


def test_what_is_predicted_at_the_end_is_within_the_budget(base, tmp_path):
    free = predicted(trained(tmp_path / "a", hlora.Penalty(base, phi=0.0)).model, base)
    penalty = hlora.Penalty(base, forget_at_most=free / 20)
    trainer = trained(tmp_path / "b", penalty)
    assert predicted(trainer.model, base) <= free / 20 * 1.001
    # Steering did it, not the scaling at the end, and most of the budget was used.
    assert 0.25 * free / 20 < penalty.predicted < 3 * free / 20
    logs = [e for e in trainer.state.log_history if "loss" in e]
    assert logs[-1]["phi"] != logs[0]["phi"]
    assert all(e["forgetting"] >= 0 for e in logs)


def test_φ_settles(base, tmp_path):
    """A level that is moved by the error alone swings φ by orders of magnitude."""
    free = predicted(trained(tmp_path / "a", hlora.Penalty(base, phi=0.0)).model, base)
    settings = {"max_steps": 120, "logging_steps": 1, "lr_scheduler_type": "constant"}
    trainer = trained(tmp_path / "b", hlora.Penalty(base, forget_at_most=free / 5), **settings)
    late = [e for e in trainer.state.log_history if e.get("step", 0) > 60 and "phi" in e]
    swing = max(e["phi"] for e in late) / min(e["phi"] for e in late)
    worst = max(e["forgetting"] for e in late) / (free / 5)
    assert swing < 6, swing
    assert worst < 1.5, worst


def test_what_is_above_the_budget_at_the_end_is_taken_back(base):
    model = lora_model()
    penalty = hlora.Penalty(base, forget_at_most=1e-4)
    penalty._planned = 1
    penalty.start(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))
    perturb(model)
    before = predicted(model, base)
    assert before > 2e-4
    first, left, share = penalty.regularizer.keep(penalty._groups)
    assert (first, left) == (pytest.approx(before, rel=1e-4), pytest.approx(1e-4, rel=1e-3))
    assert share == pytest.approx((1e-4 / before) ** 0.5, rel=1e-3)
    assert predicted(model, base) == pytest.approx(1e-4, rel=1e-3)


def test_what_scaling_cannot_take_back_leaves_the_adapter(watching, tmp_path, caplog):
    """What is trained beside the matrices forgets, however small they are."""
    penalty = hlora.Penalty(watching, forget_at_most=1e-4, unheld="warn")
    trainer = make_trainer(lora_model(modules_to_save=["lm_head"]), tmp_path, **TRAINING)
    hlora.attach(trainer, penalty)
    trainer.train()
    assert penalty.share == 1
    assert penalty.left == pytest.approx(penalty.predicted)
    assert all(g.factors()[0].norm() > 1e-3 for g in group(find_pairs(trainer.model, "warn")))
    assert "not kept" in caplog.text


class Broken:
    """Of the measurements some are no number, as what overflows in half precision is."""

    def __init__(self, inner, bad):
        self.inner, self.bad, self.calls = inner, bad, 0

    def __len__(self):
        return len(self.inner)

    def __call__(self, part):
        self.calls += 1
        return self.inner(part) * (torch.nan if self.bad(self.calls, part) else 1)


@pytest.mark.parametrize("bad", [lambda n, part: n == 3, lambda n, part: isinstance(part, slice)])
def test_a_measurement_that_is_no_number_does_no_harm(bad, watching, tmp_path):
    penalty = hlora.Penalty(watching, forget_at_most=1e-3)

    class Break(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            held = penalty.regularizer
            held.gauges = [Broken(gauge, bad) for gauge in held.gauges]

    trainer = make_trainer(lora_model(), tmp_path, **TRAINING)
    hlora.attach(trainer, penalty)
    trainer.add_callback(Break())
    trainer.train()
    assert penalty.phi.isfinite()
    assert all(p.isfinite().all() for p in trainer.model.parameters())
    assert all(g.factors()[0].any() for g in group(find_pairs(trainer.model)))


def test_a_budget_in_a_loop_of_ones_own_is_refused(base):
    """Nobody tells it how many steps there will be."""
    model = lora_model()
    with pytest.raises(hlora.InputError, match="steps"):
        hlora.Penalty(base, forget_at_most=0.1).start(model, torch.optim.SGD(model.parameters()))


def test_a_budget_that_is_never_reached_leaves_the_training_alone(base, tmp_path):
    free = trained(tmp_path / "a", hlora.Penalty(base, phi=0.0))
    wide = trained(tmp_path / "b", hlora.Penalty(base, forget_at_most=1e3))
    a, b = (t.state.log_history[-2] for t in (free, wide))
    assert b["loss"] == pytest.approx(a["loss"], rel=1e-3)
    assert b["phi"] < 0.01


def test_a_gauge_is_the_divergence_from_the_base():
    model = lora_model()
    perturb(model)
    gauge = Gauge(model, WATCHED.int())
    assert float(gauge()) == pytest.approx(divergence(model, WATCHED).nats, rel=1e-5)
    odd = divergence(model, WATCHED[1::2]).nats
    assert float(gauge(slice(1, None, 2))) == pytest.approx(odd, rel=1e-5)


def test_a_gauge_looks_inside_wrappers():
    model = lora_model()
    perturb(model)
    wrapped = Gauge(torch.nn.DataParallel(model), WATCHED)
    assert float(wrapped()) == float(Gauge(model, WATCHED)()) > 0


def test_looking_changes_nothing():
    model = lora_model().train()
    model.base_model.eval()
    before = [m.training for m in model.modules()]
    state, needed = torch.get_rng_state(), [p.requires_grad for p in model.parameters()]
    Gauge(model, WATCHED)()
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in model.modules()] == before
    assert [p.requires_grad for p in model.parameters()] == needed
    with evaluating(model):
        assert not any(m.training for m in model.modules())


def test_text_that_the_model_does_not_know_is_refused(tmp_path):
    base = gathered(tmp_path / "base", WATCHED + 1000)
    with pytest.raises(hlora.MismatchError, match="token 10"):
        trained(tmp_path / "a", hlora.Penalty(base, forget_at_most=0.1))


def test_kept_text_is_read_back_and_damage_is_refused(watching):
    kept = hlora.load(watching).importance.watched
    assert torch.equal(kept, WATCHED.int())
    importance = Blend.gather(lora_model(), find_pairs(lora_model()), WATCHED)[0]
    for wrong in (WATCHED - 1000, WATCHED[0], WATCHED[:0], WATCHED[:1], WATCHED[:, :1]):
        with pytest.raises(ValueError, match="watched"):
            importance.watching(wrong).check()


def test_a_prediction_is_corrected_by_what_is_measured(base, tmp_path):
    """Of two texts that forget twice and five times what is predicted, the second one counts."""
    free = predicted(trained(tmp_path / "a", hlora.Penalty(base, phi=0.0)).model, base)
    penalty = hlora.Penalty(base, forget_at_most=free / 4)
    trainer = make_trainer(lora_model(), tmp_path / "b", **TRAINING)

    class Fake:
        def __init__(self, held, times):
            self.held, self.times = held, times

        def __len__(self):
            return 9

        def __call__(self, part):
            return self.times * self.held.predict(penalty._groups)

    class Fivefold(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            held = penalty.regularizer
            held.gauges = [Fake(held, 2), Fake(held, 5)]

    hlora.attach(trainer, penalty)
    trainer.add_callback(Fivefold())
    trainer.train()
    assert 0.25 * free / 4 < penalty.predicted < 3 * free / 4  # by steering
    assert predicted(trainer.model, base) == pytest.approx(
        min(penalty.predicted, free / 4) / 5, rel=0.03
    )
    logged = [e["forgetting"] for e in trainer.state.log_history if "loss" in e]
    assert logged[-1] == pytest.approx(penalty.predicted, rel=0.3)


def test_what_is_measured_at_the_end_is_within_the_budget(watching, tmp_path):
    free = trained(tmp_path / "a", hlora.Penalty(watching, phi=0.0)).model
    most = float(Gauge(free, WATCHED)()) / 20
    penalty = hlora.Penalty(watching, forget_at_most=most)
    held = trained(tmp_path / "b", penalty).model
    assert 0.2 * most < float(Gauge(held, WATCHED)()) <= 1.02 * most
    assert 0.2 * most < penalty.predicted < 3 * most


def test_text_that_is_watched_is_held_to_the_budget_too(watching, tmp_path):
    """Rows that are forgotten more than those that the importance keeps are what is held."""
    free = trained(tmp_path / "a", hlora.Penalty(watching, phi=0.0)).model
    rows = torch.arange(3, 63)[:, None].repeat(1, 12)
    watch = rows[torch.tensor([float(Gauge(free, r[None])()) for r in rows]).topk(9).indices]
    of_kept, of_watch = (float(Gauge(free, rows)()) for rows in (WATCHED, watch))
    assert of_watch > 1.5 * of_kept
    penalty = hlora.Penalty(watching, forget_at_most=of_watch / 20, watch=watch)
    held = trained(tmp_path / "b", penalty).model
    assert float(Gauge(held, watch)()) <= 1.02 * of_watch / 20
    assert 0.2 * of_watch / 20 < penalty.predicted < 3 * of_watch / 20
    without = hlora.Penalty(watching, forget_at_most=of_watch / 20)
    assert float(Gauge(trained(tmp_path / "c", without).model, watch)()) > 1.2 * of_watch / 20


@pytest.mark.parametrize(
    "rows",
    [
        WATCHED[0], WATCHED[:1], WATCHED.float(), WATCHED[:, :1], WATCHED[:, :0],
        WATCHED.where(WATCHED > 9, -100), WATCHED.tolist(),
    ],
)  # fmt: skip
def test_what_cannot_be_watched_is_refused(rows, watching):
    with pytest.raises(hlora.InputError, match="watch"):
        hlora.Penalty(watching, forget_at_most=0.1, watch=rows)
    with pytest.raises(hlora.InputError, match="forget_at_most"):
        hlora.Penalty(watching, watch=WATCHED)


def test_watched_text_of_another_tokenizer_is_refused(watching, tmp_path):
    with pytest.raises(hlora.MismatchError, match="token 63000"):
        trained(tmp_path, hlora.Penalty(watching, forget_at_most=0.1, watch=WATCHED + 62_937))


def test_rows_that_the_model_does_not_take_are_refused_before_training(watching, tmp_path):
    longer = WATCHED.repeat(1, 6)[:, :66]
    with pytest.raises(hlora.MismatchError, match=r"65 tokens.* 64"):
        trained(tmp_path, hlora.Penalty(watching, forget_at_most=0.1, watch=longer))
    Gauge(lora_model("gpt2"), longer[:, :65])()


@pytest.mark.parametrize(
    "free",
    [
        {"trainable_token_indices": [5]}, {"modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj", "v_proj", "embed_tokens"]},
    ],
)  # fmt: skip
def test_embeddings_that_are_trained_too_tell_how_many_tokens_there_are(free, watching, tmp_path):
    penalty = hlora.Penalty(watching, forget_at_most=10.0, unheld="warn")
    trainer = make_trainer(lora_model(**free), tmp_path, max_steps=2)
    hlora.attach(trainer, penalty)
    trainer.train()
    assert penalty.left > 0


def test_short_runs_are_steered_too(watching, tmp_path):
    """Not scaled back from far above, which costs the domain more than holding does."""
    over = []
    for steps in (16, 32, 40):
        short = {"max_steps": steps, "lr_scheduler_type": "linear"}
        free = trained(tmp_path / f"free-{steps}", hlora.Penalty(watching, phi=0.0), **short).model
        most = float(Gauge(free, WATCHED)()) / 20
        penalty = hlora.Penalty(watching, forget_at_most=most)
        trained(tmp_path / f"held-{steps}", penalty, **short)
        over.append(penalty.predicted / most)
    # Of five gatherings 1.08 to 1.23; of three, steered as a long run is, 1.63 to 1.85.
    assert sum(over) / len(over) < 1.45


def test_more_budget_learns_more(base, tmp_path):
    losses = [
        trained(tmp_path / str(b), hlora.Penalty(base, forget_at_most=b)).state.log_history[-2]
        for b in (1e-5, 1e-2)
    ]
    assert losses[0]["loss"] > losses[1]["loss"]


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 20


@pytest.mark.parametrize("which", ["base", "watching"])
def test_a_resumed_budget_goes_on_where_it_was(which, request, tmp_path):
    base = request.getfixturevalue(which)
    straight = trained(tmp_path / "a", hlora.Penalty(base, forget_at_most=1e-3))
    saving = {"save_strategy": "steps", "save_steps": 20}
    trained(tmp_path / "b", hlora.Penalty(base, forget_at_most=1e-3), [Stop()], **saving)
    resumed = trained(
        tmp_path / "b", hlora.Penalty(base, forget_at_most=1e-3),
        resume=str(tmp_path / "b" / "checkpoint-20"), **saving,
    )  # fmt: skip
    for a, b in zip(straight.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"forget_at_most": 0.0}, "forget_at_most"),
        ({"forget_at_most": 1e-320}, "forget_at_most"),
        ({"forget_at_most": float("nan")}, "forget_at_most"),
        ({"forget_at_most": 0.1, "phi": 1.0}, "phi"),
        ({"forget_at_most": 0.1, "anchor": "nu"}, "base"),
        ({"layer_weights": "softmax"}, "layer_weights"),
        ({"normalize": False}, "normalize"),
        ({"preset": "paper"}, "preset"),
    ],
)
def test_what_does_not_go_together_is_refused(base, given, named):
    with pytest.raises(hlora.InputError, match=named):
        hlora.Penalty(base, **given)


def test_an_importance_that_predicts_nothing_has_no_budget(nu):
    with pytest.raises(hlora.InputError, match="blend"):
        hlora.Penalty(nu, forget_at_most=0.1)


def test_any_rank_can_be_held_to_the_base(base, tmp_path):
    trainer = make_trainer(lora_model(r=4), tmp_path, **TRAINING)
    hlora.attach(trainer, hlora.Penalty(base))
    trainer.train()
    assert predicted(trainer.model, base) > 0


def test_φ_is_one_in_nats_and_the_base_is_the_anchor(base):
    penalty = hlora.Penalty(base)
    assert (penalty.phi, penalty.anchor) == (1.0, "base")


def test_a_tight_budget_pulls_no_harder_than_it_helps(tmp_path, monkeypatch):
    """Else Adam, which takes steps of one size, runs away and remembers it for a thousand steps."""
    of = gathered(tmp_path / "base", WATCHED, WATCHED)

    def hardest(folder):
        trainer = trained(folder, hlora.Penalty(of, forget_at_most=1e-5), logging_steps=1)
        return max(e.get("penalty_grad_ratio", 0) for e in trainer.state.log_history)

    assert 5 < hardest(tmp_path / "limited") <= budget.MOST_PULL * 1.001
    monkeypatch.setattr(budget, "MOST_PULL", torch.inf)
    assert hardest(tmp_path / "free") > 20


class Falls:
    """Forgetting that is a power of the scale of B, as it is far from the base model."""

    def __init__(self, groups, power, hole=()):
        self.groups, self.power, self.hole, self.full = groups, power, hole, self.size(groups)

    @staticmethod
    def size(groups):
        return float(groups[0].factors()[0].norm())

    def __len__(self):
        return 2

    def __call__(self, part):
        share = self.size(self.groups) / self.full
        if self.hole and self.hole[0] < share < self.hole[1]:
            return torch.tensor(torch.nan)
        return torch.tensor(3.0 * share**self.power)


@pytest.mark.parametrize(
    ("power", "hole", "budget"),
    [(2.0, (), 1e-3), (0.5, (), 0.3), (0.3, (), 1.0), (0.5, (0.01, 0.5), 0.2)],
)
def test_what_no_square_tells_is_taken_back_too(power, hole, budget, base, caplog):
    model = lora_model()
    penalty = hlora.Penalty(base, forget_at_most=budget)
    penalty._planned = 1
    penalty.start(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))
    perturb(model)
    penalty.regularizer.gauges = [Falls(penalty._groups, power, hole)]
    first, left, share = penalty.regularizer.keep(penalty._groups)
    assert first == pytest.approx(3)
    assert 0.4 * budget < left <= 1.02 * budget
    assert float(penalty.regularizer.gauges[0](None)) == pytest.approx(left)
    assert left == pytest.approx(3 * share**power, rel=1e-4)
    assert not caplog.text


@pytest.mark.parametrize("given", ["forget_at_most", "phi"])
@pytest.mark.parametrize("wrong", ["0.05", True, [0.05], torch.tensor(0.05)])
def test_what_is_no_number_is_no_strength(given, wrong, base):
    with pytest.raises(hlora.InputError, match=f"^{given} must be"):
        hlora.Penalty(base, **{given: wrong})


@pytest.mark.parametrize("value", [0.5, torch.tensor(0.5)])
def test_φ_is_not_set_on_a_budget(value, base, tmp_path):
    """It is steered, so setting it would be undone at the next step, or break it."""
    penalty = hlora.Penalty(base, forget_at_most=0.1)

    class Set(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with pytest.raises(hlora.InputError, match="forget_at_most steers phi"):
                penalty.phi = value

    Set().on_step_end(None, None, None)
    trained(tmp_path, penalty, [Set()], max_steps=2)
    assert penalty.left > 0


def test_a_budget_whose_bound_never_bites_is_no_fault(base, tmp_path, caplog):
    trained(tmp_path / "a", hlora.Penalty(base, forget_at_most=1e3))
    assert "next to nothing" not in caplog.text


@pytest.mark.parametrize("given", [{}, {"look_every": 0}, {"forget_at_most": 1e-3}])
def test_a_finished_penalty_lets_go_of_the_model(given, tmp_path):
    """And can be asked what it found, and train again."""
    penalty = hlora.Penalty(gathered(tmp_path / "base", WATCHED, WATCHED), **given)
    found = []
    for name in "ab":
        trainer = trained(tmp_path / name, penalty, max_steps=5, logging_steps=1)
        assert [e["R"] for e in trainer.state.log_history if "R" in e][-1] > 0
        found.append((penalty.predicted, penalty.left, penalty.share, float(penalty.phi)))
        parts = [weakref.ref(m) for m in trainer.model.modules()]
        del trainer
        gc.collect()
        assert not any(part() for part in parts)
    assert found[0] == pytest.approx(found[1])
    assert (found[0][0] is None) == ("forget_at_most" not in given)
    with pytest.raises(hlora.InputError, match="start"):
        penalty.value()


def test_a_training_that_failed_keeps_no_model_either(watching, tmp_path):
    class Fail(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise MemoryError

    penalty = hlora.Penalty(watching, forget_at_most=1e-3)
    trainer = make_trainer(lora_model(), tmp_path, [Fail()], **TRAINING)
    hlora.attach(trainer, penalty)
    with pytest.raises(MemoryError):
        trainer.train()
    parts = [weakref.ref(m) for m in trainer.model.modules()]
    del trainer
    gc.collect()
    assert not any(part() for part in parts)


@pytest.mark.parametrize(
    ("first", "second", "named"),
    [
        ({"forget_at_most": 1e-3}, {"forget_at_most": 1e-2}, "forget_at_most 0.001.*0.01"),
        ({"forget_at_most": 1e-3}, {"phi": 3.0}, "forget_at_most 0.001.*no forget_at_most"),
        ({"phi": 3.0}, {"forget_at_most": 1e-3}, "no forget_at_most.*0.001"),
        ({"phi": 3.0}, {}, "phi 3, and phi 1 "),
    ],
)
def test_a_run_is_resumed_with_the_strength_it_had(first, second, named, base, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trained(tmp_path, hlora.Penalty(base, **first), **saving)
    checkpoint = tmp_path / "checkpoint-2"
    with pytest.raises(hlora.InputError, match=f"Cannot resume .*{named}"):
        trained(tmp_path, hlora.Penalty(base, **second), resume=str(checkpoint), **saving)
    # An older state does not tell what was asked for.
    path = checkpoint / "hlora_penalty.safetensors"
    tensors, notes = statefile.read(path, "penalty")
    del notes["asked"]
    path.write_bytes(statefile.pack(tensors, notes))
    files.seal(checkpoint)
    trained(tmp_path, hlora.Penalty(base, **second), resume=str(checkpoint), **saving)


def test_a_step_without_a_gradient_of_the_task_is_held_too(base):
    """As GRPO's where all rewards are the same: Adam goes on, and so does what holds it."""
    model = lora_model()
    penalty = hlora.Penalty(base, forget_at_most=1e-5)
    penalty._planned = 40
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.0)
    penalty.start(model, optimizer)
    perturb(model)
    pulls = []
    for size in (0.0, 1e-3, 0.0, 0.0, 2e-3):
        for p in trained:
            p.grad = torch.full_like(p, size)
        optimizer.step()
        pulls.append(sum(float((p.grad - size).square().sum()) for p in trained) ** 0.5)
    most = budget.MOST_PULL * 1e-3 * sum(p.numel() for p in trained) ** 0.5
    assert pulls == pytest.approx([0, most, most, most, 2 * most], rel=1e-3)


def test_a_resumed_budget_knows_the_last_gradient_of_the_task(base, tmp_path):
    """Of a step before the checkpoint, where the first one after it has none."""

    def run(name, callbacks=(), resume=None, **settings):
        trainer = make_trainer(lora_model(), tmp_path / name, callbacks, **TRAINING, **settings)
        inner = trainer.compute_loss

        def compute_loss(*of, **named):
            return inner(*of, **named) * (trainer.state.global_step not in (20, 21))

        trainer.compute_loss = compute_loss
        hlora.attach(trainer, hlora.Penalty(base, forget_at_most=1e-5))
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    saving = {"save_strategy": "steps", "save_steps": 20}
    straight = run("a")
    run("b", [Stop()], **saving)
    resumed = run("b", resume=str(tmp_path / "b" / "checkpoint-20"), **saving)
    assert all(map(torch.equal, straight.parameters(), resumed.parameters()))
