"""Model and adapter folders that others wrote: no code, no kernel of the hub, one error."""

import json
import math
import random
import shutil

import pytest

import hlora
from hlora.core import patterns
from hlora.hf.peft import find_pairs
from hlora.run import models
from hlora.run.models import load, load_adapter
from tests.conftest import base_model, lora_model


@pytest.fixture
def folder(tiny, tmp_path):
    return shutil.copytree(tiny, tmp_path / "m")


def change(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "value", ["owner/kernel", "owner/kernel@main:f", "flash_attention_2", {"": "owner/kernel"}, 3]
)
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_config_names_no_kernel_of_the_hub(folder, monkeypatch, key, value):
    from transformers import modeling_utils

    asked = []
    for loader in ("load_and_register_attn_kernel", "lazy_import_flash_attention"):
        if hasattr(modeling_utils, loader):
            monkeypatch.setattr(modeling_utils, loader, lambda *a, **k: asked.append(a))
    change(folder / "config.json", **{key: value})
    model, _ = load(str(folder))
    assert model.config._attn_implementation == "sdpa"
    assert not asked


def test_a_model_without_torch_s_attention_has_its_own(folder, monkeypatch):
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    model, _ = load(str(folder))
    assert model.config._attn_implementation == "eager"


def test_model_and_tokenizer_of_the_hub_are_of_one_revision(monkeypatch, tiny):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    asked = []

    def pretend(cls, found):
        before = cls.from_pretrained

        def from_pretrained(name, revision=None, **kwargs):
            asked.append((name, revision))
            kwargs.pop("dtype", None)
            of = before(str(tiny), **kwargs)
            if found:
                of[0].config._commit_hash = found  # beside what was missing or unexpected
            return of

        monkeypatch.setattr(cls, "from_pretrained", from_pretrained)

    pretend(AutoConfig, None)
    pretend(AutoModelForCausalLM, "abc123")
    pretend(AutoTokenizer, None)
    load("owner/name")
    load("owner/name@v1")
    assert [a for a in asked if a[0] == "owner/name"] == [
        ("owner/name", r) for r in ("main", "main", "abc123", "v1", "v1", "abc123")
    ]  # fmt: skip
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(models, "cache_folder", lambda: tiny / "nowhere")
    assert str(models.embedded_folder()).endswith(f"@{models.EMBEDDED_REVISION}")


@pytest.mark.parametrize(
    "values",
    [
        {"peft_type": "PROMPT_TUNING"},
        {"peft_type": None},
        {"megatron_config": {"a": 1}, "megatron_core": "antigravity"},
        {"r": "many"},
        {"target_modules": 3},
        {"r": {"a": [1]}},
        {"target_modules": "(.*.*.*.*.*.*.*.*)*x$"},
        {"target_modules": "((\\w+)+)+!"},
        {"target_modules": "(q|.)(_|.)?(p|.)?(r|.)?" * 12 + "!"},
        {"exclude_modules": ".?" * 30 + "." * 30 + "!"},
        {"exclude_modules": ["(", "((\\w+)+)+!"]},
        {"layers_pattern": ["((\\w+)+)+!"], "layers_to_transform": [0]},
        {"rank_pattern": {"((\\w+)+)+!": 4}},
        {"alpha_pattern": {"(\\w+){1,99}!": 4}},
        {"alpha_pattern": {"q_proj": 1e300}},
        {"init_lora_weights": "pissa_niter_1000000000"},
        {"lora_alpha": math.nan},
        {"lora_alpha": 1e300},
        {"lora_dropout": math.nan},
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(tmp_path, monkeypatch, values):
    monkeypatch.setattr(patterns, "SECONDS", 1.0)
    lora_model().save_pretrained(tmp_path)
    change(tmp_path / "adapter_config.json", **values)
    with pytest.raises(hlora.InputError, match=str(tmp_path)):
        load_adapter(lora_model().unload(), tmp_path)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": ["q_proj"]},  # v_proj would be dropped
        {"target_modules": ["q_proj", "v_proj", "k_proj"]},  # k_proj would be as it begins
        {"use_dora": True},
        {"lora_bias": True},
        {"layers_to_transform": [0]},
    ],
)
def test_an_adapter_of_which_a_part_is_left_out_is_refused(tmp_path, values):
    lora_model().save_pretrained(tmp_path)
    change(tmp_path / "adapter_config.json", **values)
    with pytest.raises(hlora.StoreError, match="not whole"):
        load_adapter(lora_model().unload(), tmp_path)


@pytest.mark.parametrize(
    "pattern",
    [r".*\.(q_proj|v_proj)$", r"^(?!.*vision).*(q|v)_proj", r"model\.layers\.\d+\..*_proj"],
)
def test_ordinary_patterns_are_read(tmp_path, pattern):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(base_model(), LoraConfig(r=2, target_modules=pattern))
    model.save_pretrained(tmp_path)
    assert find_pairs(load_adapter(base_model(), tmp_path, trainable=True))


def mutated(draw, content):
    """A JSON file with a value of another type, cut short, or nested deep."""
    found = json.loads(content)
    odd = [None, [], {}, -1, 10**30, "x", [[]], {"a": {}}, True, 0.5, ""]
    kind = draw.randrange(4)
    if kind == 0:
        return content[: draw.randrange(len(content))]
    if kind == 1:
        at = draw.randrange(len(content))
        return content[:at] + draw.choice('{}[]",:0e-\0é') + content[at + 1 :]
    key = draw.choice(list(found))
    found[key] = draw.choice(odd)
    if kind == 2:
        return json.dumps(found)
    return json.dumps(found).replace(json.dumps(found[key]), "[" * 20_000 + "]" * 20_000, 1)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_no_mutated_file_of_a_model_is_a_traceback(tiny, folder, file):
    draw = random.Random(file)
    good = (tiny / file).read_text()
    refused = 0
    for _ in range(24):
        (folder / file).write_text(mutated(draw, good), "utf-8", "replace")
        try:
            load(str(folder))
        except hlora.InputError:
            refused += 1
    assert refused


@pytest.mark.filterwarnings("default")
def test_no_mutated_adapter_config_is_a_traceback(tmp_path):
    lora_model().save_pretrained(tmp_path)
    draw = random.Random(0)
    path = tmp_path / "adapter_config.json"
    good, refused = path.read_text(), 0
    for _ in range(40):
        path.write_text(mutated(draw, good), "utf-8", "replace")
        try:
            load_adapter(lora_model().unload(), tmp_path)
        except hlora.HloraError:
            refused += 1
    assert refused
