"""The same two lines in Trainer and in TRL's trainers, run by TRL itself."""

import importlib
import struct

import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM

import hlora
from hlora.core import store
from hlora.core.importance.blend import Blend
from hlora.hf.divergence import Divergence
from hlora.hf.peft import find_pairs
from hlora.hf.record import save_importance
from hlora.run.evaluate import divergence
from tests.conftest import make_trainer
from tests.tiny import tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

COMMON = {
    "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1,
    "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip
EVEN = [{"prompt": f"{i} is", "chosen": " even", "rejected": " odd"} for i in range(0, 16, 2)]
JUDGED = [{"prompt": f"{i} is", "completion": " even", "label": i % 2 == 0} for i in range(16)]
TEXT = [{"text": f"the number {i} is {i}"} for i in range(16)]
CHAT = """{% for m in messages %}{{ m['role'] + ': ' }}{% if m['role'] == 'assistant' %}\
{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}\
{% endif %}{% endfor %}"""


def of_trl(name):
    """A class of TRL, wherever this version keeps it."""
    if hasattr(trl, name):
        return getattr(trl, name)
    module = name.removesuffix("Trainer").removesuffix("Config").lower()
    return getattr(importlib.import_module(f"trl.experimental.{module}"), name)


def lora(**settings):
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], **settings}
    return LoraConfig(lora_alpha=4, task_type="CAUSAL_LM", **settings)


def chat():
    words = tokenizer()
    words.chat_template = CHAT
    return words


def longest(completions, **kwargs):
    return [float(len(c)) for c in completions]


ROWS = {"SFT": TEXT, "DPO": EVEN, "KTO": JUDGED, "GRPO": EVEN, "RLOO": EVEN}
OPTIONS = {
    "SFT": {"max_length": 32}, "DPO": {"max_length": 32}, "KTO": {"max_length": 32},
    "GRPO": {"num_generations": 2, "max_completion_length": 4, "beta": 0.1},
    "RLOO": {"num_generations": 2, "max_completion_length": 4, "beta": 0.1},
}  # fmt: skip


def make(kind, tiny, folder, *parts, model=None, rows=None, words=None, config=None, **settings):
    """A trainer of TRL on the tiny LLaMA, with a new adapter unless a model is given."""
    torch.manual_seed(0)
    more = {"reward_funcs": longest} if kind in ("GRPO", "RLOO") else {}
    if model is None:
        more["peft_config"] = config or lora()
    args = {"output_dir": str(folder), **COMMON, **OPTIONS[kind], **settings}
    trainer = of_trl(f"{kind}Trainer")(
        model=model or AutoModelForCausalLM.from_pretrained(tiny),
        processing_class=words or tokenizer(), args=of_trl(f"{kind}Config")(**args),
        train_dataset=datasets.Dataset.from_list(rows or ROWS[kind]), **more,
    )  # fmt: skip
    hlora.attach(trainer, *parts)
    return trainer


def of_transformers(tiny, folder, *parts, **settings):
    from peft import get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), lora())
    trainer = make_trainer(model, folder, **{**COMMON, **settings})
    hlora.attach(trainer, *parts)
    return trainer


def any_trainer(kind, *given, **settings):
    return (
        of_transformers(*given, **settings) if kind == "Trainer" else make(kind, *given, **settings)
    )


def general_phase(tiny, folder):
    recording = hlora.Record(folder / "nu", quiet=True)
    make("SFT", tiny, folder / "run", recording, max_steps=6, learning_rate=5e-2).train()
    return folder / "nu"


def gathered_at_base(tiny, folder, text=None):
    """Importance that predicts forgetting, with text to look at or without."""
    from peft import get_peft_model

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), lora())
    pairs = find_pairs(model)
    importance, summary = Blend.gather(model, pairs, torch.randint(3, 250, (32, 12)))
    if text is not None:
        importance = importance.watching(text, text)
    notes = {"recording": {"storage": "fp32"}, "summary": summary, "settings": {}}
    save_importance(folder / "base", model, pairs, importance, notes)
    return folder / "base"


@pytest.fixture(scope="module")
def nu(tiny, tmp_path_factory):
    return general_phase(tiny, tmp_path_factory.mktemp("nu"))


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory):
    return gathered_at_base(tiny, tmp_path_factory.mktemp("base"))


def logged(trainer):
    return [e for e in trainer.state.log_history if "loss" in e]


# ---------------------------------------------------------------- what is logged, and where


def events(folder):
    """The values in TensorBoard's files under a folder, each with its step."""
    from tensorboardX.proto.event_pb2 import Event

    for file in folder.rglob("events.out.*"):
        content, at = file.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack("<Q", content[at : at + 8])
            event = Event.FromString(content[at + 12 : at + 12 + length])
            yield from ((value, event.step) for value in event.summary.value)
            at += 16 + length


def panels(folder):
    """The charts that TensorBoard's custom scalars show, and what is drawn in each."""
    from tensorboardX.proto.layout_pb2 import Layout

    found = [
        Layout.FromString(value.tensor.string_val[0])
        for value, _ in events(folder)
        if value.metadata.plugin_data.plugin_name == "custom_scalars"
    ]
    return [
        {chart.title: list(chart.multiline.tag) for of in layout.category for chart in of.chart}
        for layout in found
    ]


SHOWN = ("R", "penalty", "penalty_grad_ratio", "forgetting")
EVERY = ["Trainer", "SFT", "DPO", "KTO", "GRPO", "RLOO"]


@pytest.mark.parametrize("kind", EVERY)
def test_they_are_in_history_console_and_tensorboard(kind, tiny, base, tmp_path, capsys):
    try:
        import tensorboardX  # noqa: F401

        reporters = ["tensorboard"]
    except ImportError:
        reporters = []
    penalty = hlora.Penalty(base, forget_at_most=1.0)
    trainer = any_trainer(kind, tiny, tmp_path, penalty, report_to=reporters)
    trainer.train()
    assert len(logged(trainer)) == 4
    printed = [line for line in capsys.readouterr().out.splitlines() if "'R'" in line]
    assert len(printed) == 4
    for name in SHOWN:
        assert all(name in e for e in logged(trainer))
        assert all(f"'{name}'" in line for line in printed)
    assert logged(trainer)[-1]["R"] > 0
    if not reporters:
        pytest.skip("tensorboardX is not installed, so nothing was written for TensorBoard")
    assert {(f"train/{name}", s) for name in SHOWN for s in (1, 2, 3, 4)} <= {
        (value.tag, step) for value, step in events(tmp_path)
    }
    assert panels(tmp_path) == [
        {
            "domain loss and forgetting": ["^train/loss$", "^train/forgetting$"],
            "domain loss and penalty": ["^train/loss$", "^train/penalty$"],
        }
    ]


def test_tensorboard_shows_no_forgetting_that_nothing_predicts(tiny, nu, tmp_path):
    tensorboard = pytest.importorskip("tensorboardX")
    trainer = of_transformers(tiny, tmp_path, hlora.Penalty(nu))
    assert tensorboard
    from transformers.integrations import TensorBoardCallback

    trainer.add_callback(TensorBoardCallback)  # later than attach
    trainer.train()
    assert panels(tmp_path) == [{"domain loss and penalty": ["^train/loss$", "^train/penalty$"]}]


def test_what_cannot_work_is_refused_by_attach(tiny, nu, tmp_path):
    """Nothing is trained here."""

    def refused(kind, error, named, *parts, attached=None, **settings):
        trainer = any_trainer(kind, tiny, tmp_path / "run", **settings)
        before = list(trainer.callback_handler.callbacks)
        for name, value in (attached or {}).items():
            setattr(trainer.args, name, value)
        with pytest.raises(error, match=named):
            hlora.attach(trainer, *parts)
        assert trainer.callback_handler.callbacks == before

    best = {"load_best_model_at_end": True}
    record = hlora.Record(tmp_path / "x")
    refused("DPO", hlora.InputError, "load_best_model_at_end", record, attached=best)
    refused("SFT", hlora.MismatchError, "k_proj", hlora.Penalty(nu),
            config=lora(target_modules=["q_proj", "k_proj"]))  # fmt: skip
    refused("SFT", hlora.UnsupportedModelError, "use_dora", hlora.Penalty(nu),
            config=lora(use_dora=True))  # fmt: skip
    layerwise = {"optim": "galore_adamw_layerwise"}
    refused("SFT", hlora.UnsupportedModelError, "layerwise", record, attached=layerwise)
    part = Divergence(torch.randint(3, 250, (4, 8)))
    refused("GRPO", hlora.UnsupportedModelError, "GRPOTrainer", part)
    refused("RLOO", hlora.UnsupportedModelError, "RLOOTrainer", part)
    with pytest.raises(hlora.InputError, match="AdamW"):
        hlora.attach(torch.optim.AdamW([torch.zeros(1)]), record)


@pytest.mark.parametrize("kind", ["Trainer", "SFT", "DPO", "KTO"])
def test_a_term_on_general_text_joins_their_loss(kind, tiny, tmp_path):
    """The KL to the base model is lower for it at the end."""
    found = {}
    for phi in (0.0, 50.0):
        rows = torch.randint(3, 250, (8, 12), generator=torch.Generator().manual_seed(0))
        trainer = any_trainer(
            kind, tiny, tmp_path / str(phi), Divergence(rows, phi, batch=8, every=1),
            max_steps=8, learning_rate=5e-2,
        )  # fmt: skip
        trainer.train()
        found[phi] = divergence(trainer.model, rows).nats
    assert found[50.0] < 0.5 * found[0.0]


# ---------------------------------------------------------------- the reference of preferences

START = {
    "DPO": ("loss", 0.693147), "KTO": ("loss", 0.5), "GRPO": ("kl", 0.0), "RLOO": ("kl", 0.0),
}  # fmt: skip
"""What is logged at the first step where policy and reference are one; to four digits."""
PREFERRING = list(START)


def first(trainer, kind):
    trainer.train()
    return logged(trainer)[0][START[kind][0]]


@pytest.mark.parametrize("kind", PREFERRING)
def test_the_reference_is_where_a_new_adapter_starts(kind, tiny, nu, tmp_path):
    if kind in ("GRPO", "RLOO") and Version(trl.__version__) < Version("0.27"):
        pytest.skip("this TRL's reference is the base model: attach refuses it")
    trainer = make(kind, tiny, tmp_path / "a", hlora.Penalty(nu, phi=0.1))
    assert first(trainer, kind) == pytest.approx(START[kind][1], abs=6e-5)
    assert logged(trainer)[-1]["R"] > 0
    # The reference stays there, and what is trained leaves it.
    _, factors = trainer.model, store.load(nu).factors
    for pair in find_pairs(trainer.model):
        assert torch.equal(pair.layer.lora_B["ref"].weight, factors[pair.name][0])
        assert torch.equal(pair.layer.lora_A["ref"].weight, factors[pair.name][1])
        assert not torch.equal(pair.B, factors[pair.name][0])


@pytest.mark.parametrize("kind", PREFERRING)
def test_without_it_the_reference_would_be_the_base_model(kind, tiny, nu, tmp_path, monkeypatch):
    """So the test above can fail."""
    monkeypatch.setattr("hlora.hf.attach.refer_to_start", lambda *_: None)
    trainer = make(kind, tiny, tmp_path, hlora.Penalty(nu, phi=0.1))
    assert abs(first(trainer, kind) - START[kind][1]) > 1e-4


@pytest.mark.parametrize("kind", PREFERRING)
def test_the_reference_is_the_recorded_adapter_that_was_loaded(kind, tiny, nu, tmp_path):
    if kind in ("GRPO", "RLOO") and Version(trl.__version__) < Version("0.27"):
        pytest.skip("this TRL's reference is the base model: attach refuses it")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model = PeftModel.from_pretrained(model, nu, is_trainable=True)
    trainer = make(kind, tiny, tmp_path, hlora.Penalty(nu, phi=0.1), model=model)
    assert first(trainer, kind) == pytest.approx(START[kind][1], abs=6e-5)


@pytest.mark.parametrize("kind", PREFERRING)
def test_held_to_the_base_model_that_is_the_reference(kind, tiny, base, tmp_path):
    trainer = make(kind, tiny, tmp_path, hlora.Penalty(base))
    assert first(trainer, kind) == pytest.approx(START[kind][1], abs=6e-5)
    assert list(trainer.model.peft_config) == ["default"]


def test_the_reference_is_the_start_of_the_last_of_several_at_a_larger_rank(tiny, nu, tmp_path):
    second = tmp_path / "second"
    held = hlora.Penalty(nu, phi=0.1), hlora.Record(second, quiet=True)
    make("SFT", tiny, tmp_path / "run", *held, learning_rate=5e-2).train()
    both = hlora.Penalty(nu, phi=0.1), hlora.Penalty(second, phi=0.1)
    trainer = make("DPO", tiny, tmp_path / "a", *both, config=lora(r=3))
    assert first(trainer, "DPO") == pytest.approx(START["DPO"][1], abs=6e-5)
    of = store.load(second).factors
    for pair in find_pairs(trainer.model):
        layer, (B, A) = pair.layer, of[pair.name]
        torch.testing.assert_close(
            layer.scaling["ref"] * layer.lora_B["ref"].weight @ layer.lora_A["ref"].weight,
            2 * B @ A,
        )


def test_without_a_reference_no_adapter_is_added(tiny, nu, tmp_path):
    for kind, more in (("GRPO", {"beta": 0.0}), ("SFT", {})):
        trainer = make(kind, tiny, tmp_path, hlora.Penalty(nu), **more)
        assert list(trainer.model.peft_config) == ["default"]


def test_a_precomputed_reference_must_be_of_the_start(tiny, nu, tmp_path):
    early = {"precompute_ref_log_probs": True}
    trainer = make("DPO", tiny, tmp_path / "a", **early)
    if "ref_chosen_logps" in trainer.train_dataset.column_names:
        with pytest.raises(hlora.UnsupportedModelError, match=r"from_pretrained.*is_trainable"):
            hlora.attach(trainer, hlora.Penalty(nu))
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model = PeftModel.from_pretrained(model, nu, is_trainable=True)
    trainer = make("DPO", tiny, tmp_path / "b", hlora.Penalty(nu), model=model, **early)
    assert first(trainer, "DPO") == pytest.approx(START["DPO"][1], abs=6e-5)


def test_a_reference_of_one_s_own_is_left_and_told(tiny, nu, tmp_path, caplog):
    trainer = make("DPO", tiny, tmp_path)
    trainer.ref_model = AutoModelForCausalLM.from_pretrained(tiny)
    hlora.attach(trainer, hlora.Penalty(nu))
    assert "ref_model that was given" in caplog.text
    assert list(trainer.model.peft_config) == ["default"]


def test_preferences_resume_with_their_reference(tiny, nu, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    straight = make("DPO", tiny, tmp_path / "a", hlora.Penalty(nu, phi=0.1), **saving)
    straight.train()
    assert not (tmp_path / "a" / "checkpoint-2" / "ref").exists()  # `attach` makes it
    resumed = make("DPO", tiny, tmp_path / "b", hlora.Penalty(nu, phi=0.1))
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    there = dict(resumed.model.named_parameters())
    assert any(".lora_B.ref." in name for name in there)
    for name, p in straight.model.named_parameters():
        torch.testing.assert_close(p, there[name])


# ---------------------------------------------------------------- supervised fine-tuning


MESSAGES = [
    {"messages": [
        {"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": " even" * 2},
    ]}
    for i in range(16)
]  # fmt: skip
PROMPTED = [{"prompt": f"{i} is", "completion": " even"} for i in range(16)]


@pytest.mark.parametrize(
    ("rows", "settings"),
    [
        (TEXT, {}),
        (MESSAGES, {}),
        (PROMPTED, {}),
        (PROMPTED, {"completion_only_loss": False}),
        (TEXT, {"packing": True, "max_length": 48}),
        (MESSAGES, {"assistant_only_loss": True, "max_length": 48}),
        (TEXT, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),
        (TEXT, {"padding_free": True, "max_length": None}),
    ],
    ids=["text", "messages", "prompted", "whole", "packed", "assistant", "accumulated", "unpadded"],
)
def test_both_phases_under_sft(rows, settings, tiny, tmp_path):
    """φ = 0 is the task alone, to the bit; a large φ stays at θ^ν."""
    given = {"rows": rows, "words": chat(), "max_steps": 4, **settings}
    record = hlora.Record(tmp_path / "nu", quiet=True)
    make("SFT", tiny, tmp_path / "a", record, **given).train()
    stored = store.load(tmp_path / "nu")
    assert all(v > 0 for v in stored.importance.norms().values())
    moved = {}
    for phi in (0.0, 1e6):
        held = make("SFT", tiny, tmp_path / "b", hlora.Penalty(tmp_path / "nu", phi=phi), **given)
        held.train()
        assert all(e["R"] >= 0 for e in logged(held))
        moved[phi] = sum(
            float((p.B - stored.factors[p.name][0]).norm()) for p in find_pairs(held.model)
        )
    assert moved[1e6] < 0.5 * moved[0.0]
    model = AutoModelForCausalLM.from_pretrained(tiny)
    model = PeftModel.from_pretrained(model, tmp_path / "nu", is_trainable=True)
    plain = make("SFT", tiny, tmp_path / "c", model=model, **given)
    assert plain.train().training_loss > 0
    free = make("SFT", tiny, tmp_path / "d", hlora.Penalty(tmp_path / "nu", phi=0.0), **given)
    free.train()
    for a, b in zip(find_pairs(plain.model), find_pairs(free.model), strict=True):
        assert torch.equal(a.B, b.B)
        assert torch.equal(a.A, b.A)
