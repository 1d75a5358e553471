"""Scaling a finished adapter back to a budget of forgetting."""

import json
import math

import pytest
import torch
from peft import PeftModel

import hlora
from hlora.cli import main as cli
from hlora.core.rewind import costs, scales
from hlora.hf.peft import find_pairs, save_adapter, scale_from
from hlora.run import rewind as rewinding
from hlora.run.evaluate import Forgetting, divergence
from hlora.run.models import load, load_adapter
from hlora.run.rewind import OWN, rewind, within_budget
from hlora.run.settings import RewindSettings
from tests.conftest import base_model, lora_model, perturb, token_rows
from tests.tiny import write_text


def positive(size, seed):
    root = torch.randn(size, size + 2, generator=torch.Generator().manual_seed(seed)).double()
    return root @ root.T


@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_the_scales_meet_the_budget_and_cost_least(share):
    Q, K = positive(6, 0), positive(6, 1).diagonal().diag()
    ones = torch.ones(6, dtype=torch.float64)
    alpha = scales(Q, K, share)
    wanted = share**2 * ones @ Q @ ones
    torch.testing.assert_close(alpha @ Q @ alpha, wanted, rtol=1e-6, atol=0)
    assert ((alpha >= 0) & (alpha <= 1)).all()
    cost = (1 - alpha) @ K @ (1 - alpha)
    assert cost < (1 - share) ** 2 * ones @ K @ ones  # than scaling all alike
    generator = torch.Generator().manual_seed(2)
    for _ in range(200):  # and than any other that meets it
        other = (alpha + 0.1 * torch.randn(6, generator=generator)).clamp(0, 1)
        other = other * (wanted / (other @ Q @ other)).sqrt()
        if (other <= 1).all():
            assert (1 - other) @ K @ (1 - other) >= cost * (1 - 1e-6)


def test_at_the_ends_all_or_nothing_is_kept():
    Q, K = positive(4, 0), torch.eye(4)
    assert torch.equal(scales(Q, K, 1.0), torch.ones(4).double())
    assert torch.equal(scales(Q, K, 0.0), torch.zeros(4).double())


def test_what_the_domain_s_rows_do_not_need_is_taken_back_first():
    gradients = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    alpha = scales(torch.eye(2).double(), costs(torch.ones(2), gradients), 0.7)
    assert alpha[0] > 2 * alpha[1]


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """A plain adapter of the tiny LLaMA that forgot, its task, text, and importance of the base."""
    folder = tmp_path_factory.mktemp("made")
    task, text = folder / "task.jsonl", write_text(folder / "a.txt")
    task.write_text('{"prompt": "the cat", "completion": " sat on a mat"}\n' * 16)
    common = ["--model", str(tiny), "--device", "cpu", "--batch-size", "4"]
    argv = ["tune", *common, "--task", str(task), "--max-steps", "30", "--learning-rate", "0.02"]
    assert cli.main([*argv, "--save-steps", "0", "--output", str(folder / "lora")]) == 0
    argv = ["record", *common, "--kind", "blend", "--sequences", "16", "--block-size", "16"]
    assert cli.main([*argv, "--text", str(text), "--output", str(folder / "base")]) == 0
    return folder


def settings(tiny, made, output, **more):
    given = {
        "model": str(tiny), "adapter": str(made / "lora"), "output": str(output), "device": "cpu",
        "text": [str(made / "a.txt")], "task": str(made / "task.jsonl"), "block_size": 16, **more,
    }  # fmt: skip
    return RewindSettings(**given)


def measured(tiny, folder, made):
    from hlora.data.source import Source
    from hlora.data.text import blocks

    model, tokenizer = load(str(tiny))
    rows = blocks(Source.parse(str(made / "a.txt")), tokenizer, 16, 24)
    return divergence(load_adapter(model, folder), rows).nats


def test_what_is_written_keeps_the_budget(tiny, made, tmp_path):
    before = measured(tiny, made / "lora", made)
    done = rewind(settings(tiny, made, tmp_path / "out", forget_at_most=before / 3))
    after = measured(tiny, tmp_path / "out", made)
    assert after == pytest.approx(done.chosen.measured.nats, rel=1e-4)
    assert 0.9 * before / 3 < after <= before / 3
    assert all(p.predicted is None for p in done.points)
    noted = json.loads((tmp_path / "out" / "rewind.json").read_text())
    assert noted["chosen"]["share"] == done.chosen.share


def test_with_importance_each_matrix_has_its_scale(tiny, made, tmp_path):
    before = measured(tiny, made / "lora", made)
    done = rewind(
        settings(
            tiny, made, tmp_path / "out", forget_at_most=before / 3, importance=str(made / "base")
        )
    )
    own = [p for p in done.points if p.way == OWN]
    assert any(len({round(a, 6) for a in p.scales.values()}) > 1 for p in own)
    assert all(p.predicted is not None for p in done.points)
    assert measured(tiny, tmp_path / "out", made) <= before / 3
    within = [p for p in done.points if p.measured.nats <= before / 3]
    assert done.chosen.nll == min(p.nll for p in within)


def test_an_adapter_within_the_budget_stays_as_it_is(tiny, made, tmp_path):
    from safetensors.torch import load_file

    done = rewind(settings(tiny, made, tmp_path / "out", forget_at_most=1e3))
    assert done.chosen.share == 1
    files = [f / "adapter_model.safetensors" for f in (made / "lora", tmp_path / "out")]
    a, b = (load_file(f) for f in files)
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_the_command_prints_the_curve_and_marks_the_choice(tiny, made, tmp_path, capsys):
    argv = ["rewind", "--model", str(tiny), "--adapter", str(made / "lora"), "--device", "cpu"]
    argv += ["--text", str(made / "a.txt"), "--task", str(made / "task.jsonl"), "--block-size"]
    argv += ["16", "--forget-at-most", "0.001", "--output", str(tmp_path / "out")]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "Taken" in out
    assert str(tmp_path / "out") in out


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"adapter": "nowhere"}, "nowhere"),
        ({"text": ["nowhere.txt"]}, "nowhere.txt"),
        ({"importance": "nowhere"}, "nowhere"),
        ({"forget_at_most": 0.0}, "forget_at_most"),
    ],
)
def test_what_cannot_be_used_is_named(tiny, made, tmp_path, wrong, named):
    with pytest.raises(hlora.HloraError, match=named):
        rewind(settings(tiny, made, tmp_path / "out", **wrong))
    assert not (tmp_path / "out" / "rewind.json").exists()


def test_the_adapter_itself_is_not_overwritten(tiny, made):
    with pytest.raises(hlora.InputError, match="own folder"):
        rewind(settings(tiny, made, made / "lora"))


@pytest.mark.parametrize("ranks", [(2, 2), (3, 2)])
def test_a_change_from_another_adapter_is_scaled_as_products(ranks, tmp_path):
    """θ_start + φ (θ − θ_start), not of the factors, also where ranks and scalings differ."""
    folders, changes = [tmp_path / "a", tmp_path / "b"], []
    for seed, (r, folder) in enumerate(zip(ranks, folders, strict=True)):
        model = lora_model(r=r, use_rslora=bool(seed))
        perturb(model, seed, size=0.5)
        changes.append({p.name: p.s * (p.B @ p.A).detach() for p in find_pairs(model)})
        save_adapter(model, folder)
    expected = base_model()
    modules = dict(expected.named_modules())
    for name in changes[0]:
        modules[name].weight.data += 0.7 * changes[0][name] + 0.3 * changes[1][name]
    here = PeftModel.from_pretrained(base_model(), str(folders[0]))
    scale_from(here, folders[1], 0.7)
    ids = torch.tensor([r["input_ids"] for r in token_rows(4)])
    with torch.no_grad():
        torch.testing.assert_close(here(input_ids=ids).logits, expected(input_ids=ids).logits)
        with here.disable_adapter():  # the base model is still there to compare with
            before = here(input_ids=ids).logits
        torch.testing.assert_close(before, base_model()(input_ids=ids).logits)


TEXT = torch.tensor([r["input_ids"] for r in token_rows(6, seed=8)])


@pytest.mark.parametrize(("bad", "part"), [([0.5], 50), ([0.5, 0.25], 50), ([0.5, 0.375], 3)])
def test_a_point_that_is_not_finite_is_above_the_budget(bad, part, monkeypatch):
    """As in half precision, where one point of the way overflows and the next does not."""
    model = lora_model()
    perturb(model, size=0.3)
    budget, asked = divergence(model, TEXT).nats / part, []
    measure = rewinding._Walk.measure

    def sometimes(walk, way, share):
        point = measure(walk, way, share)
        asked.append(share)
        if share in bad:
            object.__setattr__(point, "measured", Forgetting(math.nan, math.nan))
        return point

    monkeypatch.setattr(rewinding._Walk, "measure", sometimes)
    _, kept = within_budget(model, TEXT, budget, 4)
    assert set(bad) <= set(asked)
    assert 0.9 * budget < kept.measured.nats <= budget
    assert divergence(model, TEXT).nats == pytest.approx(kept.measured.nats, rel=1e-4)


@pytest.mark.parametrize("nats", [math.nan, math.inf, 1.0])
def test_what_cannot_be_scaled_back_is_kept_as_it_was_trained(nats, monkeypatch, caplog):
    """An error would throw a training away."""
    model = lora_model()
    perturb(model)
    before = [p.detach().clone() for p in model.parameters()]
    monkeypatch.setattr(rewinding, "divergence", lambda *_, **__: Forgetting(nats, 0.1))
    whole, kept = within_budget(model, TEXT, 0.01, 4)
    assert kept is whole
    assert all(map(torch.equal, before, model.parameters()))
    assert len(caplog.records) == 1
    assert "kept as it was trained" in caplog.text
    assert ("too small" in caplog.text) == math.isfinite(nats)
