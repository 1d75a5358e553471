"""Base models from folders and files; pickles and foreign code stay out."""

import importlib.util
import json
import shutil

import pytest
import torch

import hlora
from hlora.run import models
from hlora.run.models import load, load_adapter, pick_device, pick_dtype
from tests.conftest import lora_model


def test_a_folder_is_loaded_frozen_in_the_wanted_type(tiny):
    model, words = load(str(tiny), dtype="bf16")
    assert next(model.parameters()).dtype == torch.bfloat16
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.config.use_cache
    assert words.pad_token_id is not None


def test_pickled_weights_are_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "m")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(hlora.InputError, match="pickled weights"):
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
    with pytest.raises(hlora.InputError, match=r"There is no model at \./nowhere"):
        load("./nowhere")
    with pytest.raises(hlora.InputError, match="is no model folder"):
        load(str(tmp_path))
    with pytest.raises(hlora.InputError, match=r"There is no file nowhere\.gguf"):
        load("nowhere.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(hlora.InputError, match="cannot be loaded"):
        load(str(tmp_path / "broken.gguf"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(hlora.InputError, match="cannot be loaded"):
        load(str(tmp_path))


def test_devices_and_types(monkeypatch):
    assert pick_device("cpu") == "cpu"
    with pytest.raises(hlora.InputError, match="no device 'cuda:77'"):
        pick_device("cuda:77")
    with pytest.raises(hlora.InputError, match="no device 'gpu'"):
        pick_device("gpu")
    for fast, dtype in ((True, "bf16"), (False, "fp32")):
        capabilities = {"avx512_bf16": fast, "avx2": True}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c, raising=False)
        assert pick_dtype("auto", "cpu") == dtype
    assert pick_dtype("fp16", "cpu") == "fp16"
    with pytest.raises(hlora.InputError, match="dtype must be"):
        pick_dtype("fp8", "cpu")


def test_adapters_are_read_from_safetensors_only(tmp_path, tiny):
    with pytest.raises(hlora.InputError, match=r"adapter_config\.json is missing"):
        load_adapter(load(str(tiny))[0], tmp_path)
    lora_model().save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(hlora.InputError, match="pickles are not read"):
        load_adapter(load(str(tiny))[0], tmp_path)


def test_an_adapter_of_another_shape_is_one_sentence(tmp_path, tiny):
    lora_model("gpt2").save_pretrained(tmp_path)
    with pytest.raises(hlora.InputError, match="does not fit this model"):
        load_adapter(load(str(tiny))[0], tmp_path)


def test_without_the_package_the_embedded_model_comes_from_the_hub(monkeypatch, tmp_path):
    monkeypatch.setenv("HLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert str(models.embedded_folder()) == models.EMBEDDED_HUB_NAME
