"""What looks at text while tuning: KL to the base model, and replay."""

import pytest
import torch
from torch.nn.functional import kl_div
from transformers import TrainerCallback

import hlora
from hlora.cli import main as cli
from hlora.core.pairs import group
from hlora.errors import MismatchError
from hlora.hf.divergence import Divergence, OnPrompts
from hlora.hf.gauge import Gauge
from hlora.hf.peft import find_pairs
from hlora.hf.slow import ToSlow
from hlora.run import phases
from hlora.run.evaluate import divergence
from hlora.run.phases import DomainPhase
from hlora.run.settings import TuneSettings
from tests.conftest import lora_model, make_trainer, perturb, token_rows
from tests.tiny import write_text

ROWS = torch.tensor([r["input_ids"] for r in token_rows(12, seed=5)])


class Outputs:
    logits = torch.zeros(1)


def test_its_value_and_gradient_are_those_of_the_divergence():
    model = lora_model(dtype=torch.float64)
    perturb(model)
    R = Divergence(ROWS, batch=4, every=1).on_forward(model, {}, Outputs)
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=ROWS[:4]).logits.log_softmax(-1)
    here = model(input_ids=ROWS[:4]).logits.log_softmax(-1)
    expected = kl_div(
        here.flatten(0, 1), base.flatten(0, 1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(R.double(), expected, rtol=1e-4, atol=1e-8)
    trained = [p for p in model.parameters() if p.requires_grad]
    both = (torch.autograd.grad(v, trained) for v in (R, expected))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)
    assert R > 0


def test_it_looks_at_every_so_many_micro_batches_at_other_rows():
    model = lora_model()
    perturb(model)
    part = Divergence(ROWS, batch=5, every=3)
    found = [part.on_forward(model, {}, Outputs) for _ in range(9)]
    assert [f is None for f in found] == [True, True, False] * 3
    other = Divergence(ROWS[[10, 11, 0, 1, 2]], batch=5, every=3)
    third = [other.on_forward(model, {}, Outputs) for _ in range(3)][2]
    torch.testing.assert_close(third, found[8])
    assert (found[2] - found[5]).abs() > 1e-6


@pytest.mark.parametrize(("weight", "less"), [(0.0, False), (30.0, True)])
def test_it_keeps_the_predictions_on_general_text(weight, less, tmp_path):
    plain = make_trainer(lora_model(), tmp_path / "a", max_steps=20)
    plain.train()
    held = make_trainer(lora_model(), tmp_path / "b", max_steps=20)
    hlora.attach(held, Divergence(ROWS, weight, batch=12, every=1))
    held.train()
    a, b = (divergence(t.model, ROWS).nats for t in (plain, held))
    assert (b < 0.5 * a) if less else b == pytest.approx(a, rel=1e-6)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4


def straight_and_resumed(folder, regularizer):
    """The models of a run of eight steps, and of one that was stopped after four and resumed."""

    def run(name, callbacks=(), **settings):
        trainer = make_trainer(lora_model(), folder / name, callbacks, max_steps=8, **settings)
        hlora.attach(trainer, regularizer())
        return trainer

    straight = run("a")
    straight.train()
    saving = {"save_strategy": "steps", "save_steps": 4}
    run("b", [Stop()], **saving).train()
    resumed = run("b", **saving)
    resumed.train(resume_from_checkpoint=str(folder / "b" / "checkpoint-4"))
    return straight.model, resumed.model


def test_a_resumed_run_reads_on_where_it_was(tmp_path):
    both = straight_and_resumed(tmp_path, lambda: Divergence(ROWS, 10.0, batch=5, every=2))
    for a, b in zip(*(model.parameters() for model in both), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": ROWS[:0]}, {"rows": ROWS.float()}, {"rows": ROWS[0]}, {"rows": [[1, 2]]},
        {"rows": -ROWS}, {"batch": 0}, {"batch": 1.5}, {"every": 0}, {"every": 2.5},
        {"phi": "1.0"}, {"phi": True}, {"phi": -1.0}, {"phi": float("nan")},
    ],
)  # fmt: skip
def test_nothing_to_look_at_is_refused(wrong):
    with pytest.raises(hlora.InputError, match="Divergence"):
        Divergence(**{"rows": ROWS, **wrong})


@pytest.mark.parametrize(
    ("rows", "says"), [(ROWS + 10_000, "tokenizer"), (ROWS.repeat(1, 200), "shorter")]
)
def test_text_that_the_model_cannot_read_is_refused_before_training(rows, says, tmp_path):
    trainer = make_trainer(lora_model(), tmp_path)
    with pytest.raises(MismatchError, match=says):
        hlora.attach(trainer, Divergence(rows))


def settings(tiny, tmp_path, **more):
    task, text = tmp_path / "task.jsonl", write_text(tmp_path / "a.txt")
    task.write_text('{"prompt": "the cat", "completion": " sat on a mat"}\n' * 12)
    given = {"model": str(tiny), "task": str(task), "device": "cpu", "output": str(tmp_path / "o")}
    return TuneSettings(**given, **{k: [str(text)] if v is None else v for k, v in more.items()})


def test_replay_mixes_its_share_into_the_rows(tiny, tmp_path):
    phase = DomainPhase(settings(tiny, tmp_path, replay=None, replay_share=0.25))
    general = [r for r in phase.rows.rows if len(r["input_ids"]) == 128]
    assert (len(general), len(phase.rows)) == (4, 16)
    assert all((r["labels"] >= 0).all() for r in general)


@pytest.mark.parametrize("other", [[], None])
def test_the_model_s_own_text_is_written_before_training(other, tiny, tmp_path, monkeypatch):
    """In the place of zeros, beside text that is read, for KL and for replay alike."""
    text = [] if other is not None else [str(write_text(tmp_path / "b.txt"))]
    phase = DomainPhase(
        settings(
            tiny,
            tmp_path,
            kl=["own", *text],
            replay=["own"],
            replay_share=0.25,
            max_steps=1,
            batch_size=2,
        )
    )
    kl = phase.parts[0].rows
    own = (kl == 0).all(1)
    assert own.sum() == phases.OWN_BLOCKS
    assert (~own).any() == bool(text)
    replayed = [r for r in phase.rows.rows if len(r["input_ids"]) == kl.shape[1]]
    assert len(replayed) == 4
    assert not any(r["input_ids"].any() for r in replayed)
    read = kl[~own].clone()
    phase.run()
    assert kl[own].bool().any(1).all()
    assert all(r["labels"].any() for r in replayed)
    torch.testing.assert_close(kl[~own], read)


def test_both_go_through_the_command(tiny, tmp_path, capsys):
    task, text = tmp_path / "task.jsonl", write_text(tmp_path / "a.txt")
    task.write_text('{"prompt": "the cat", "completion": " sat on a mat"}\n' * 12)
    argv = [
        "tune",
        "--model",
        str(tiny),
        "--task",
        str(task),
        "--device",
        "cpu",
        "--max-steps",
        "4",
    ]
    argv += ["--batch-size", "2", "--logging-steps", "1", "--kl", str(text), "--kl-every", "2"]
    assert cli.main([*argv, "--replay", str(text), "--output", str(tmp_path / "o")]) == 0
    assert "R " in capsys.readouterr().out
    argv += ["--replay", str(text), "--replay-share", "1.5", "--output", str(tmp_path / "p")]
    assert cli.main(argv) == 2
    assert "--replay-share" in capsys.readouterr().err


def prompted(count=8, seed=3):
    """Rows whose first tokens are a prompt, of several lengths, padded on the right."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 60, (count, 10), generator=draw)
    labels, mask = ids.clone(), torch.ones_like(ids)
    for i in range(count):
        labels[i, : 2 + i % 5] = -100
        labels[i, 10 - i % 3 :], mask[i, 10 - i % 3 :] = -100, 0
    return [
        {"input_ids": i.tolist(), "labels": lab.tolist(), "attention_mask": m.tolist()}
        for i, lab, m in zip(ids, labels, mask, strict=True)
    ]


def test_on_prompts_it_is_the_divergence_where_nothing_is_learned():
    model = lora_model(dtype=torch.float64)
    perturb(model, size=0.5)
    inputs = {k: torch.tensor([r[k] for r in prompted()]) for k in prompted()[0]}
    outputs = model(**inputs)
    R = OnPrompts().on_forward(model, inputs, outputs)
    with torch.no_grad(), model.disable_adapter():
        base = model(**inputs).logits.log_softmax(-1)
    here, rows = outputs.logits.log_softmax(-1), []
    for i in range(len(base)):  # the prompt has 2 + i % 5 tokens; the first is predicted by nothing
        at = slice(0, 1 + i % 5)
        rows.append(kl_div(here[i, at], base[i, at], reduction="batchmean", log_target=True))
    expected = torch.stack(rows).mean()
    assert expected > 1e-4
    torch.testing.assert_close(R.double(), expected, rtol=1e-4, atol=1e-8)
    trained = [p for p in model.parameters() if p.requires_grad]
    both = (torch.autograd.grad(v, trained, retain_graph=True) for v in (R, expected))
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)
    inputs["labels"] = inputs["input_ids"]  # without a prompt there is nothing to hold
    assert OnPrompts().on_forward(model, inputs, outputs) == 0


@pytest.mark.parametrize("every", [1, 2])
def test_on_prompts_micro_batches_add_up_to_the_batch(every, tmp_path):
    """Only the task's loss differs, which counts tokens: its part is taken out."""
    found = []
    for size, steps in ((8, 1), (2, 4)):
        grads = []
        for phi in (0.0, 50.0):
            torch.manual_seed(0)
            model = lora_model()
            perturb(model, size=0.5)
            trainer = make_trainer(
                model, tmp_path / "t", rows=prompted(), max_steps=1, learning_rate=1.0,
                per_device_train_batch_size=size, gradient_accumulation_steps=steps,
                optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant",
            )  # fmt: skip
            before = [p.detach().clone() for p in model.parameters()]
            hlora.attach(trainer, OnPrompts(phi, every))
            trainer.train()
            grads.append([b - p.detach() for b, p in zip(before, model.parameters(), strict=True)])
        found.append([held - free for free, held in zip(*grads, strict=True)])
    if every == 1:
        assert max(float(g.abs().max()) for g in found[0]) > 1e-2
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    else:  # one batch is not looked at; of four, two count twice
        assert all(float(g.abs().max()) < 1e-6 for g in found[0])
        assert max(float(g.abs().max()) for g in found[1]) > 1e-2


def test_on_prompts_rows_without_a_prompt_are_told(tmp_path, caplog):
    for rows, told in ((prompted(), False), (token_rows(), True)):
        trainer = make_trainer(lora_model(), tmp_path, rows=rows, max_steps=2)
        hlora.attach(trainer, OnPrompts())
        trainer.train()
        assert ("no row had a prompt" in caplog.text) == told


def test_on_prompts_label_smoothing_is_refused(tiny, tmp_path):
    phase = DomainPhase(
        settings(
            tiny, tmp_path, kl=["task"], kl_every=1, max_steps=1,
            training={"label_smoothing_factor": 0.1},
        )
    )  # fmt: skip
    with pytest.raises(hlora.InputError, match="label smoothing"):
        phase.run()


def test_on_prompts_the_command_needs_no_text(tiny, tmp_path):
    phase = DomainPhase(
        settings(tiny, tmp_path, kl=["task"], kl_weight=2.0, kl_every=1, max_steps=3,
                 learning_rate=0.02, logging_steps=3)
    )  # fmt: skip
    (part,) = phase.parts
    assert isinstance(part, OnPrompts)
    assert (part.phi, part.every, phase.unwritten) == (2.0, 1, [])
    (entry,) = phase.run().log
    assert entry["penalty"] == pytest.approx(2 * entry["R"])
    assert entry["R"] > 0


def checkpointed(model, reentrant):
    """As a Trainer does it."""
    inner = model.get_base_model()
    enable = getattr(inner, "activation_checkpointing_enable", inner.gradient_checkpointing_enable)
    enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("make", [Divergence, ToSlow])
def test_dropout_is_no_divergence(make, reentrant):
    """At the base model there is none, and nothing pulls."""
    model = lora_model("gpt2", lora_dropout=0.5).train()
    model.get_base_model().transformer.h[0].attn.eval()
    if reentrant is not None:
        checkpointed(model, reentrant)
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    R = make(ROWS, every=1).on_forward(model, {}, Outputs)
    assert R == 0
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    R.backward()
    assert [m.training for m in model.modules()] == modes
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert any(g is not None for g in grads)
    assert all(g is None or g.abs().max() < 1e-7 for g in grads)
    assert Gauge(model, ROWS)() == 0
    pulled = Gauge(model, ROWS).pull(torch.arange(2), group(find_pairs(model)))
    assert all(t.abs().max() < 1e-7 for both in pulled for t in both)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_look_is_checkpointed_and_computes_again_what_it_computed(architecture, reentrant):
    """In the backward pass the model is in training mode again, where dropout would act."""
    found = []
    for checkpoints in (False, True):
        model = lora_model(architecture, lora_dropout=0.5).train()
        perturb(model)
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        if checkpoints:
            checkpointed(model, reentrant)
        calls = []
        find_pairs(model)[0].layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        R = Divergence(ROWS, every=1).on_forward(model, {}, Outputs)
        R.backward()
        assert len(calls) == (3 if checkpoints else 2)  # the base, the model, and again
        grads = [p.grad for p in model.parameters() if p.requires_grad]
        found.append([R, *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)
    assert found[0][0] > 1e-6


def test_on_prompts_the_base_model_drops_nothing():
    model = lora_model("gpt2").train()
    perturb(model, size=0.5)
    inputs = {k: torch.tensor([r[k] for r in prompted()]) for k in prompted()[0]}
    outputs, modes = model(**inputs), [m.training for m in model.modules()]
    one, two = (OnPrompts().on_forward(model, inputs, outputs) for _ in range(2))
    assert [m.training for m in model.modules()] == modes
    assert one == two == OnPrompts().on_forward(model.eval(), inputs, outputs)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_run_with_dropout_and_checkpoints_is_held(reentrant, tmp_path):
    model = lora_model("gpt2").train()
    model.enable_input_require_grads()
    trainer = make_trainer(
        model, tmp_path, max_steps=4, gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": reentrant},
    )  # fmt: skip
    hlora.attach(trainer, Divergence(ROWS, 5.0, every=2), ToSlow(ROWS, 5.0, every=1))
    trainer.train()
    assert [e["R"] > 0 for e in trainer.state.log_history if "R" in e] == [True, True]
