"""An importance folder: loads anywhere, and says what is wrong with it."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import hlora
from hlora.core import store
from hlora.files import sha256
from hlora.hf.peft import base_of, find_pairs
from tests.conftest import VOCAB, base_model, lora_model, make_trainer

WITHOUT_HLORA = """
import sys
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hlora":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Gone())
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model = PeftModel.from_pretrained(base, sys.argv[2])
total = sum(float(p.double().square().sum()) for n, p in model.named_parameters() if "lora_" in n)
print("hlora" in sys.modules, repr(total))
"""


def test_the_adapter_loads_where_hlora_is_not_installed(nu, tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_HLORA, tmp_path / "base", nu],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    imported, total = done.stdout.split()
    expected = sum(
        float(f.double().square().sum()) for both in store.load(nu).factors.values() for f in both
    )
    assert imported == "False"
    assert float(total) == pytest.approx(expected, rel=1e-9)


def test_what_is_written_is_read(nu):
    stored = store.load(nu)
    norms = stored.info["norms"]
    assert stored.importance.norms() == pytest.approx(norms)
    assert set(stored.factors) == set(norms) == set(stored.importance.tensors())
    assert stored.info["kind"] == "dense"
    shapes = {n: tuple(t.shape) for n, t in stored.importance.tensors().items()}
    assert shapes == {n: (p["m"], p["n"]) for n, p in stored.info["pairs"].items()}


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "importance.safetensors"])
def test_truncated_edited_and_missing_files_are_told_apart(nu, file):
    path = nu / file
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(hlora.StoreError, match=f"{file} .*{len(whole) - 10} bytes.*{len(whole)}"):
        store.load(nu)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(hlora.StoreError, match=f"{file} was changed"):
        store.load(nu)
    path.unlink()
    with pytest.raises(hlora.StoreError, match=f"{file} is missing"):
        store.load(nu)


def edit_info(folder, **changes):
    info = json.loads((folder / store.MARKER).read_text())
    info |= changes
    (folder / store.MARKER).write_text(json.dumps(info))


def resign(folder):
    """Make the noted size and hash those of the files as they are."""
    info = json.loads((folder / store.MARKER).read_text())
    for name in info["files"]:
        info["files"][name] = {
            "bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name),
        }  # fmt: skip
    (folder / store.MARKER).write_text(json.dumps(info))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_importance_that_is_none_is_refused(nu, value):
    tensors = load_file(nu / store.TENSORS)
    next(iter(tensors.values()))[0, 0] = value
    save_file(tensors, nu / store.TENSORS)
    resign(nu)
    with pytest.raises(hlora.StoreError, match=r"importance\.safetensors.*negative or not finite"):
        store.load(nu)


def test_layers_that_do_not_match_the_list_are_refused(nu):
    tensors = load_file(nu / store.TENSORS)
    tensors.popitem()
    save_file(tensors, nu / store.TENSORS)
    resign(nu)
    with pytest.raises(hlora.StoreError, match="different layers"):
        store.load(nu)


def test_newer_formats_kinds_and_damaged_lists_are_refused(nu, tmp_path):
    edit_info(nu, kind="telepathic")
    with pytest.raises(hlora.StoreError, match=r"telepathic.*dense"):
        store.load(nu)
    edit_info(nu, format=99)
    with pytest.raises(hlora.StoreError, match=r"99.*upgrade"):
        store.load(nu)
    (nu / store.MARKER).write_text("{")
    with pytest.raises(hlora.StoreError, match=r"importance\.json is damaged"):
        store.load(nu)
    (nu / store.MARKER).unlink()
    with pytest.raises(hlora.StoreError, match=r"importance\.json is missing"):
        store.load(nu)
    with pytest.raises(hlora.InputError, match="nowhere"):
        store.load(tmp_path / "nowhere")


def check(folder, model, **settings):
    pairs = find_pairs(model)
    store.load(folder).check(base_of(model, pairs), pairs, **settings)


def test_another_model_is_refused_by_what_differs(nu):
    check(nu, lora_model())
    with pytest.raises(hlora.MismatchError, match=r"model_type.*gptj.*llama"):
        check(nu, lora_model("gptj"))
    with pytest.raises(hlora.MismatchError, match=r"weights.*q_proj|weights.*v_proj"):
        check(nu, lora_model(seed=7))


def test_other_targets_and_smaller_ranks_are_refused_by_both_values(nu):
    with pytest.raises(hlora.MismatchError, match=r"q_proj, .*q_proj, v_proj"):
        check(nu, lora_model(target_modules=["q_proj"]))
    with pytest.raises(hlora.MismatchError, match=r"rank of .*_proj is 1 .* rank is 2"):
        check(nu, lora_model(r=1))
    check(nu, lora_model(r=1), ranks=False)
    check(nu, lora_model(r=3, lora_alpha=7))


def test_a_resized_vocabulary_is_not_another_model(nu, caplog):
    def resized(model):
        model.get_base_model().resize_token_embeddings(VOCAB + 8, mean_resizing=False)
        return model

    check(nu, resized(lora_model()))
    with pytest.raises(hlora.MismatchError, match="other weights"):
        check(nu, resized(lora_model(seed=7)))
    pairs = find_pairs(resized(model := lora_model()))
    unknown = {**base_of(model, pairs), "samples": {}}  # as of a quantized model
    assert "vocabulary has" not in caplog.text
    store.load(nu).check(unknown, pairs)
    assert "vocabulary has 72 tokens here and 64 in" in caplog.text


def test_rounding_the_base_to_bf16_is_not_another_model(nu):
    check(nu, lora_model(dtype=torch.bfloat16))


def test_samples_of_another_number_are_damage(nu):
    info = json.loads((nu / store.MARKER).read_text())
    name = next(iter(info["base_model"]["samples"]))
    info["base_model"]["samples"][name].pop()
    (nu / store.MARKER).write_text(json.dumps(info))
    with pytest.raises(hlora.StoreError, match="samples"):
        check(nu, lora_model())
    here = base_of(lora_model(), find_pairs(lora_model()))
    for damage in ({"config": []}, {"samples": {name: ["x"]}}, {"samples": {name: 3}}):
        with pytest.raises(hlora.StoreError, match="base model is damaged"):
            store.check_base(here, {**here, **damage}, "x")


def test_an_interrupted_write_leaves_the_earlier_result(nu, monkeypatch):
    before = {p.name: p.read_bytes() for p in nu.iterdir()}
    model = lora_model()

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "save_file", stop)
    trainer = make_trainer(model, nu.parent / "run2", [hlora.Record(nu, overwrite=True)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert {p.name: p.read_bytes() for p in nu.iterdir()} == before


def test_other_users_may_read_the_result(nu):
    assert {p.stat().st_mode & 0o777 for p in nu.iterdir()} == {0o666 & ~store_umask()}


def store_umask():
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_an_adapter_config_is_compared_by_what_it_says(nu):
    path = nu / "adapter_config.json"
    config = json.loads(path.read_text())
    other = {**config, "base_model_name_or_path": "/elsewhere"}
    path.write_bytes(json.dumps(other, indent=4).replace("\n", "\r\n").encode())
    assert store.load(nu).factors
    path.write_text(json.dumps({**config, "lora_alpha": 99}))
    with pytest.raises(hlora.StoreError, match=r"edited after the recording.*lora_alpha"):
        store.load(nu)
    path.write_text("[1, 2")
    with pytest.raises(hlora.StoreError, match=r"adapter_config\.json cannot be read"):
        store.load(nu)
