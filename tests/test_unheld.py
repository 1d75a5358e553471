"""What is trained beside the held matrices: refused, or free and named. Parts never reached."""

import peft
import pytest
import torch
from packaging.version import Version
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Trainer,
    TrainingArguments,
)

import hlora
from hlora.core import store
from hlora.core.kinds import kind_named
from hlora.core.layers import unreached
from hlora.hf.peft import find_pairs, unheld_names
from hlora.hf.record import save_importance
from tests.conftest import VOCAB, base_model, lora_model, make_trainer, token_rows

ATTENTION = ["q_proj", "v_proj"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tensor.s. have invalid shape"),  # PEFT of a bias beside B
    pytest.mark.filterwarnings("ignore:.*_pattern keys"),  # PEFT of keys that it wrote itself
]


def biased(**settings):
    """The tiny LLaMA whose targets have a bias, as lora_bias wants."""
    model = base_model()
    for layer in model.model.layers:
        for name in ATTENTION:
            old = getattr(layer.self_attn, name)
            new = nn.Linear(old.in_features, old.out_features)
            new.weight = old.weight
            nn.init.zeros_(new.bias)
            setattr(layer.self_attn, name, new)
    torch.manual_seed(1)
    return get_peft_model(
        model, LoraConfig(r=2, lora_alpha=4, target_modules=ATTENTION, **settings)
    )


BESIDE = {
    "use_dora": ({"use_dora": True}, lora_model, "lora_magnitude_vector"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, lora_model, "lm_head.weight"),
    "trainable_token_indices": (
        {"trainable_token_indices": [3, 4]}, lora_model, "token_adapter.trainable_tokens_delta",
    ),
    "lora_bias": ({"lora_bias": True}, biased, "lora_B.bias"),
    "bias": ({"bias": "lora_only"}, biased, "q_proj.bias"),
    "embedding": (
        {"target_modules": ["embed_tokens", *ATTENTION]}, lora_model, "model.embed_tokens",
    ),
}  # fmt: skip


def given(which):
    settings, make, named = BESIDE[which]
    if make is biased:
        return biased(**settings), named
    return lora_model(**settings), named


def near(pair, factors):
    """Whether it stayed where the general phase ended."""
    B = factors[pair.name][0]
    return (pair.B.detach() - B).norm() < 0.5 * B.norm()


@pytest.mark.parametrize("which", BESIDE)
def test_it_is_refused_or_free_and_named(which, tmp_path, caplog):
    if which == "bias" and Version(peft.__version__) < Version("0.19"):
        pytest.skip("this PEFT writes no trained bias of a layer into the adapter's file")
    model, named = given(which)
    refused = make_trainer(model, tmp_path / "no")
    with pytest.raises(hlora.UnsupportedModelError, match="unheld='warn'"):
        hlora.attach(refused, hlora.Record(tmp_path / "nu"))
    pairs = find_pairs(model, "warn")
    assert {p.target for p in pairs} == set(ATTENTION)
    assert any(named in name for name in unheld_names(model, pairs))

    # The general phase, and where it ended.
    trainer = make_trainer(model, tmp_path / "a")
    hlora.attach(trainer, hlora.Record(tmp_path / "nu", unheld="warn", quiet=True))
    trainer.train()
    assert "nothing protects" in caplog.text
    assert named.split(".")[-1] in caplog.text
    end = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    # The domain phase starts there, holds the pairs, and trains what is beside them.
    new, _ = given(which)
    held = make_trainer(new, tmp_path / "b", rows=token_rows(seed=7))
    hlora.attach(held, hlora.Penalty(tmp_path / "nu", phi=1e7), unheld="warn")
    starts = []

    class See(hlora.Regularizer):
        def before_step(self, groups):
            if not starts:
                starts.append({n: p.detach().clone() for n, p in new.named_parameters()})

    hlora.attach(held, See(), unheld="warn")
    held.train()
    for name, value in end.items():
        assert torch.equal(starts[0][name], value), name
    factors = store.load(tmp_path / "nu").factors
    ours = {id(f) for p in find_pairs(new, "warn") for f in (p.A, p.B)}
    assert all(near(p, factors) for p in find_pairs(new, "warn"))
    beside = [n for n, p in new.named_parameters() if p.requires_grad and id(p) not in ours]
    assert any(not torch.equal(end[n], p) for n, p in new.named_parameters() if n in beside)


def test_it_is_refused_where_a_setting_has_no_such_value(nu):
    with pytest.raises(hlora.InputError, match="unheld"):
        hlora.Penalty(nu, unheld="ignore")
    with pytest.raises(hlora.InputError, match="unheld"):
        hlora.Record("x", unheld="ignore")


def test_dora_starts_at_the_recorded_weights_of_plain_lora(tmp_path, nu):
    """Its magnitudes are those of θ^ν: the first prediction is that of the recorded adapter."""
    ids = torch.tensor([r["input_ids"] for r in token_rows(2)])
    plain = PeftModel.from_pretrained(base_model(), nu).eval()
    dora = lora_model(use_dora=True)
    penalty = hlora.Penalty(nu, unheld="warn")
    penalty.start(dora, torch.optim.SGD([p for p in dora.parameters() if p.requires_grad]))
    torch.testing.assert_close(dora(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_what_the_recorded_adapter_had_beside_is_told(tmp_path, caplog):
    trainer = make_trainer(lora_model(modules_to_save=["lm_head"]), tmp_path / "a")
    hlora.attach(trainer, hlora.Record(tmp_path / "nu", unheld="warn", quiet=True))
    trainer.train()
    penalty, model = hlora.Penalty(tmp_path / "nu"), lora_model()
    penalty.start(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))
    assert "also holds lm_head.weight" in caplog.text


# ---------------------------------------------------------------- a classifier's head


def classifier():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, num_labels=3,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(lora_model().unload().model.state_dict())
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=ATTENTION, task_type="SEQ_CLS")
    return get_peft_model(model, lora)


def test_a_new_head_is_trained_beside_the_held_adapter(tmp_path, nu, caplog):
    """PEFT adds it itself, so it takes no setting; importance is that of the language model."""
    model = classifier()
    before = model.base_model.model.score.modules_to_save["default"].weight.detach().clone()
    rows = [{**r, "labels": r["input_ids"][0] % 3} for r in token_rows()]
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=6, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", logging_steps=2, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    hlora.attach(trainer, hlora.Penalty(nu, phi=1e6))
    trainer.train()
    assert "score.weight is trained freely" in caplog.text
    assert not torch.equal(model.base_model.model.score.modules_to_save["default"].weight, before)
    factors = store.load(nu).factors
    assert all(near(p, factors) for p in find_pairs(model))
    assert all("R" in e for e in trainer.state.log_history if "loss" in e)


# ---------------------------------------------------------------- experts

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0,
}  # fmt: skip


def mixtral(targets):
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets))


def qwen(targets):
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        **SIZES, num_experts=4, moe_intermediate_size=8, shared_expert_intermediate_size=8
    )
    return get_peft_model(Qwen2MoeForCausalLM(config), LoraConfig(r=2, target_modules=targets))


@pytest.mark.parametrize("make", [mixtral, qwen])
def test_attention_of_a_mixture_is_held_as_ever(make, tmp_path):
    trainer = make_trainer(make(ATTENTION), tmp_path / "a")
    hlora.attach(trainer, hlora.Record(tmp_path / "nu", quiet=True))
    trainer.train()
    held = make_trainer(make(ATTENTION), tmp_path / "b")
    hlora.attach(held, hlora.Penalty(tmp_path / "nu"))
    held.train()
    assert held.state.log_history[-2]["R"] > 0


def test_shared_experts_are_held(tmp_path):
    model = qwen(["gate_proj", "up_proj", "down_proj"])
    names = {p.name.split("mlp.")[1] for p in find_pairs(model, "warn")}
    assert {f"shared_expert.{n}_proj" for n in ("gate", "up", "down")} <= names


# ---------------------------------------------------------------- towers that text never reaches


def llava():
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=LlamaConfig(**SIZES), image_token_index=VOCAB - 1
    )
    return get_peft_model(
        LlavaForConditionalGeneration(config), LoraConfig(r=2, target_modules=ATTENTION)
    )


@pytest.mark.parametrize("kind", ["factored", "dense", "fisher", "kronecker", "sketch", "blend"])
def test_a_tower_that_the_text_never_reached_is_named(kind, tmp_path, caplog):
    folder, model = tmp_path / "nu", llava()
    if kind_named(kind).trained:
        trainer = make_trainer(model, tmp_path / "a")
        hlora.attach(trainer, hlora.Record(folder, kind=kind, quiet=True))
        trainer.train()
    else:
        pairs = find_pairs(model)
        importance, summary = kind_named(kind).gather(model, pairs, torch.randint(3, 60, (16, 12)))
        notes = {"recording": {"storage": "fp32"}, "summary": summary, "settings": {}}
        save_importance(folder, model, pairs, importance, notes)
    named = "never reached model.vision_tower:"
    assert named in caplog.text
    caplog.clear()
    held = make_trainer(llava(), tmp_path / "b")
    hlora.attach(held, hlora.Penalty(folder))
    held.train()
    assert named in caplog.text
    assert all(e["R"] >= 0 for e in held.state.log_history if "loss" in e)


def test_parts_are_named_by_the_shortest_name_that_is_theirs():
    norms = {"a.text.0.q": 1.0, "a.text.0.v": 0.0, "a.image.0.q": 0.0, "a.image.1.q": 0.0}
    assert unreached(norms) == ["a.text.0.v", "a.image"]
    assert unreached({"a.q": 1.0}) == []
