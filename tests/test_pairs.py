"""What of PEFT is understood, and what is refused by name."""

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

import hlora
from hlora.core.adapter_file import read_adapter
from hlora.core.pairs import group
from hlora.hf.peft import find_pairs, save_adapter, starts_at_base, unwrap
from tests.conftest import base_model, lora_model, perturb


@pytest.mark.parametrize("architecture", ["llama", "gptj", "gpt2"])
def test_the_pairs_say_what_the_layer_computes(architecture):
    """θ − θ₀ = s·B·A, by running the layer with and without the adapter."""
    model = lora_model(architecture, dtype=torch.float64)
    perturb(model)
    for pair in find_pairs(model):
        layer = model.get_submodule(f"base_model.model.{pair.name}")
        x = torch.randn(3, pair.shape[1], dtype=torch.float64)
        change = layer(x) - layer.get_base_layer()(x)
        torch.testing.assert_close(change, x @ (pair.s * pair.B @ pair.A).mT)
        assert pair.name.endswith(pair.target)


def test_several_ranks_and_alphas_have_their_own_scale():
    model = lora_model(
        r=4, lora_alpha=8, rank_pattern={"v_proj": 2}, alpha_pattern={"layers.1.*.q_proj": 32}
    )
    scales = {(p.target, p.shape[2], p.s) for p in find_pairs(model)}
    assert scales == {("q_proj", 4, 2.0), ("q_proj", 4, 8.0), ("v_proj", 2, 4.0)}
    assert sum(len(g.pairs) for g in group(find_pairs(model))) == 4


def test_rslora_scales_by_the_root_of_the_rank():
    assert find_pairs(lora_model(r=4, lora_alpha=8, use_rslora=True))[0].s == 4.0


def test_only_the_active_adapter_counts():
    model = lora_model()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"]))
    assert len(find_pairs(model)) == 4
    model.set_adapter("other")
    pairs = find_pairs(model)
    assert [p.shape[2] for p in pairs] == [3, 3]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, "embedding model.embed_tokens"),
    ],
)
def test_what_cannot_be_supported_is_refused_by_name(settings, named):
    architecture = "gpt2" if "lora_bias" in settings else "llama"
    if architecture == "gpt2":  # lora_bias wants layers that have a bias
        settings = {**settings, "target_modules": ["c_attn"]}
    with pytest.raises(hlora.UnsupportedModelError, match=named):
        find_pairs(lora_model(architecture, **settings))


def test_other_adapters_and_none_are_refused():
    with pytest.raises(hlora.UnsupportedModelError, match="get_peft_model"):
        find_pairs(base_model())
    prompt = get_peft_model(
        base_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    )
    with pytest.raises(hlora.UnsupportedModelError, match="PROMPT_TUNING, not LORA"):
        find_pairs(prompt)


def test_two_active_adapters_are_refused():
    model = lora_model()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(hlora.UnsupportedModelError, match="adapters"):
        find_pairs(model)


def test_a_merged_a_frozen_and_a_half_trained_model_are_refused():
    model = lora_model()
    model.merge_adapter()
    with pytest.raises(hlora.UnsupportedModelError, match="unmerge_adapter"):
        find_pairs(model)
    frozen = lora_model()
    frozen.requires_grad_(False)
    with pytest.raises(hlora.UnsupportedModelError, match="is_trainable=True"):
        find_pairs(frozen)
    more = lora_model()
    more.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(hlora.UnsupportedModelError, match="embed_tokens"):
        find_pairs(more)


def test_wrappers_are_looked_through():
    model = lora_model()
    assert unwrap(torch.nn.DataParallel(model)) is model


def test_initializations_that_change_the_base_are_known():
    assert starts_at_base(lora_model())
    assert starts_at_base(lora_model(init_lora_weights="orthogonal"))
    assert not starts_at_base(lora_model(init_lora_weights="pissa"))
    assert not starts_at_base(lora_model(init_lora_weights="olora"))


def test_a_named_adapter_is_saved_where_peft_looks_for_it(tmp_path):
    model = get_peft_model(
        base_model(), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="mine"
    )
    perturb(model)
    save_adapter(model, tmp_path)
    _, factors = read_adapter(tmp_path)
    for pair in find_pairs(model):
        assert torch.equal(factors[pair.name][0], pair.B)
        assert torch.equal(factors[pair.name][1], pair.A)


def test_modules_that_the_user_trains_are_refused():
    lora = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="SEQ_CLS")
    with pytest.raises(hlora.UnsupportedModelError, match=r"modules_to_save.*unheld='warn'"):
        find_pairs(get_peft_model(base_model(), lora))
