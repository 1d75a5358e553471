"""TRL's other trainers, run by TRL itself: each works, or is refused before a step is paid for."""

import importlib

import pytest
import torch
from peft import get_peft_model
from torch import distributed
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
)

import hlora
from hlora.core import store
from hlora.hf.divergence import Divergence
from hlora.hf.peft import find_pairs
from tests.conftest import lora_model, make_trainer
from tests.tiny import tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

from tests.test_trl import (  # noqa: E402
    CHAT,
    COMMON,
    EVEN,
    JUDGED,
    MESSAGES,
    gathered_at_base,
    general_phase,
    logged,
    longest,
    lora,
    make,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

PROMPTS = [{"prompt": f"{i} is"} for i in range(16)]
SHOWN = [{"prompt": f"{i} is", "privileged_context": " even"} for i in range(16)]
THREE = [{**row, "reference": " even indeed"} for row in EVEN]
STEPS = [
    {"prompt": f"{i} is", "completions": [" even", " so"], "labels": [i % 4 == 0, i % 3 == 0]}
    for i in range(16)
]
ROWS_OF_TEXT = torch.randint(3, 250, (8, 12), generator=torch.Generator().manual_seed(0))
TOKENS = [{"input_ids": [3 + i, 4, 5, 6]} for i in range(16)]
GROUPS = {"num_generations": 2, "max_completion_length": 4}
SHORT = {"max_completion_length": 4, "max_length": 64}

ROWS = {
    "Reward": EVEN, "CPO": EVEN, "ORPO": EVEN, "BemaDPO": EVEN, "TPO": THREE, "BCO": JUDGED,
    "PRM": STEPS, "PPO": TOKENS, "SDFT": SHOWN, "SDPO": SHOWN, "GKD": MESSAGES, "GOLD": MESSAGES,
    "IWOPD": MESSAGES,
}  # fmt: skip
"""Prompts for the others."""
OPTIONS = {
    "Distillation": {"max_completion_length": 4}, "GKD": {"max_new_tokens": 4, "max_length": 64},
    "GOLD": {**SHORT, "use_uld_loss": False}, "IWOPD": SHORT, "SDFT": GROUPS, "SDPO": GROUPS,
    "A2PO": {"max_completion_length": 4, "num_value_samples": 2},
    "GMPO": {**GROUPS, "beta": 0.1}, "GSPOToken": {**GROUPS, "beta": 0.1},
    "MiniLLM": {**GROUPS, "beta": 0.1}, "GFPO": {**GROUPS, "beta": 0.1},
    "GRPOWithReplayBuffer": {**GROUPS, "beta": 0.1},
    "OnlineDPO": {"max_new_tokens": 4}, "XPO": {"max_new_tokens": 4},
    "NashMD": {"max_new_tokens": 4},
    "PPO": {"response_length": 4, "total_episodes": 8, "num_mini_batches": 1},
}  # fmt: skip
PLACES = {
    "Reward": "trl", "Distillation": "trl", "BemaDPO": "trl.experimental.bema_for_ref_model",
    "GSPOToken": "trl.experimental.gspo_token", "IWOPD": "trl.experimental.iw_opd",
    "GRPOWithReplayBuffer": "trl.experimental.grpo_with_replay_buffer",
    "OnlineDPO": "trl.experimental.online_dpo", "NashMD": "trl.experimental.nash_md",
}  # fmt: skip
NAMES = {"BemaDPO": "DPO", "GSPOToken": "GRPO"}


def classes(kind):
    """The trainer and its settings; skips where this TRL has none."""
    name = NAMES.get(kind, kind)
    try:
        module = importlib.import_module(PLACES.get(kind, f"trl.experimental.{kind.lower()}"))
        trainer = getattr(module, f"{name}Trainer")
    except (ImportError, AttributeError):
        pytest.skip(f"TRL {trl.__version__} has no {kind}Trainer")
    return trainer, getattr(module, f"{name}Config", None) or getattr(trl, f"{name}Config")


def right_or_wrong(prompts, completions, **kwargs):
    return [float(i % 2) for i in range(len(completions))]


def judge():
    from trl.experimental.judges import BasePairwiseJudge

    class First(BasePairwiseJudge):
        def judge(self, prompts, completions, shuffle_order=True, return_scores=False):
            return [0.3 if return_scores else 0] * len(prompts)

    return First()


def beside(kind, tiny):
    """What a trainer is given beside a model with a tokenizer."""
    given = {}
    if kind in ("GKD", "GOLD", "IWOPD", "Distillation", "MiniLLM"):
        given["teacher_model"] = AutoModelForCausalLM.from_pretrained(tiny)
        with torch.no_grad():
            given["teacher_model"].lm_head.weight.mul_(4.0)
    if kind in ("GMPO", "GSPOToken", "GFPO", "GRPOWithReplayBuffer", "OnlineDPO", "MiniLLM"):
        given["reward_funcs"] = longest
    if kind in ("A2PO", "SDPO"):
        given["reward_funcs"] = right_or_wrong
    if kind in ("XPO", "NashMD"):
        given["judge"] = judge()
    if kind == "PPO":
        one = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
        given |= {"reward_model": one, "value_model": one, "ref_model": None}
    return given


def build(kind, tiny, folder, **settings):
    trainer, config = classes(kind)
    torch.manual_seed(0)
    words, adapter = tokenizer(), lora()
    words.chat_template = CHAT
    words.padding_side = "left" if kind == "PPO" else "right"
    of, more = AutoModelForCausalLM, {}
    if kind == "Reward":
        of, more, adapter.task_type = (
            AutoModelForSequenceClassification,
            {"num_labels": 1},
            "SEQ_CLS",
        )
    if kind == "PRM":
        of, adapter.task_type = AutoModelForTokenClassification, "TOKEN_CLS"
    model = of.from_pretrained(tiny, **more)
    model.config.pad_token_id = 0
    if kind == "A2PO":  # takes no peft_config
        given = {"model": get_peft_model(model, adapter)}
    else:
        given = {"model": model, "peft_config": adapter}
    return trainer(
        **given, **beside(kind, tiny), processing_class=words,
        args=config(output_dir=str(folder), **{**COMMON, **OPTIONS.get(kind, {}), **settings}),
        train_dataset=datasets.Dataset.from_list(ROWS.get(kind, PROMPTS)),
    )  # fmt: skip


@pytest.fixture(scope="module")
def nu(tiny, tmp_path_factory):
    return general_phase(tiny, tmp_path_factory.mktemp("nu"))


@pytest.fixture(scope="module")
def at_base(tiny, tmp_path_factory):
    return gathered_at_base(tiny, tmp_path_factory.mktemp("base"), ROWS_OF_TEXT)


FROM_BASE = ["SDFT", "SDPO", "OnlineDPO", "XPO", "NashMD", "GRPOWithReplayBuffer", "GFPO"]
"""What these compare with is the base model."""


@pytest.mark.parametrize("kind", [
    "Reward", "PRM", "Distillation", "GKD", "GOLD", "IWOPD", "MiniLLM", "CPO", "ORPO", "TPO", "BCO",
    "BemaDPO", "A2PO", "GMPO", "GSPOToken", *FROM_BASE[:-2],
])  # fmt: skip
def test_both_phases(kind, tiny, tmp_path):
    """φ = 0 moves away, and a large φ holds."""
    trainer = build(kind, tiny, tmp_path / "a", learning_rate=5e-2)
    hlora.attach(trainer, hlora.Record(tmp_path / "nu", quiet=True))
    trainer.train()
    stored = store.load(tmp_path / "nu")
    assert all(norm > 0 for norm in stored.importance.norms().values())
    anchor, moved = "base" if kind in FROM_BASE else "nu", {}
    for phi in (0.0, 1e6):
        held = build(kind, tiny, tmp_path / "b")
        hlora.attach(held, hlora.Penalty(tmp_path / "nu", phi=phi, anchor=anchor))
        held.train()
        assert len([e for e in logged(held) if "R" in e]) == COMMON["max_steps"]
        moved[phi] = sum(
            float((p.B.detach() - (anchor == "nu") * stored.factors[p.name][0]).norm())
            for p in find_pairs(held.model)
        )
    assert logged(held)[-1]["R"] > 0
    assert moved[1e6] < 0.7 * moved[0.0]


@pytest.mark.parametrize("kind", FROM_BASE)
def test_what_compares_with_the_base_model_is_refused_elsewhere(kind, tiny, nu, tmp_path):
    trainer = build(kind, tiny, tmp_path)
    before = list(trainer.callback_handler.callbacks)
    with pytest.raises(hlora.UnsupportedModelError, match=rf"{kind}Trainer.*anchor='base'"):
        hlora.attach(trainer, hlora.Penalty(nu))
    assert trainer.callback_handler.callbacks == before
    hlora.attach(trainer, hlora.Penalty(nu, anchor="base"))


@pytest.mark.parametrize("kind", ["SDFT", "SDPO"])
def test_a_teacher_that_is_the_model_itself_starts_where_it_does(kind, tiny, nu, tmp_path):
    trainer = build(kind, tiny, tmp_path, teacher_model_kind="live", max_steps=1)
    hlora.attach(trainer, hlora.Penalty(nu, phi=0.1))
    trainer.train()
    assert "R" in logged(trainer)[0]


START = {
    "BCO": ("loss", 0.693147), "BemaDPO": ("loss", 0.693147), "A2PO": ("implicit_reward", 0.0),
    "GMPO": ("kl", 0.0), "GSPOToken": ("kl", 0.0), "MiniLLM": ("kl", 0.0),
}  # fmt: skip
"""What is logged at the first step where policy and reference are one."""


def first(kind, *given):
    trainer = build(kind, *given[:2])
    hlora.attach(trainer, hlora.Penalty(given[2], phi=0.1))
    trainer.train()
    return logged(trainer)[0][START[kind][0]]


@pytest.mark.parametrize("kind", START)
def test_the_reference_is_where_a_new_adapter_starts(kind, tiny, nu, tmp_path, monkeypatch):
    assert first(kind, tiny, tmp_path, nu) == pytest.approx(START[kind][1], abs=6e-5)
    monkeypatch.setattr("hlora.hf.attach.refer_to_start", lambda *_: None)
    assert abs(first(kind, tiny, tmp_path, nu) - START[kind][1]) > 6e-5


def test_a_model_that_is_sharded_already_takes_no_reference(tiny, nu, tmp_path, monkeypatch):
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("this torch has no FSDP2")
    # On such a model PEFT's own loading can end the process.
    monkeypatch.setattr("hlora.hf.reference.add_reference", lambda *_: None)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        trainer = make("DPO", tiny, tmp_path)
        fsdp.fully_shard(trainer.model)
        with pytest.raises(hlora.UnsupportedModelError, match="already sharded"):
            hlora.attach(trainer, hlora.Penalty(nu))
        assert list(trainer.model.peft_config) == ["default"]
        assert getattr(trainer, "ref_adapter_name", None) is None
        hlora.attach(trainer, hlora.Penalty(nu, anchor="base"))
    finally:
        distributed.destroy_process_group()


def test_a_loop_of_its_own_is_refused(tiny, nu, tmp_path):
    for part in (hlora.Penalty(nu), hlora.Record(tmp_path / "x")):
        with pytest.raises(hlora.UnsupportedModelError, match=r"PPOTrainer.*GRPOTrainer"):
            hlora.attach(build("PPO", tiny, tmp_path, max_steps=-1), part)


# ---------------------------------------------------------------- terms on the data


class Push(hlora.Regularizer):
    """A gradient of 10⁶ on every entry of B, beside which the task's is nothing."""

    def __init__(self):
        self.phi, self.found = 1.0, []

    def on_forward(self, model, inputs, outputs):
        return 1e6 * sum(p.B.sum() for p in find_pairs(model))

    def before_step(self, groups):
        self.found += [float(p.B.grad.mean()) for g in groups for p in g.pairs]


@pytest.mark.parametrize(
    "kind", ["CPO", "ORPO", "TPO", "BCO", "BemaDPO", "GKD", "GOLD", "IWOPD", "Distillation"]
)
def test_a_term_on_the_data_counts_as_a_mean_over_the_micro_batches(kind, tiny, tmp_path):
    trainer = build(
        kind, tiny, tmp_path, max_grad_norm=0.0, gradient_accumulation_steps=2, max_steps=2
    )
    push = Push()
    hlora.attach(trainer, push)
    trainer.train()
    assert push.found == pytest.approx([1e6] * 8, rel=1e-4)


@pytest.mark.parametrize(
    "kind",
    [
        "A2PO",
        "SDFT",
        "SDPO",
        "GMPO",
        "MiniLLM",
        "GRPOWithReplayBuffer",
        "OnlineDPO",
        "XPO",
        "NashMD",
    ],
)
def test_a_term_that_could_not_join_the_loss_is_refused(kind, tiny, tmp_path):
    with pytest.raises(hlora.UnsupportedModelError, match="Trainer hands out no outputs"):
        hlora.attach(build(kind, tiny, tmp_path), Push())


@pytest.mark.parametrize("kind", ["Reward", "PRM"])
def test_a_classifier_predicts_no_text(kind, tiny, at_base, tmp_path):
    trainer = build(kind, tiny, tmp_path)
    for part in (
        Divergence(ROWS_OF_TEXT), hlora.Penalty(at_base, forget_at_most=0.1),
        hlora.Penalty(at_base, look_every=2),
    ):  # fmt: skip
        with pytest.raises(hlora.UnsupportedModelError, match="Classification"):
            hlora.attach(trainer, part)
    hlora.attach(trainer, hlora.Penalty(at_base))


class OwnStep(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**self._prepare_inputs(inputs)).loss
        self.accelerator.backward(loss)
        return loss.detach()


class LossAlone(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss


@pytest.mark.parametrize("of", [OwnStep, LossAlone])
def test_a_trainer_of_one_s_own_that_a_term_cannot_join_is_stopped_at_once(of, tmp_path):
    trainer = make_trainer(lora_model(), tmp_path)
    trainer.__class__ = of
    hlora.attach(trainer, Push())
    with pytest.raises(hlora.UnsupportedModelError, match="Push acts on the data"):
        trainer.train()
    assert trainer.state.global_step <= 1
