"""SI and Fisher on the entries of A and B, against plain references."""

import pytest
import torch
from torch.nn import functional as F

import hlora
from hlora.core import store
from hlora.core.importance.entries import Laplace
from hlora.core.steps import steps_of
from hlora.hf.peft import find_pairs
from hlora.hf.record import save_importance
from tests.conftest import lora_model, make_trainer, perturb, recorded, token_rows
from tests.test_penalty import tuned


@pytest.fixture
def si(tmp_path):
    return recorded(tmp_path, "entries")


def laplace(tmp_path, model, rows=None, **options):
    """A folder of the kind, of a model as it is."""
    pairs = find_pairs(model)
    rows = torch.randint(3, 60, (5, 9)) if rows is None else rows
    found, summary = Laplace.gather(model, pairs, rows, **options)
    notes = {"recording": {"storage": "fp32"}, "summary": summary}
    save_importance(tmp_path / "laplace", model, pairs, found, notes)
    return tmp_path / "laplace"


@pytest.mark.parametrize("architecture", ["llama", "gptj", "gpt2"])
def test_the_fisher_is_the_mean_squared_gradient_of_a_and_b(architecture):
    model = lora_model(architecture, dtype=torch.float64)
    perturb(model, size=0.5)
    model.eval()
    rows, pairs = torch.randint(3, 60, (5, 9)), find_pairs(model)
    found = Laplace.gather(model, pairs, rows, labels="corpus", batch_size=2)[0].tensors()
    expected = dict.fromkeys(found, 0)
    for row in rows:
        logits = model(input_ids=row[None]).logits[0, :-1]
        F.cross_entropy(logits, row[1:], reduction="sum").backward()
        for p in pairs:
            for part, f in (("B", p.B), ("A", p.A)):
                expected[f"{p.name}.{part}"] += f.grad.square() / len(rows)
        model.zero_grad()
    for name, F_i in found.items():
        assert F_i.max() > 0
        torch.testing.assert_close(F_i.double(), expected[name], rtol=1e-4, atol=1e-10)


def test_at_the_base_the_entries_of_a_are_free():
    model = lora_model()
    found = Laplace.gather(model, find_pairs(model), torch.randint(3, 60, (4, 9)))[0].tensors()
    assert all(bool(t.any()) == n.endswith(".B") for n, t in found.items())


class Path:
    """SI's ω by the textbook, beside the recorder."""

    def __init__(self, model, optimizer):
        self.trained = [f for p in find_pairs(model) for f in (p.B, p.A)]
        self.start = [f.detach().clone() for f in self.trained]
        self.omega = [torch.zeros_like(f) for f in self.trained]
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)

    def before(self, *_):
        self.held = [(f.grad.clone(), f.detach().clone()) for f in self.trained]

    def after(self, *_):
        for w, f, (g, was) in zip(self.omega, self.trained, self.held, strict=True):
            w -= g * (f.detach() - was)


def test_along_training_it_is_si_s(tmp_path):
    model = lora_model(dtype=torch.float64)
    perturb(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    recorder = hlora.Record(tmp_path / "nu", kind="entries", xi=1e-2)
    recorder.start(model, optimizer)
    path = Path(model, optimizer)
    for row in token_rows(6):
        ids = torch.tensor([row["input_ids"]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    recorder.finish(model)
    found = store.load(tmp_path / "nu").importance.tensors()
    names = [f"{p.name}.{part}" for p in find_pairs(model) for part in "BA"]
    for name, w, f, start in zip(names, path.omega, path.trained, path.start, strict=True):
        expected = w.clamp(min=0) / ((f.detach() - start) ** 2 + 1e-2)
        assert expected.max() > 0
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("rslora", [False, True])
def test_value_and_gradients_are_autograd_s_on_the_entries(rslora, tmp_path):
    torch.manual_seed(3)
    source = lora_model(use_rslora=rslora)
    perturb(source, 1)
    folder = laplace(tmp_path, source)
    model = lora_model(use_rslora=rslora, dtype=torch.float64)
    callback = hlora.Penalty(folder, phi=0.7, layer_weights="uniform")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    callback.start(model, optimizer)  # at the factors that it was gathered at
    assert float(callback.value()) == 0
    perturb(model, 2)
    pairs, stored = find_pairs(model), store.load(folder)
    Omega = {n: t.double() for n, t in stored.importance.tensors().items()}
    mean = sum(float(t.sum()) for t in Omega.values()) / sum(t.numel() for t in Omega.values())
    R = 0
    for p in pairs:
        for part, f, at in zip("BA", (p.B, p.A), stored.factors[p.name], strict=True):
            R = R + (Omega[f"{p.name}.{part}"] / mean * (f - at.double()) ** 2).sum()
    expected = torch.autograd.grad(0.7 * R, [f for p in pairs for f in (p.B, p.A)])
    assert float(callback.value()) == pytest.approx(float(R.detach()), rel=1e-5)
    steps_of(optimizer).regularize(optimizer)
    for ours, theirs in zip([f.grad for p in pairs for f in (p.B, p.A)], expected, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-10)


@pytest.mark.parametrize("make", ["si", "laplace"])
def test_strength_holds_the_entries_and_zero_is_plain_lora(make, tmp_path, si):
    folder = si if make == "si" else laplace(tmp_path, lora_model())

    def after(phi):
        model = tuned(folder, tmp_path / "mu", callback=hlora.Penalty(folder, phi=phi))[0]
        return {n: p.detach() for n, p in model.named_parameters() if "lora_B" in n}

    free, held = after(0.0), after(100.0)
    plain = lora_model()
    hlora.attach(make_trainer(plain, tmp_path / "x"), start := hlora.Penalty(folder, phi=0.0))
    start.start(plain, torch.optim.SGD([p for p in plain.parameters() if p.requires_grad], lr=0.1))
    begun = {n: p.detach().clone() for n, p in plain.named_parameters() if "lora_B" in n}
    start.finish()
    trainer = make_trainer(plain, tmp_path / "y", rows=token_rows(seed=2))
    trainer.train()
    for n, p in plain.named_parameters():
        if "lora_B" in n:
            assert torch.equal(p, free[n])

    def moved(of):
        return sum(float((of[n] - begun[n]).square().sum()) for n in begun)

    assert moved(held) < 0.2 * moved(free)


def test_another_rank_or_anchor_is_refused(si, tmp_path):
    with pytest.raises(hlora.InputError, match="anchor 'base'"):
        hlora.Penalty(si, anchor="base")
    model = lora_model(r=3)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(hlora.MismatchError, match="rank 2"):
        hlora.Penalty(si).start(model, optimizer)


@pytest.mark.parametrize("more", [{"estimator": "projected"}, {"preset": "official"}])
def test_settings_of_the_weights_that_they_make_are_refused(more, tmp_path):
    with pytest.raises(hlora.InputError, match="Entries importance"):
        hlora.Record(tmp_path / "nu", kind="entries", **more)
