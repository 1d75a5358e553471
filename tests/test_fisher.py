"""The lean Fisher against one backward pass a sequence on dense weights."""

import pytest
import torch

import hlora
from hlora.cli import main as cli
from hlora.core import ops, store
from hlora.core.importance import fisher_original
from hlora.core.importance.fisher import Fisher
from hlora.core.ops import reference as tiled
from hlora.hf.peft import find_pairs
from hlora.hf.record import save_importance
from tests.conftest import lora_model, make_trainer, perturb
from tests.reference import sequence_gradients
from tests.test_ops import error, rand
from tests.tiny import write_text


def gather(model, rows, **settings):
    return Fisher.gather(model, find_pairs(model), rows, **settings)[0]


@pytest.mark.parametrize("tile", [1 << 20, 8])
def test_squared_gradients_are_those_of_each_sequence(tile, monkeypatch):
    monkeypatch.setattr(tiled, "TILE", tile)
    delta, x, total = rand(3, 5, 7), rand(3, 5, 4), rand(7, 4)
    expected = total + sum((delta[b].mT @ x[b]) ** 2 for b in range(3))
    ops.add_squared_gradients(total, delta, x)
    assert error(total, expected) < 1e-12


@pytest.mark.parametrize("architecture", ["llama", "gptj", "gpt2"])
def test_it_is_the_mean_squared_gradient_of_the_base_weights(architecture):
    model = lora_model(architecture, dtype=torch.float64)
    perturb(model)
    model.eval()
    rows = torch.randint(3, 60, (5, 9))
    found = gather(model, rows, labels="corpus", batch_size=2)
    pairs = find_pairs(model)
    gradients = sequence_gradients(model, pairs, rows)
    expected = {name: g.square().mean(0) for name, g in gradients.items()}
    for name, F_i in found.tensors().items():
        torch.testing.assert_close(F_i.double(), expected[name], rtol=1e-4, atol=1e-10)
        assert F_i.max() > 0


@pytest.mark.parametrize("architecture", ["llama", "gptj", "gpt2"])
def test_the_original_finds_the_same_at_another_scale(architecture):
    model = lora_model(architecture)
    model.train()
    rows = torch.randint(3, 60, (5, 9))
    lean = gather(model, rows, labels="corpus").tensors()
    theirs, size = fisher_original.gather(model, find_pairs(model), rows)
    for name, F_i in theirs.items():
        # It squares gradients of the mean over tokens, ours are of the sum.
        torch.testing.assert_close(F_i * 8**2, lean[name], rtol=1e-4, atol=1e-10)
    base = [p for n, p in model.named_parameters() if "lora_" not in n]
    assert size == 4 * sum(p.numel() for p in base)
    assert model.training
    assert not any(p.requires_grad for p in base)
    assert all(p.grad is None for p in model.parameters())


def test_sampled_labels_depend_on_the_seed_alone():
    model, rows = lora_model(), torch.randint(3, 60, (4, 8))
    one, same, other = (gather(model, rows, seed=s).tensors() for s in (0, 0, 1))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert not all(torch.equal(one[n], other[n]) for n in one)


def test_gathering_leaves_the_model_as_it_was():
    model = lora_model(lora_dropout=0.3)
    model.train()
    before = [p.detach().clone() for p in model.parameters()]
    gather(model, torch.randint(3, 60, (4, 8)))
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
    assert not any(m._forward_hooks for m in model.modules())


def test_the_command_and_the_penalty_from_the_base(tiny, tmp_path, capsys):
    write_text(tmp_path / "a.txt")
    common = ["--model", str(tiny), "--text", str(tmp_path / "a.txt"), "--block-size", "32"]
    argv = ["record", *common, "--kind", "fisher", "--sequences", "6", "--batch-size", "4"]
    assert cli.main([*argv, "--output", str(tmp_path / "f")]) == 0
    assert "Fisher information of 6 sequences" in capsys.readouterr().out
    assert cli.main(["inspect", str(tmp_path / "f")]) == 0
    assert "kind        fisher" in capsys.readouterr().out
    stored = store.load(tmp_path / "f")
    assert all(not B.any() for B, _ in stored.factors.values())  # anchored at the base model
    assert cli.main(
        ["convert", str(tmp_path / "f"), "--to", "int8", "--output", str(tmp_path / "f8")]
    ) == 0  # fmt: skip
    assert store.load(tmp_path / "f8").info["kind"] == "fisher"
    factored = ["convert", str(tmp_path / "f"), "--to", "factored", "--output"]
    assert cli.main([*factored, str(tmp_path / "ff")]) == 0
    assert cli.main(["inspect", str(tmp_path / "ff")]) == 0
    assert "Fisher information of 6 sequences" in capsys.readouterr().out
    with pytest.raises(hlora.InputError, match="fisher"):
        hlora.Record(tmp_path / "new", previous=tmp_path / "f").check_folders()
    with pytest.raises(hlora.InputError, match="--kind fisher"):
        hlora.Record(tmp_path / "new", kind="fisher")


def test_the_original_is_a_command_and_says_what_the_whole_takes(tiny, tmp_path, capsys):
    write_text(tmp_path / "t.txt")
    argv = ["record", "--model", str(tiny), "--text", str(tmp_path / "t.txt"), "--output"]
    argv += [str(tmp_path / "f"), "--kind", "fisher", "--fisher-method", "original"]
    argv += ["--block-size", "32", "--sequences", "3"]
    assert cli.main([*argv, "--fisher-labels", "model"]) == 2
    assert "takes the corpus' labels" in capsys.readouterr().err
    assert cli.main(argv) == 0
    info = store.load(tmp_path / "f").info
    assert info["summary"]["sequences"] == 3
    assert info["summary"]["all_parameters_bytes"] > info["files"][store.TENSORS]["bytes"]


def test_tuning_is_held_at_the_base_by_it(tmp_path):
    model = lora_model()
    found = gather(model, torch.randint(3, 60, (8, 12)))
    notes = {"recording": {}, "previous": None, "summary": {}}
    save_importance(tmp_path / "f", model, find_pairs(model), found, notes)
    moved = []
    for phi in (0.0, 1000.0):
        model = lora_model()
        make_trainer(
            model, tmp_path / f"mu-{phi}", [hlora.Penalty(tmp_path / "f", phi=phi)], max_steps=20
        ).train()
        moved.append(sum(float((p.s * p.B @ p.A).detach().norm()) for p in find_pairs(model)))
    assert moved[1] < 0.5 * moved[0]
