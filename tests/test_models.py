"""Base models from folders and files; pickles and foreign code stay out."""

import importlib.util
import json
import os
import shutil

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState

import hlora
from hlora.run import models
from hlora.run.models import (
    check_adapter_of,
    load,
    load_adapter,
    new_adapter,
    pick_device,
    pick_dtype,
)
from hlora.run.phases import DomainPhase
from hlora.run.settings import TrainSettings
from tests.conftest import base_model, lora_model
from tests.test_peers import settings
from tests.tiny import tokenizer, write_model


def test_a_folder_is_loaded_frozen_in_the_wanted_type(tiny):
    model, words = load(str(tiny), dtype="bf16")
    assert next(model.parameters()).dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.config.use_cache
    assert words.pad_token_id is not None


def test_pickled_weights_are_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(hlora.InputError, match="pickle"):
        load(str(folder))


def test_code_in_a_repository_is_not_run(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(hlora.InputError, match=r"trust_remote_code|cannot be loaded"):
        load(str(folder))


def test_missing_and_broken_models_are_one_sentence(tmp_path):
    with pytest.raises(hlora.InputError, match=r"\./nowhere"):
        load("./nowhere")
    with pytest.raises(hlora.InputError, match=r"config\.json"):
        load(str(tmp_path))
    with pytest.raises(hlora.InputError, match=r"nowhere\.gguf"):
        load("nowhere.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(hlora.InputError, match=r"broken\.gguf"):
        load(str(tmp_path / "broken.gguf"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(hlora.InputError, match="cannot be loaded"):
        load(str(tmp_path))


def test_devices_and_types():
    assert pick_device("cpu") == "cpu"
    with pytest.raises(hlora.InputError, match="'cuda:77'"):
        pick_device("cuda:77")
    with pytest.raises(hlora.InputError, match="'gpu'"):
        pick_device("gpu")
    assert pick_dtype("fp16", "cpu") == "fp16"
    with pytest.raises(hlora.InputError, match=r"dtype.*fp8"):
        pick_dtype("fp8", "cpu")


@pytest.mark.parametrize(
    ("capabilities", "dtype"),
    [({}, "fp32"), ({"avx512_f": True}, "fp32"), ({"amx_bf16": True}, "bf16"),
     ({"avx512_bf16": True}, "bf16"), ({"avx512_bf16": False}, "fp32")],
)  # fmt: skip
def test_auto_is_bf16_on_a_cpu_that_is_fast_at_it(monkeypatch, capabilities, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert pick_dtype("auto", "cpu") == dtype
    assert pick_dtype("fp32", "cpu") == "fp32"
    assert pick_dtype("auto", "mps") == "fp32"


def test_a_target_that_is_not_there_is_named_with_the_nearest(tiny):
    settings = TrainSettings(model="m", output="o", targets=["qproj"])
    with pytest.raises(hlora.InputError, match=r"'qproj'.*q_proj"):
        new_adapter(load(str(tiny))[0], settings)


def test_adapters_are_read_from_safetensors_only(tmp_path, tiny):
    with pytest.raises(hlora.InputError, match=r"adapter_config\.json"):
        load_adapter(load(str(tiny))[0], tmp_path)
    lora_model().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(hlora.InputError, match=r"adapter_model\.safetensors"):
        load_adapter(load(str(tiny))[0], tmp_path)


def test_an_adapter_beside_a_model_is_no_part_of_it(tiny, tmp_path, monkeypatch):
    """Neither in a folder, which is looked into, nor in a repository, which is downloaded."""
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    folder = shutil.copytree(tiny, tmp_path / "m")
    new_adapter(load(str(tiny))[0], TrainSettings(model="m", output="o")).save_pretrained(folder)
    with pytest.raises(hlora.InputError, match="also holds an adapter"):
        load(str(folder))
    monkeypatch.setattr(models, "check_model", lambda name: None)
    with pytest.raises(hlora.InputError, match="also holds an adapter"):
        load(str(folder))


def test_an_adapter_of_another_shape_is_one_sentence(tmp_path, tiny):
    lora_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(hlora.InputError, match=r"does not fit this model: Target modules .*c_attn"):
        load_adapter(load(str(tiny))[0], tmp_path)


@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize(("here", "there"), [("llama", "gptj"), ("gptj", "llama")])
def test_an_adapter_of_another_architecture_is_another_model_s(here, there, rank, tmp_path):
    """Both have q_proj and v_proj of one size."""
    lora_model(there, r=rank).save_pretrained(tmp_path)
    with pytest.raises(hlora.MismatchError, match=r"another model's: it has .*q_proj\.lora_A"):
        load_adapter(base_model(here), tmp_path)


def test_an_adapter_of_a_wider_model_is_another_model_s(tmp_path, tiny):
    narrow, wide = (load(str(write_model(tmp_path / str(w), width=w)))[0] for w in (16, 32))
    made = TrainSettings(model="m", output="o", lora_rank=4)
    new_adapter(wide, made).save_pretrained(tmp_path / "a")
    said = r"another model's: its model\.layers\.0\S+lora_A.weight is 4 × 32, and by .* 4 × 16"
    with pytest.raises(hlora.MismatchError, match=said):
        load_adapter(narrow, tmp_path / "a")
    assert load_adapter(load(str(tmp_path / "32"))[0], tmp_path / "a")


def test_an_adapter_of_another_rank_than_its_settings_is_not_whole(tmp_path):
    lora_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    with pytest.raises(hlora.StoreError, match=r"not whole: .*lora_A.weight is 2 × 16, and by .*4"):
        load_adapter(base_model(), tmp_path)


@pytest.mark.parametrize("init", [True, "pissa", "olora", "gaussian"])
def test_looking_whether_an_adapter_fits_changes_nothing(init, tmp_path, recwarn):
    lora_model(init_lora_weights=init).save_pretrained(tmp_path)
    model = base_model()
    model.config._name_or_path = "another/place"
    before = {n: p.clone() for n, p in model.state_dict().items()}
    state = torch.get_rng_state()
    assert check_adapter_of(model, tmp_path) == tmp_path
    assert torch.equal(state, torch.get_rng_state())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[n], p) for n, p in before.items())
    assert not any("base_model_name_or_path" in str(w.message) for w in recwarn)


def test_without_the_package_the_embedded_model_comes_from_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert str(models.embedded_folder()).startswith(models.EMBEDDED_HUB_NAME)


def written(folder, model):
    """A folder as `from_pretrained` reads it, with the tokenizer of one token a byte."""
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


ENCODER = {
    "vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip


def test_what_is_no_whole_causal_model_is_refused_and_never_half_random(tmp_path):
    llama = transformers.LlamaConfig(**ENCODER, num_key_value_heads=2, pad_token_id=0)
    classifier = written(tmp_path / "a", transformers.LlamaForSequenceClassification(llama))
    with pytest.raises(hlora.InputError, match=r"lm_head\.weight"):
        load(classifier)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**ENCODER, initializer_range=0.5))
    with pytest.raises(hlora.InputError, match=r"no causal language model.*attach"):
        load(written(tmp_path / "b", bert))
    t5 = transformers.T5Config(
        vocab_size=259, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2
    )
    t5 = transformers.T5ForConditionalGeneration(t5)
    with pytest.raises(hlora.InputError, match=r"no causal language model.*attach"):
        load(written(tmp_path / "c", t5))


def test_targets_that_a_model_has_not_or_that_peft_refuses_are_one_sentence(tmp_path):
    usual = TrainSettings(model="m", output="o")
    with pytest.raises(hlora.InputError, match=r"'q_proj': give --targets.*c_attn"):
        new_adapter(base_model("gpt2"), usual)
    config = transformers.MambaConfig(
        vocab_size=259, hidden_size=16, num_hidden_layers=1, state_size=4
    )
    mamba = transformers.MambaForCausalLM(config)
    everything = TrainSettings(model="m", output="o", targets=["all-linear"])
    with pytest.raises(hlora.InputError, match=r"--targets.*out_proj"):
        new_adapter(mamba, everything)


@pytest.mark.parametrize("before", [None, "bf16"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_training_computes_in_the_dtype_that_was_asked_for(
    before, dtype, tiny, tmp_path, monkeypatch
):
    """Whatever a Trainer before it in this process, or `accelerate launch`, had set."""
    name = "ACCELERATE_MIXED_PRECISION"
    monkeypatch.delenv(name)
    if before:
        monkeypatch.setenv(name, before)
    phase = DomainPhase(settings(tiny, tmp_path, dtype=dtype, max_steps=1, learning_rate=0.0))
    phase.run()
    assert os.environ.get(name) == before
    assert AcceleratorState().mixed_precision == ("bf16" if dtype == "bf16" else "no")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found = phase.model.eval()(input_ids=ids).logits
        exact = load(str(tiny))[0](input_ids=ids).logits
    assert ((found - exact).abs().max() < 1e-6) == (dtype == "fp32")
