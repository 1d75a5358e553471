"""One domain after another: held to several importances, on a model that has changed since."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import hlora
from hlora.core import store
from hlora.core.steps import steps_of
from hlora.hf.peft import find_pairs
from tests.conftest import VOCAB, base_model, lora_model, make_trainer, perturb, token_rows
from tests.test_record import Spy, expected_omega

# PEFT 0.18 leaves its settings on a model that an adapter was merged into.
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")


def learn(folder, seed, *parts, model=None, **settings):
    """Train on the rows of a domain; returns the model."""
    model = model or lora_model(dtype=torch.float64)
    trainer = make_trainer(model, folder / f"run-{seed}", rows=token_rows(seed=seed), **settings)
    hlora.attach(trainer, *parts)
    trainer.train()
    return model


def two_domains(place, kind):
    """B learned from where A ended and held to it; each recorded alone."""
    a = place / "a"
    learn(place, 1, hlora.Record(a, kind=kind, quiet=True))
    held = hlora.Penalty(a, phi=0.3)
    learn(place, 2, held, hlora.Record(place / "b", kind=kind, quiet=True))


@pytest.fixture(params=["dense", "factored"])
def domains(tmp_path, request, once):
    once(two_domains, tmp_path, request.param)
    return tmp_path / "a", tmp_path / "b"


def started(model, *parts):
    """An optimizer with the parts on it, as `attach` and a Trainer start them."""
    trainer = make_trainer(model, "unused")
    hlora.attach(trainer, *parts)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for part in parts:
        part.start(model, optimizer)
    return optimizer


def pulled(model, optimizer):
    """The gradients that the penalties add, by parameter."""
    model.zero_grad()
    steps_of(optimizer).regularize(optimizer)
    return [f.grad.clone() for p in find_pairs(model) for f in (p.B, p.A)]


def change(pair, folder):
    """θ − θ^ν of a pair, (m, n)."""
    B, A = (f.double() for f in store.load(folder).factors[pair.name])
    noted = store.read_info(folder)["pairs"][pair.name]
    return (pair.s * pair.B @ pair.A - noted["s"] * B @ A).detach()


def test_r_and_gradients_of_two_are_the_sums_each_with_its_own_anchor(domains, tmp_path):
    a, b = domains
    model = lora_model(dtype=torch.float64)
    parts = hlora.Penalty(a, phi=0.4), hlora.Penalty(b, phi=0.7)
    optimizer = started(model, *parts, hlora.Record(tmp_path / "c", quiet=True))
    # Training starts at the newest, and there A pulls already.
    for p in find_pairs(model):
        torch.testing.assert_close(change(p, b), torch.zeros_like(p.B @ p.A))
    assert float(parts[1].value()) == 0.0
    assert float(parts[0].value()) > 0
    perturb(model)
    both = pulled(model, optimizer)
    told = steps_of(optimizer).report()
    values = [float(p.value()) for p in parts]
    assert told["R"] == pytest.approx(sum(values))
    assert told["penalty"] == pytest.approx(0.4 * values[0] + 0.7 * values[1])
    alone = []
    for folder, phi in ((a, 0.4), (b, 0.7)):
        other = lora_model(dtype=torch.float64)
        optimizer = started(other, hlora.Penalty(folder, phi=phi))
        other.load_state_dict(model.state_dict())
        alone.append(pulled(other, optimizer))
    for found, *of in zip(both, *alone, strict=True):
        torch.testing.assert_close(found, of[0] + of[1])
        assert all(g.any() for g in of)


def test_a_domain_that_is_held_records_what_its_own_task_does(domains, tmp_path):
    """Ω of C is that of C's gradient along the path that the penalties bent, and not A's or B's."""
    a, b = domains
    model = lora_model(dtype=torch.float64)
    trainer = make_trainer(model, tmp_path / "run", rows=token_rows(seed=3))
    record = hlora.Record(tmp_path / "c", kind="dense", quiet=True)
    hlora.attach(trainer, hlora.Penalty(a, phi=5.0), hlora.Penalty(b, phi=5.0), record)
    spy = Spy(model)
    trainer.create_optimizer()
    spy.watch(trainer.optimizer)  # its hook comes before ours: it sees the task's gradient
    trainer.train()
    stored = store.load(tmp_path / "c").importance.tensors()
    for i, pair in enumerate(find_pairs(model)):
        expected = expected_omega(spy, i, pair.s).clamp(min=0)
        expected = expected / (change(pair, b) ** 2 + 1e-3)
        torch.testing.assert_close(stored[pair.name].double(), expected, rtol=1e-4, atol=1e-8)
    free = learn(tmp_path, 3, hlora.Penalty(a, phi=0.0), hlora.Penalty(b, phi=0.0))
    moved = [sum(float(change(p, b).square().sum()) for p in find_pairs(m)) for m in (model, free)]
    assert 0 < moved[0] < moved[1]


def test_the_last_one_given_leads_and_nobody_is_warned(domains, tmp_path, caplog):
    a, b = domains
    with caplog.at_level("WARNING", "hlora"):
        learn(tmp_path, 3, hlora.Penalty(a, phi=1.0), hlora.Penalty(b, phi=1.0))
        loaded = PeftModel.from_pretrained(base_model(), b, is_trainable=True)
        learn(tmp_path, 3, hlora.Penalty(a, phi=1.0), hlora.Penalty(b, phi=1.0), model=loaded)
    assert "neither new nor" not in caplog.text
    model = lora_model(dtype=torch.float64)
    trainer = make_trainer(model, tmp_path / "apart", max_steps=1, learning_rate=0.0)
    hlora.attach(trainer, hlora.Penalty(b))
    hlora.attach(trainer, hlora.Penalty(a))
    optimizer = trainer.create_optimizer()
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, hlora.Penalty):
            callback.start(model, optimizer)
    assert all(change(p, a).abs().max() < 1e-9 for p in find_pairs(model))


def test_a_resumed_domain_ends_bit_for_bit_with_the_same_importance(domains, tmp_path):
    def parts(folder):
        record = hlora.Record(tmp_path / folder, kind="dense", quiet=True)
        return *(
            hlora.Penalty(d, phi=phi) for d, phi in zip(domains, (2.0, 3.0), strict=True)
        ), record

    settings = {"save_strategy": "steps", "save_steps": 3}
    whole = learn(tmp_path, 3, *parts("whole"), **settings)
    resumed = lora_model(dtype=torch.float64)
    trainer = make_trainer(resumed, tmp_path / "run-3", rows=token_rows(seed=3), **settings)
    penalties = parts("resumed")
    hlora.attach(trainer, *penalties)
    trainer.train(resume_from_checkpoint=str(tmp_path / "run-3" / "checkpoint-3"))
    assert [p.phi for p in penalties[:2]] == [2.0, 3.0]
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    first, second = (store.load(tmp_path / n).importance.tensors() for n in ("whole", "resumed"))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_what_is_resumed_is_what_the_run_had_and_in_its_order(domains, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 3}
    a, b = domains
    kept = hlora.Penalty(a), hlora.Penalty(b, phi=2.0), hlora.Record(tmp_path / "c", quiet=True)
    learn(tmp_path, 3, *kept, **saved)

    def resume(*parts):
        trainer = make_trainer(lora_model(dtype=torch.float64), tmp_path / "run-3", **saved)
        hlora.attach(trainer, *parts)
        trainer.train(resume_from_checkpoint=str(tmp_path / "run-3" / "checkpoint-3"))

    def record():
        return hlora.Record(tmp_path / "again", quiet=True)

    with pytest.raises(hlora.StoreError, match=r"hlora_penalty\.safetensors.*order"):
        resume(hlora.Penalty(b), hlora.Penalty(a), record())
    with pytest.raises(hlora.StoreError, match=r"hlora_penalty-2\.safetensors.*order"):
        resume(hlora.Penalty(a), hlora.Penalty(b, anchor="base"), record())
    with pytest.raises(hlora.StoreError, match=r"hlora_penalty-2\.safetensors.*not attached"):
        resume(hlora.Penalty(a), record())
    with pytest.raises(hlora.StoreError, match=r"hlora_record\.safetensors.*not attached"):
        resume(hlora.Penalty(a), hlora.Penalty(b))
    resume(hlora.Penalty(a), hlora.Penalty(b, phi=2.0), record())


def test_a_sum_at_the_newest_anchor(domains, tmp_path):
    """Eq. 13 over domains: `previous` adds A's importance to B's own, and A's anchor is dropped."""
    a, b = domains
    kind = store.load(a).importance.kind
    summed = hlora.Record(tmp_path / "ab", kind=kind, previous=a, quiet=True)
    learn(tmp_path, 2, hlora.Penalty(a, phi=0.3), summed)
    of = [store.load(d).importance.totals() for d in (a, b, tmp_path / "ab")]
    assert of[2] == pytest.approx({n: of[0][n] + of[1][n] for n in of[0]}, rel=1e-4)


# ---------------------------------------------------------------- what has changed since


@pytest.mark.parametrize("config", [{"r": 5, "lora_alpha": 5}, {"r": 2, "lora_alpha": 7},
                                    {"rank_pattern": {"v_proj": 4}}])  # fmt: skip
def test_a_larger_rank_or_another_scaling_starts_at_the_same_weights(domains, tmp_path, config):
    a, _ = domains
    model = lora_model(dtype=torch.float64, **config)
    penalty = hlora.Penalty(a, phi=0.7)
    optimizer = started(model, penalty)
    for p in find_pairs(model):
        torch.testing.assert_close(change(p, a), torch.zeros_like(p.B @ p.A), atol=1e-8, rtol=0)
        assert p.A.any(dim=1).all()  # or what was added would never learn
    perturb(model)
    pairs, Omega = find_pairs(model), dense(a)
    weights = {
        n: float(v)
        for names, values in penalty.regularizer._coefficients.items()
        for n, v in zip(names, values, strict=True)
    }
    R = torch.zeros((), dtype=torch.float64)
    for p in pairs:
        s, (B, A) = store.read_info(a)["pairs"][p.name]["s"], store.load(a).factors[p.name]
        assert A.shape[0] == 2
        D = p.s * p.B @ p.A - s * B.double() @ A.double()
        R = R + weights[p.name] * (Omega[p.name] * D**2).sum()
    assert float(penalty.value()) == pytest.approx(float(R.detach()), rel=1e-5)
    expected = torch.autograd.grad(0.7 * R, [f for p in pairs for f in (p.B, p.A)])
    for found, of in zip(pulled(model, optimizer), expected, strict=True):
        torch.testing.assert_close(found, of, rtol=1e-4, atol=1e-8)
    free = learn(tmp_path, 3, hlora.Penalty(a), model=lora_model(dtype=torch.float64, **config))
    for p in find_pairs(free):
        assert p.B.any(dim=0).all()  # every column has learned


def dense(folder):
    """Ω by name, (m, n), of either kind."""
    of = store.load(folder).importance
    if of.kind == "dense":
        return {n: t.double() for n, t in of.tensors().items()}
    tensors = {n: t.double() for n, t in of.tensors().items()}
    rows = {n.removesuffix(".rows"): t for n, t in tensors.items() if n.endswith(".rows")}
    return {n: torch.outer(r, tensors[f"{n}.columns"]) / r.sum() for n, r in rows.items()}


def test_a_larger_rank_resumes_to_the_same_bits(domains, tmp_path):
    a, _ = domains
    settings = {"save_strategy": "steps", "save_steps": 3}

    def model():
        return lora_model(dtype=torch.float64, r=4)

    whole = learn(tmp_path, 3, hlora.Penalty(a, phi=5.0), model=model(), **settings)
    resumed = model()
    trainer = make_trainer(resumed, tmp_path / "run-3", rows=token_rows(seed=3), **settings)
    hlora.attach(trainer, hlora.Penalty(a, phi=5.0))
    trainer.train(resume_from_checkpoint=str(tmp_path / "run-3" / "checkpoint-3"))
    for p, q in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_smaller_rank_is_refused_before_training(domains, tmp_path):
    with pytest.raises(hlora.MismatchError, match=r"rank of .*merged"):
        hlora.attach(make_trainer(lora_model(r=1), tmp_path), hlora.Penalty(domains[0]))


def merged(*folders):
    """The base model with adapters added to its weights, and a new adapter of another rank."""
    model = base_model().double()
    for folder in folders:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    config = LoraConfig(r=3, lora_alpha=3, target_modules=["q_proj", "v_proj"])
    return get_peft_model(model.requires_grad_(False), config)


def test_importance_holds_a_model_that_its_adapter_was_merged_into(domains):
    a, _ = domains
    with pytest.raises(hlora.MismatchError, match="anchor='merged'"):
        started(merged(a), hlora.Penalty(a))
    with pytest.raises(hlora.MismatchError, match="other weights"):
        started(merged(a), hlora.Penalty(a, anchor="base"))
    model = merged(a)
    penalty = hlora.Penalty(a, phi=0.7, anchor="merged")
    started(model, penalty)
    assert float(penalty.value()) == 0.0
    assert all(not p.B.any() for p in find_pairs(model))
    perturb(model)
    whole = lora_model(dtype=torch.float64)  # the same, with the adapter beside the base model
    there = hlora.Penalty(a, phi=0.7)
    started(whole, there)
    Omega = dense(a)
    ours = sum(
        float(v) * float((Omega[n] * (p.s * p.B @ p.A).detach() ** 2).sum())
        for names, values in there.regularizer._coefficients.items()
        for n, v in zip(names, values, strict=True)
        for p in find_pairs(model)
        if p.name == n
    )
    assert float(penalty.value()) == pytest.approx(ours, rel=1e-5)


def test_one_of_another_architecture_is_no_merged_model(domains):
    model = lora_model("gptj")
    with pytest.raises(hlora.MismatchError, match="model_type"):
        started(model, hlora.Penalty(domains[0], anchor="merged"))


def test_several_are_held_on_a_model_that_all_were_merged_into(domains, tmp_path):
    """Two adapters of one after the other: B's holds A's too, so it alone is merged."""
    a, b = domains
    model = merged(b)
    learn(tmp_path, 3, hlora.Penalty(a, phi=1.0, anchor="merged"),
          hlora.Penalty(b, phi=1.0, anchor="merged"), hlora.Record(tmp_path / "c", quiet=True),
          model=model)  # fmt: skip
    then = lora_model(dtype=torch.float64, r=3)
    with pytest.raises(hlora.MismatchError, match="other weights"):
        started(then, hlora.Penalty(tmp_path / "c"))


def test_importance_holds_a_model_whose_vocabulary_was_resized(domains, tmp_path):
    def resized(**config):
        model = base_model()
        model.resize_token_embeddings(VOCAB + 8, mean_resizing=False)
        config = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **config}
        return get_peft_model(model, LoraConfig(**config)).double()

    model = resized()
    started(model, *(parts := [hlora.Penalty(d) for d in domains]))
    assert float(parts[1].value()) == 0.0
    for p in find_pairs(model):
        torch.testing.assert_close(change(p, domains[1]), torch.zeros_like(p.B @ p.A))
    targets = {"target_modules": ["q_proj", "lm_head"]}
    learn(tmp_path, 4, hlora.Record(tmp_path / "head", quiet=True), model=lora_model(**targets))
    with pytest.raises(hlora.MismatchError, match="output size of lm_head"):
        started(resized(**targets), hlora.Penalty(tmp_path / "head"))


def test_two_of_other_targets_are_refused_by_the_one_that_does_not_fit(domains, tmp_path):
    other = lora_model(dtype=torch.float64, target_modules=["q_proj"])
    learn(tmp_path, 4, hlora.Record(tmp_path / "q", quiet=True), model=other)
    with pytest.raises(hlora.MismatchError, match=r"LoRA targets.*/q was recorded on q_proj"):
        started(lora_model(dtype=torch.float64), hlora.Penalty(domains[0]),
                hlora.Penalty(tmp_path / "q"))  # fmt: skip


# ---------------------------------------------------------------- what a study of them shows


def test_average_accuracy_and_backward_transfer_are_those_of_the_paper():
    """Lopez-Paz & Ranzato 2017, by hand: a_ij = .5; .25 .75; 0 .5 1, of four questions each."""
    from studies.domains import average, averaged, backward_transfer

    def right(*shares):
        return [{"right": [1.0] * round(4 * s) + [0.0] * round(4 - 4 * s)} for s in shares]

    figures = [right(0.5), right(0.25, 0.75), right(0.0, 0.5, 1.0)]
    assert average(figures, "right")[0] == pytest.approx((0 + 0.5 + 1) / 3)
    value, error = backward_transfer(figures, "right")
    assert value == pytest.approx((-0.5 - 0.25) / 2)
    # Paired: changes −1 −1 0 0 and −1 0 0 0, and the mean of two of them.
    assert error == pytest.approx(((1 / 3) / 4 + (1 / 4) / 4) ** 0.5 / 2)
    assert str(backward_transfer(figures[:1], "right")[0]) == "nan"
    assert averaged([figures, [*figures[:2], right(1.0, 0.5, 1.0)]])[2][0]["right"] == [0.5] * 4
