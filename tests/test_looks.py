"""Looks at the predictions that correct a quadratic while training."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

import hlora
from hlora.cli import main as cli
from hlora.core import looks
from hlora.core.pairs import group
from hlora.core.regularizer import Pull
from hlora.core.steps import limited
from hlora.errors import InputError, UnsupportedModelError
from hlora.hf.divergence import divergences
from hlora.hf.gauge import Gauge
from hlora.hf.peft import find_pairs, without_adapter
from hlora.hf.regularize import LOOK_EVERY
from hlora.run.phases import regularizers
from hlora.run.settings import TuneSettings
from tests.conftest import base_model, lora_model, make_trainer, perturb
from tests.test_budget import WATCHED, gathered, trained
from tests.test_distributed import in_force
from tests.test_peers import straight_and_resumed
from tests.tiny import questions, write_model, write_rows, write_text


@pytest.fixture
def base(tmp_path):
    return gathered(tmp_path / "base", WATCHED, WATCHED)


def reference(model, rows):
    """∇KL by autograd, by parameter."""
    ids = rows[:, :-1].long()
    with torch.no_grad(), model.disable_adapter():
        before = model(input_ids=ids).logits
    factors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    kl = divergences(before, model(input_ids=ids).logits).mean()
    return dict(zip(factors, torch.autograd.grad(kl, list(factors.values())), strict=True))


def test_a_look_is_the_gradient_of_the_divergence_and_leaves_the_tasks_alone():
    model = lora_model()
    perturb(model)
    groups = group(find_pairs(model))
    for p in model.parameters():
        p.grad = torch.full_like(p, 7.0) if p.requires_grad else None
    found = Gauge(model, WATCHED).pull(torch.arange(4), groups)
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
        p.grad = torch.ones_like(p) if p.requires_grad else None
    wanted = reference(model, WATCHED[: looks.ROWS])
    optimizer.step()
    for n, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(before[n] - p - 1, 0.25 * wanted[n], rtol=1e-3, atol=1e-6)


def test_little_forgetting_pulls_in_fp16_too():
    """Its gradients by the logits are too small for fp16, and nothing scales this loss."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50_000, num_attention_heads=4, **shape))
    model.lm_head.weight.data.mul_(10)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    perturb(model, size=2e-3)
    rows = torch.randint(50_000, (2, 128))
    groups = group(find_pairs(model))
    exact = Gauge(model, rows).pull(torch.arange(2), groups)
    with torch.autocast("cpu", torch.float16):
        found = Gauge(model, rows).pull(torch.arange(2), groups)
    for one, two in zip(exact, found, strict=True):
        for a, b in zip(one, two, strict=True):
            assert (a - b).norm() < 0.1 * a.norm()


def test_asking_for_the_value_changes_no_training(base, tmp_path):
    class Ask(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            penalty.value()

    penalty = hlora.Penalty(base, phi=0.3, look_every=3)
    quiet = trained(tmp_path / "a", hlora.Penalty(base, phi=0.3, look_every=3))
    asked = trained(tmp_path / "b", penalty, [Ask()])
    torch.testing.assert_close(state(quiet.model), state(asked.model), rtol=0, atol=0)


def state(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def test_between_looks_the_quadratic_tells_only_the_change(base):
    """At the weights of the last look the pull is that look's, whatever R says there."""
    model = lora_model()
    perturb(model)
    groups = group(find_pairs(model))
    penalty = hlora.Penalty(base, phi=0.5, look_every=2)
    penalty.start(model, torch.optim.SGD(model.parameters(), lr=0.1))
    quadratic = penalty.regularizer
    plain = quadratic.before_step(groups).gradients
    for g, (dB, _) in zip(groups, plain, strict=True):
        assert dB.any(), g.names
    looked, again = (quadratic.before_step(groups) for _ in range(2))
    for one, two, alone in zip(looked.gradients, again.gradients, plain, strict=True):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, alone)
    for one, two in zip(looked.correction, again.correction, strict=True):
        torch.testing.assert_close(one, two)
        assert one[0].any()


@pytest.mark.parametrize("scale", [None, 8.0])
@pytest.mark.parametrize("size", [0.1, 1e3])
@pytest.mark.parametrize("most", [0.5, torch.inf])
def test_what_is_added_keeps_within_the_tasks_gradient(size, most, scale):
    """A correction within the norm of it, and all of a budget's pull within so many times it."""
    groups = group(find_pairs(lora_model()))
    ones = [tuple(torch.ones_like(f) for f in g.factors()) for g in groups]
    for g, (B, A) in zip(groups, ones, strict=True):
        g.add_gradients(B * (scale or 1), A * (scale or 1))
    of = [(size * B, size * A) for B, A in ones]
    pull = Pull(torch.ones(()), ones, correction=of, most=most)
    found = limited(pull, groups, scale and torch.tensor(scale))
    wanted = min(1 + min(size, 1.0), most)
    for (B, A), (one, two) in zip(found, ones, strict=True):
        torch.testing.assert_close((B, A), (wanted * one, wanted * two))


def test_without_limits_gradients_are_as_they_are():
    groups = group(find_pairs(lora_model()))
    pulled = [g.factors() for g in groups]
    assert limited(Pull(torch.ones(()), pulled), groups, None) is pulled


def test_a_resumed_run_looks_as_one_that_went_through(base, tmp_path):
    both = straight_and_resumed(tmp_path, lambda: hlora.Penalty(base, phi=0.3, look_every=3))
    torch.testing.assert_close(*map(state, both))


def test_a_budget_can_look(base, tmp_path):
    penalty = hlora.Penalty(base, forget_at_most=0.01, look_every=4)
    model = trained(tmp_path / "a", penalty).model
    assert float(Gauge(model, WATCHED)()) <= 0.0102


@pytest.mark.parametrize("wrong", [-1, 1.5, "16", True])
def test_a_number_of_steps_is_whole_and_not_negative(wrong, base):
    with pytest.raises(InputError, match="look_every"):
        hlora.Penalty(base, look_every=wrong)


def test_a_sharded_model_is_refused_before_training(base, tmp_path, monkeypatch):
    trainer = make_trainer(lora_model(), tmp_path)
    in_force(monkeypatch, "FSDP", fsdp_version=2)
    with pytest.raises(UnsupportedModelError, match=r"look_every.*sharded"):
        hlora.attach(trainer, hlora.Penalty(base, look_every=4))


def test_looks_need_text_and_the_base_model(base, tmp_path):
    with pytest.raises(InputError, match="keeps none"):
        hlora.Penalty(gathered(tmp_path / "without", WATCHED), look_every=4)
    with pytest.raises(InputError, match="anchor"):
        hlora.Penalty(base, anchor="nu", look_every=4)


@pytest.mark.parametrize(
    ("given", "steps", "every"),
    [
        ({}, 200, 16), ({}, None, 16), ({}, 20, 5), ({}, 2, 1), ({"phi": 0.3}, 200, 16),
        ({"look_every": 0}, 200, 0), ({"look_every": 3}, 200, 3), ({"anchor": "nu"}, 200, 0),
        ({"forget_at_most": 0.1}, 200, 16), ({"forget_at_most": 0.1, "look_every": 0}, 200, 0),
    ],
)  # fmt: skip
def test_looks_by_default(given, steps, every, base):
    model = lora_model()
    assert _started(hlora.Penalty(base, **given), model, steps) == every


@pytest.mark.parametrize("given", [{}, {"forget_at_most": 0.1}])
def test_no_looks_by_default_where_the_importance_keeps_no_text(given, tmp_path):
    penalty = hlora.Penalty(gathered(tmp_path / "base", WATCHED), **given)
    assert _started(penalty, lora_model(), 200) == 0


def test_no_looks_by_default_where_there_is_nothing_to_look_at(base, monkeypatch):
    """A classifier or a sharded model; an adapter that does not start at the base model."""
    from hlora.hf import regularize

    for name, answer in (("predicts_text", False), ("is_sharded", True), ("starts_at_base", False)):
        with monkeypatch.context() as patch:
            patch.setattr(regularize, name, lambda *_, answer=answer: answer)
            assert _started(hlora.Penalty(base), lora_model(), 200) == 0


def _started(penalty, model, steps):
    """Steps from one look to the next, once training has begun."""
    penalty._planned = steps
    penalty.start(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))
    looks = penalty.regularizer.looks
    return looks.every if looks else 0


def test_of_several_importances_the_first_one_looks(base, tmp_path):
    able = gathered(tmp_path / "able", WATCHED.flip(0), WATCHED)
    for other in (able, gathered(tmp_path / "other", WATCHED)):
        given = {"model": "m", "task": "t", "output": "o", "importance": [str(base), str(other)]}
        for every in (0, 4):
            first, second = regularizers(TuneSettings(**given, look_every=every))
            assert (first.look_every, second.look_every) == (every, 0)
        both = regularizers(TuneSettings(**given))
        trainer = make_trainer(lora_model(), tmp_path)
        hlora.attach(trainer, *both)
        assert [_started(p, trainer.model, 200) for p in both] == [16, 0]


def test_what_is_frozen_stays_so_and_has_no_part_in_a_look(base):
    """PEFT thaws a whole adapter when it comes back."""
    model = lora_model()
    perturb(model)
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and "lora_A" not in name)
    free = [n for n, p in model.named_parameters() if p.requires_grad]
    penalty = hlora.Penalty(base, phi=0.5, look_every=1)
    assert _started(penalty, model, 200) == 1
    groups = group(find_pairs(model))
    correction = penalty.regularizer.before_step(groups).correction
    assert all(dB.any() and not dA.any() for dB, dA in correction)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == free


def test_a_look_that_overflows_saw_nothing(base, tmp_path):
    """Else what it left would be in every later step, and in the checkpoint."""
    model = lora_model()
    perturb(model)
    penalty = hlora.Penalty(base, phi=0.5, look_every=1)
    _started(penalty, model, 200)
    groups = group(find_pairs(model))
    looks, pull = penalty.regularizer.looks, penalty.regularizer.looks.pull

    def overflowed(index, of):
        return [(B * torch.inf, A) for B, A in pull(index, of)]

    looks.pull = overflowed
    first = penalty.regularizer.before_step(groups).correction
    assert not any(t.any() for both in first for t in both)
    looks.pull = pull
    second = penalty.regularizer.before_step(groups).correction
    looks.pull = overflowed
    third = penalty.regularizer.before_step(groups).correction
    assert any(t.any() for both in second for t in both)
    torch.testing.assert_close(third, second)
    state = {k: torch.full_like(t, torch.nan) for k, t in looks.state().items() if "." in k[6:]}
    looks.found = {}
    looks.load_state(state, penalty.regularizer.anchor)
    assert not looks.found


def test_a_model_that_cannot_be_looked_at_trains_without(base, tmp_path, caplog):
    model = lora_model()
    forward = model.get_base_model().forward

    def without_cache(input_ids, attention_mask=None, labels=None, **kwargs):
        if "use_cache" in kwargs:
            raise TypeError("unexpected keyword 'use_cache'")
        return forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels)

    model.get_base_model().forward = without_cache
    assert _started(hlora.Penalty(base), model, 200) == 0
    assert "without looks" in caplog.text
    assert "use_cache" in caplog.text
    caplog.clear()
    _started(hlora.Penalty(base, look_every=16), model, 200)
    assert "without looks" not in caplog.text


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_within_a_limit_nothing_is_not_finite(broken):
    groups = group(find_pairs(lora_model()))
    ones = [tuple(torch.ones_like(f) for f in g.factors()) for g in groups]
    for g, (B, A) in zip(groups, ones, strict=True):
        g.add_gradients(B, A)
    pull = Pull(torch.ones(()), ones, correction=[(B * broken, A) for B, A in ones])
    torch.testing.assert_close(limited(pull, groups, None), ones)


def test_the_help_says_how_often_it_looks_by_default(capsys):
    with pytest.raises(SystemExit):
        cli.main(["tune", "--help-all"])
    said = " ".join(capsys.readouterr().out.split())
    of = said[said.index("once in N steps also") :][:300]
    assert f"{LOOK_EVERY}, and in a run of less than {4 * LOOK_EVERY} steps a quarter" in of


def test_a_dry_run_counts_looks_and_kl(tmp_path, capsys):
    write_model(tmp_path / "model")
    write_text(tmp_path / "a.txt")
    write_rows(tmp_path / "task.jsonl", questions())
    common = ["--model", str(tmp_path / "model"), "--device", "cpu", "--output"]
    record = ["record", *common, str(tmp_path / "base"), "--kind", "blend", "--sequences", "16"]
    assert cli.main([*record, "--block-size", "24"]) == 0
    tune = ["tune", *common, str(tmp_path / "held"), "--importance", str(tmp_path / "base")]
    tune += ["--task", str(tmp_path / "task.jsonl"), "--max-steps", "40", "--dry-run"]
    tune += ["--gradient-accumulation", "2"]
    capsys.readouterr()
    for more, lines in (
        ([], {"looks": 4}), (["--look-every", "0"], {}), (["--phi", "0"], {}),
        (["--forget-at-most", "0.1", "--text", str(tmp_path / "a.txt")],
         {"looks": 4, "measuring": 16, "last check": 1}),
        (["--look-every", "16", "--kl", str(tmp_path / "a.txt"), "task"],
         {"looks": 2, "KL": 20, "KL, prompts": 20}),
    ):  # fmt: skip
        assert cli.main([*tune, *more]) == 0
        said = re.findall(r"(.{11}) (\d+) in all, [\d.]+ s each here", capsys.readouterr().out)
        assert {what.strip(): int(times) for what, times in said} == lines


def test_an_adapter_of_transformers_itself_is_taken_away_too(monkeypatch):
    # The newest asks for a PEFT that is not out yet.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model, ids = base_model(), WATCHED[:1].long()
    before = model(input_ids=ids).logits
    model.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    perturb(model)
    after = model(input_ids=ids).logits
    with without_adapter(model):
        torch.testing.assert_close(model(input_ids=ids).logits, before)
    torch.testing.assert_close(model(input_ids=ids).logits, after)
    assert (after - before).abs().max() > 1e-3
