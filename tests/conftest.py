"""Tiny random models, and a Trainer around them."""

from __future__ import annotations

import gc
import os
import shutil
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from peft import LoraConfig, get_peft_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

VOCAB = 64


def base_model(architecture: str = "llama", seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    if architecture == "llama":
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
            bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        return LlamaForCausalLM(config)
    if architecture == "gptj":
        config = GPTJConfig(
            vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, n_positions=64,
            bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        return GPTJForCausalLM(config)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def lora_model(
    architecture: str = "llama", seed: int = 0, dtype: torch.dtype | None = None, **config
):
    """A tiny model with a LoRA adapter on its attention."""
    model = base_model(architecture, seed)
    targets = ["c_attn"] if architecture == "gpt2" else ["q_proj", "v_proj"]
    config = {"r": 2, "lora_alpha": 4, "target_modules": targets, **config}
    if architecture == "gpt2":
        config["fan_in_fan_out"] = True
    torch.manual_seed(seed + 1)
    model = get_peft_model(model, LoraConfig(**config))
    return model.to(dtype) if dtype else model


def perturb(model, seed: int = 0, size: float = 0.1) -> None:
    """Move every LoRA factor away from its start."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(size * torch.randn_like(p))


def token_rows(count: int = 32, length: int = 12, seed: int = 0) -> list[dict]:
    """Rows that can be learned: each token follows from the one before."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        ids = [int(torch.randint(3, VOCAB, (), generator=generator))]
        while len(ids) < length:
            ids.append(3 + (ids[-1] * 5 + seed) % (VOCAB - 3))
        # No label on the first token: Trainer before transformers 5 counts it in the mean.
        labels = [-100, *ids[1:]]
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * length})
    return rows


def make_trainer(model, folder, callbacks=(), rows=None, **settings) -> Trainer:
    settings = {
        "per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2,
        "logging_steps": 2, "save_strategy": "no", "report_to": [], "seed": 0,
        "disable_tqdm": True, "use_cpu": True, **settings,
    }  # fmt: skip
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **settings),
        train_dataset=rows or token_rows(),
        callbacks=list(callbacks),
    )


def pytest_collection_finish():
    """Each training ends with a collection, which took longer than the training itself: it looked
    at all that torch, transformers and the tests had imported."""
    gc.freeze()


def pytest_unconfigure():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_precision(monkeypatch):
    """Before transformers 5, TrainingArguments(bf16=True) made each later Trainer one of bf16."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")


@pytest.fixture(autouse=True)
def _figures_closed():
    """One that is drawn and not saved stays open, and pyplot warns of many."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


def recorded(tmp_path, kind):
    """An importance folder of the tiny LLaMA."""
    import hlora

    folder = tmp_path / "nu"
    trainer = make_trainer(lora_model(), tmp_path / "run-nu", [hlora.Record(folder, kind=kind)])
    trainer.train()
    return folder


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """once(make, to, kind): what make(to, kind) gives, made a single time and copied from then on,
    so that a test may change its own."""
    made = {}

    def copied(make, to, kind):
        if (make, kind) not in made:
            place = tmp_path_factory.mktemp("once")
            make(place, kind)
            made[make, kind] = place
        shutil.copytree(made[make, kind], to, dirs_exist_ok=True)

    return copied


@pytest.fixture
def nu(tmp_path, once):
    """Dense importance, for tests that look at its elements."""
    once(recorded, tmp_path, "dense")
    return tmp_path / "nu"


@pytest.fixture(params=["dense", "factored"])
def kept(tmp_path, request, once):
    """Importance of each kind, for tests of what it does."""
    once(recorded, tmp_path, request.param)
    return tmp_path / "nu"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny LLaMA with its tokenizer, on disk."""
    from tests.tiny import write_model

    return write_model(tmp_path_factory.mktemp("tiny"))
