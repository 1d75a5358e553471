"""Losses, gradients and weights that are not finite."""

import json
import math
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

import hlora
from hlora.cli import main as cli
from hlora.core import store
from hlora.core.steps import steps_of
from hlora.hf.badsteps import BadSteps
from hlora.hf.peft import find_pairs
from hlora.run.models import load
from tests.conftest import lora_model, make_trainer, perturb
from tests.tiny import questions, write_rows, write_text


def spoilt(trainer, steps, what="gradient"):
    """Step numbers, from 0, get a loss or one gradient that is not finite."""
    inner = trainer.compute_loss

    def compute_loss(model, inputs, return_outputs=False, **kwargs):
        got = inner(model, inputs, return_outputs=return_outputs, **kwargs)
        if trainer.state.global_step not in steps:
            return got
        loss, outputs = got if return_outputs else (got, None)
        if what == "loss":
            loss = loss * 0 + math.inf  # its gradient is 0
        else:
            B = find_pairs(trainer.model)[0].B
            loss = loss + (B * math.nan).sum().nan_to_num() + (B * math.inf).sum() * 0
        return (loss, outputs) if return_outputs else loss

    trainer.compute_loss = compute_loss
    return trainer


def attached(trainer, *parts):
    hlora.attach(trainer, *parts)
    return trainer


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_a_bad_step_moves_nothing_and_is_counted(tmp_path, what, kind):
    model = lora_model()
    record = hlora.Record(tmp_path / "nu", kind=kind)
    trainer = spoilt(make_trainer(model, tmp_path / "run", logging_steps=1), {1, 2}, what)
    attached(trainer, record)
    before, moved = {}, []

    def look(optimizer, *_):
        before["B"] = [p.B.detach().clone() for p in find_pairs(model)]

    def compare(optimizer, *_):
        now = [p.B for p in find_pairs(model)]
        moved.append(not all(map(torch.equal, before["B"], now)))

    trainer.create_optimizer()
    steps_of(trainer.optimizer)
    trainer.optimizer.register_step_pre_hook(look)
    trainer.optimizer.register_step_post_hook(compare)
    trainer.train()
    assert moved == [True, False, False, True, True, True]
    assert record.summary["steps"] == 4
    log = [e for e in trainer.state.log_history if "loss" in e]
    assert [e.get("bad_steps", 0) for e in log] == [0, 1, 1, 0, 0, 0]
    if what == "loss":
        assert [math.isfinite(e["loss"]) for e in log] == [True, False, False, True, True, True]
    values = load_file(tmp_path / "nu" / store.TENSORS).values()
    assert all(v.isfinite().all() for v in values)


def test_the_logged_loss_is_the_mean_of_the_good_ones(tmp_path):
    def logged(bad, every):
        trainer = make_trainer(lora_model(), tmp_path, logging_steps=every, learning_rate=0.0)
        attached(spoilt(trainer, bad, "loss"))
        trainer.train()
        return [e["loss"] for e in trainer.state.log_history if "loss" in e]

    one = logged((), 1)
    assert logged({0}, 2)[0] == pytest.approx(one[1], rel=1e-3)
    assert logged({2}, 3)[0] == pytest.approx((one[0] + one[1]) / 2, rel=1e-3)


def test_the_penalty_skips_a_bad_step(tmp_path, kept):
    trainer = spoilt(make_trainer(lora_model(), tmp_path / "run"), {2})
    penalty = hlora.Penalty(kept, phi=1.0)
    attached(trainer, penalty)
    trainer.train()
    assert all(p.B.isfinite().all() for p in find_pairs(trainer.model))
    assert all(math.isfinite(e["R"]) for e in trainer.state.log_history if "R" in e)


@pytest.mark.parametrize("limit", [1, 3])
def test_too_many_in_a_row_stop_with_the_last_good_state(tmp_path, limit):
    model, good = lora_model(), {}
    trainer = make_trainer(model, tmp_path / "run", max_steps=20)
    spoilt(trainer, range(5, 20))
    attached(trainer, hlora.Record(tmp_path / "nu"), BadSteps(limit))
    trainer.create_optimizer()

    def look(*_):
        if trainer.state.global_step == 4:  # the last weights whose loss was seen to be finite
            good["B"] = [p.B.detach().clone() for p in find_pairs(model)]

    trainer.optimizer.register_step_pre_hook(look)
    with pytest.raises(hlora.DivergedError, match=r"learning rate of 0\.01"):
        trainer.train()
    assert trainer.state.global_step == 5 + limit
    assert not (tmp_path / "nu" / store.MARKER).exists()
    saved = load_file(tmp_path / "run" / f"checkpoint-{5 + limit}" / "adapter_model.safetensors")
    for pair, B in zip(find_pairs(model), good["B"], strict=True):
        assert torch.equal(saved[f"base_model.model.{pair.name}.lora_B.weight"], B)


def test_the_recording_of_a_step_that_led_nowhere_is_dropped(tmp_path):
    trainer = spoilt(make_trainer(lora_model(), tmp_path / "run", max_steps=20), range(5, 20))
    record = hlora.Record(tmp_path / "nu")
    attached(trainer, record, BadSteps(2))
    with pytest.raises(hlora.DivergedError):
        trainer.train()
    resumed = make_trainer(lora_model(), tmp_path / "run", max_steps=9)
    again = hlora.Record(tmp_path / "nu", quiet=True)
    attached(resumed, again)
    resumed.train(resume_from_checkpoint=True)
    assert again.summary["steps"] == 4 + 2  # 4 good ones before, and 7 to 9 after


def test_a_run_that_ends_among_bad_steps_is_no_result(tmp_path):
    model = lora_model()
    trainer = make_trainer(model, tmp_path / "run", learning_rate=1e38, max_steps=5)
    attached(trainer, hlora.Record(tmp_path / "nu"))
    with pytest.raises(hlora.DivergedError, match="learning rate"):
        trainer.train()
    assert not (tmp_path / "nu" / store.MARKER).exists()
    assert all(p.B.isfinite().all() for p in find_pairs(model))


def test_a_last_step_that_leaves_no_finite_weights_is_seen(tmp_path, nu):
    """No loss is taken after it."""
    model = lora_model()
    trainer = make_trainer(model, tmp_path / "run", max_steps=1)
    attached(trainer, hlora.Penalty(nu, phi=1e308), hlora.Record(tmp_path / "new"))
    perturb(model)
    with pytest.raises(hlora.DivergedError, match="or of phi"):
        trainer.train()
    assert all(p.B.isfinite().all() for p in find_pairs(model))
    assert not (tmp_path / "new" / store.MARKER).exists()


def test_a_base_model_that_is_not_finite_is_named(tmp_path):
    model = lora_model()
    with torch.no_grad():
        model.get_submodule("base_model.model.model.layers.1.mlp.up_proj").weight[0, 0] = math.nan
    trainer = make_trainer(model, tmp_path / "run")
    attached(trainer, BadSteps(3))
    with pytest.raises(hlora.DivergedError, match=r"base model's .*layers\.1\.mlp\.up_proj"):
        trainer.train()


def test_nothing_that_is_not_finite_is_written_or_read(tmp_path, nu):
    from hlora.hf.peft import save_adapter
    from hlora.run.models import load_adapter
    from tests.conftest import base_model

    model = lora_model()
    with torch.no_grad():
        find_pairs(model)[1].A[0, 0] = math.inf
    (tmp_path / "out").mkdir()
    with pytest.raises(hlora.DivergedError, match="lora_A"):
        save_adapter(model, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
    path = nu / "adapter_model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    info = json.loads((nu / store.MARKER).read_text())
    from hlora.files import checksum

    info["files"][path.name] = checksum(path)
    (nu / store.MARKER).write_text(json.dumps(info))
    with pytest.raises(hlora.StoreError, match="not finite"):
        store.load(nu)
    with pytest.raises(hlora.StoreError, match="not finite"):
        load_adapter(base_model(), nu)


def test_what_is_restored_are_the_weights_that_the_last_step_trained():
    """As many of them as in the step before, and others."""
    weights = [torch.nn.Parameter(torch.tensor([float(i)])) for i in range(3)]
    optimizer = torch.optim.SGD(weights, lr=1.0)
    steps = steps_of(optimizer)
    steps.restores = True
    for trained in ((0, 1), (1, 2)):
        for i, w in enumerate(weights):
            w.grad = torch.ones(1) if i in trained else None
        optimizer.step()
    assert [w.item() for w in weights] == [-1.0, -1.0, 1.0]
    assert steps.restore()
    assert [w.item() for w in weights] == [-1.0, 0.0, 2.0]


@pytest.fixture
def broken(tiny, tmp_path):
    """The tiny model with a weight that is not finite, and an adapter for it."""
    folder = shutil.copytree(tiny, tmp_path / "broken")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    adapter = PeftModel(load(str(tiny))[0], LoraConfig(target_modules=["q_proj"]))
    adapter.save_pretrained(tmp_path / "adapter")
    write_text(tmp_path / "a.txt")
    return folder


@pytest.mark.parametrize(
    "command",
    [
        "record --text a.txt --block-size 32 --sequences 8",
        "record --kind sketch --sequences 4",
        "record --kind fisher --text a.txt --block-size 32 --fisher-labels corpus",
        "record --kind fisher --text a.txt --block-size 32 --fisher-method original --sequences 4",
        "merge --adapter adapter",
        "rewind --adapter adapter --text a.txt --block-size 32",
    ],
)
@pytest.mark.filterwarnings("default")
def test_a_broken_base_model_is_named_by_whatever_reads_it(
    broken, tmp_path, monkeypatch, capsys, command
):
    monkeypatch.chdir(tmp_path)
    name, *words = command.split()
    code = cli.main([name, "--model", str(broken), "--output", "out", *words])
    said = capsys.readouterr().err
    assert code in (1, 2)
    assert "not finite" in said
    if "original" not in command:
        assert "layers.1.mlp.up_proj.weight" in said
    assert not list((tmp_path / "out").glob("*.*"))


def no_constant(name):
    raise AssertionError(f"{name} is no JSON")


def test_an_adapter_without_finite_predictions_is_kept_with_its_budget(tiny, tmp_path, capfd):
    """Its weights are finite, so that no step is bad; half precision overflows on general text."""
    task = write_rows(tmp_path / "q.jsonl", questions())
    text = write_text(tmp_path / "a.txt", count=3000)
    common = ["--model", str(tiny), "--device", "cpu", "--output"]
    record = ["record", *common, str(tmp_path / "base"), "--kind", "blend", "--sequences", "16"]
    assert cli.main([*record, "--block-size", "24"]) == 0
    tune = ["tune", *common, str(tmp_path / "mu"), "--importance", str(tmp_path / "base")]
    tune += ["--task", str(task), "--text", str(text), "--forget-at-most", "0.01"]
    tune += ["--dtype", "fp16", "--learning-rate", "30", "--max-steps", "3"]
    for more in ([], ["--resume"]):
        capfd.readouterr()
        assert cli.main([*tune, *more]) == 0
        said = capfd.readouterr()
        assert ("kept as it was trained" in said.err) != bool(more)
        assert "no finite number measured" in said.out
    noted = json.loads((tmp_path / "mu" / "tune.json").read_text(), parse_constant=no_constant)
    assert noted["forgetting"]["measured"] is None
    assert (tmp_path / "mu" / "adapter_model.safetensors").exists()
    assert "are not finite" in (tmp_path / "mu" / "README.md").read_text()


def copied(steps):
    """Elements of the tensors that the steps keep, beside the parameters."""
    lists = [v for v in vars(steps).values() if isinstance(v, list)]
    of = [t for found in lists for t in found if isinstance(t, torch.Tensor)]
    return sum(t.numel() for t in of if not isinstance(t, torch.nn.Parameter))


def test_one_copy_of_the_weights_is_kept_while_training_and_none_after(tmp_path, nu):
    """An embedding that is trained beside the matrices may take gigabytes."""
    trainer = make_trainer(lora_model(modules_to_save=["lm_head"]), tmp_path)
    attached(trainer, penalty := hlora.Penalty(nu, unheld="warn"))
    trained, found = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad), []
    trainer.create_optimizer()
    steps = steps_of(trainer.optimizer)
    trainer.optimizer.register_step_post_hook(lambda *_: found.append(copied(steps)))
    trainer.train()
    assert found == [trained] * 6
    assert copied(steps) == 0
    # In a loop of one's own nobody goes back, and nothing is left once a weight has moved.
    optimizer = torch.optim.SGD([p for p in trainer.model.parameters() if p.requires_grad], lr=0.1)
    penalty.start(trainer.model, optimizer)
    kept = []
    for _ in range(3):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        kept.append(copied(steps_of(optimizer)))
    assert kept == [trained, 0, 0]
    assert steps_of(optimizer).moved()


@pytest.mark.parametrize(
    ("rates", "moved"), [((1, 0, 0), True), ((0, 1, 0), True), ((0, 0, 1), True), ((0, 0), False)]
)
@pytest.mark.parametrize("restores", [True, False])
def test_a_weight_that_any_step_moved_has_moved(rates, moved, restores):
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    steps = steps_of(optimizer)
    steps.observers.append(lambda _: None)
    steps.restores = restores
    for rate in rates:
        optimizer.param_groups[0]["lr"], weight.grad = float(rate), torch.ones(2)
        optimizer.step()
    assert steps.moved() == moved
