"""The same two lines in TRL's trainers."""

import pytest
import torch
from peft import LoraConfig

import hlora
from hlora.core import store
from hlora.hf.peft import find_pairs
from tests.tiny import tokenizer

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

COMMON = {
    "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 2,
    "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip


def lora():
    return LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def sft(tiny, folder, callback, seed=0):
    from transformers import AutoModelForCausalLM

    rows = datasets.Dataset.from_list([{"text": f"the number {i} is {i}"} for i in range(16)])
    torch.manual_seed(seed)
    trainer = trl.SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny), processing_class=tokenizer(),
        args=trl.SFTConfig(output_dir=str(folder), max_length=32, **COMMON),
        train_dataset=rows, peft_config=lora(),
    )  # fmt: skip
    hlora.attach(trainer, callback)
    trainer.train()
    return trainer


def test_both_phases_under_sft(tiny, tmp_path):
    sft(tiny, tmp_path / "a", hlora.Record(tmp_path / "nu"))
    stored = store.load(tmp_path / "nu")
    assert all(v > 0 for v in stored.importance.norms().values())
    held = sft(tiny, tmp_path / "b", hlora.Penalty(tmp_path / "nu", phi=1e6), seed=3)
    logged = [e for e in held.state.log_history if "loss" in e]
    assert all(e["R"] >= 0 for e in logged)
    for pair in find_pairs(held.model):  # a new adapter took ν's weights and was held there
        B, _ = stored.factors[pair.name]
        assert float((pair.B - B).norm()) < 0.5 * float(B.norm())


def test_the_penalty_under_dpo(tiny, tmp_path):
    from transformers import AutoModelForCausalLM

    sft(tiny, tmp_path / "a", hlora.Record(tmp_path / "nu"))
    rows = datasets.Dataset.from_list(
        [{"prompt": f"{i} is", "chosen": " even", "rejected": " odd"} for i in range(0, 16, 2)]
    )
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny), processing_class=tokenizer(),
        args=trl.DPOConfig(output_dir=str(tmp_path / "b"), max_length=32, **COMMON),
        train_dataset=rows, peft_config=lora(),
    )  # fmt: skip
    hlora.attach(trainer, hlora.Penalty(tmp_path / "nu", phi=0.1))
    trainer.train()
    logged = [e for e in trainer.state.log_history if "loss" in e]
    assert len(logged) == 2
    assert all(e["R"] > 0 for e in logged)
