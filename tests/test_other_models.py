"""Models that are no causal language models, in a script: both phases, and what is refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)

import hlora
from hlora.core import store
from hlora.hf.divergence import Divergence, OnPrompts
from hlora.hf.peft import find_pairs
from tests.conftest import VOCAB

LENGTH = 10
BERT = {
    "vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24, "max_position_embeddings": 32,
}  # fmt: skip
T5 = {
    "vocab_size": VOCAB, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip


def t5():
    return T5ForConditionalGeneration(T5Config(**T5))


def masked():
    return BertForMaskedLM(BertConfig(**BERT))


def classifier():
    return BertForSequenceClassification(BertConfig(**BERT, num_labels=3))


KINDS = {
    "t5": (t5, ["q", "v"], "SEQ_2_SEQ_LM"),
    "masked": (masked, ["query", "value"], None),
    "classifier": (classifier, ["query", "value"], "SEQ_CLS"),
}


def rows(kind, seed):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(16):
        ids = torch.randint(3, VOCAB, (LENGTH,), generator=draw).tolist()
        if kind == "classifier":
            labels = ids[0] % 3
        elif kind == "masked":
            labels = [t if i % 2 else -100 for i, t in enumerate(ids)]
        else:
            labels = [3 + (t * 5 + seed) % (VOCAB - 3) for t in ids]
        yield {"input_ids": ids, "attention_mask": [1] * LENGTH, "labels": labels}


def trainer_of(kind, folder, seed=0, **settings):
    make, targets, task = KINDS[kind]
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=targets, task_type=task)
    model = get_peft_model(make(), config)
    of, arguments = (Seq2SeqTrainer, Seq2SeqTrainingArguments) if kind == "t5" else (
        Trainer, TrainingArguments)  # fmt: skip
    args = arguments(
        output_dir=str(folder), per_device_train_batch_size=4, max_steps=6, logging_steps=2,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
        **{"learning_rate": 1e-2, **settings},
    )  # fmt: skip
    return of(model=model, args=args, train_dataset=list(rows(kind, seed)))


@pytest.mark.parametrize("kind", KINDS)
def test_both_phases(kind, tmp_path):
    trainer = trainer_of(kind, tmp_path / "a", learning_rate=5e-2)
    hlora.attach(trainer, hlora.Record(tmp_path / "nu", quiet=True))
    trainer.train()
    stored = store.load(tmp_path / "nu")
    assert all(norm > 0 for norm in stored.importance.norms().values())
    assert len(stored.factors) == {"t5": 12}.get(kind, 4)  # of T5 encoder, decoder and between
    moved = {}
    for phi in (0.0, 1e6):
        held = trainer_of(kind, tmp_path / "b", seed=3)
        hlora.attach(held, hlora.Penalty(tmp_path / "nu", phi=phi))
        held.train()
        moved[phi] = sum(
            float((p.B.detach() - stored.factors[p.name][0]).norm()) for p in find_pairs(held.model)
        )
    assert [e["R"] > 0 for e in held.state.log_history if "R" in e] == [True] * 3
    assert moved[1e6] < 0.5 * moved[0.0]


@pytest.mark.parametrize("kind", ["t5", "classifier"])
@pytest.mark.parametrize("part", [Divergence(torch.randint(3, VOCAB, (4, 8))), OnPrompts()])
def test_what_looks_at_predictions_of_text_is_refused(part, kind, tmp_path):
    trainer = trainer_of(kind, tmp_path)
    named = {"t5": "T5ForConditionalGeneration", "classifier": "BertForSequenceClassification"}
    with pytest.raises(hlora.UnsupportedModelError, match=named[kind]):
        hlora.attach(trainer, part)
