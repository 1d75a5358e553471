"""Scores against torch, by hand, and against lm-evaluation-harness item by item."""

import math

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import Gemma2Config, Gemma2ForCausalLM

from hlora.data.tasks import Example, Task, load_task
from hlora.errors import InputError
from hlora.run import basepass
from hlora.run.evaluate import (
    Forgetting,
    TextScore,
    figures_of,
    forgetting,
    pooled_forgetting,
    score_task,
    score_text,
    summarize,
)
from hlora.run.models import load
from hlora.run.scoring import evaluate, prepare
from hlora.run.settings import EvalSettings
from tests.conftest import base_model, lora_model, perturb
from tests.tiny import questions, tokenizer, write_model, write_rows, write_text


def test_text_loss_is_the_model_s_own_on_shifted_labels():
    model, rows = base_model(), torch.randint(3, 60, (5, 9))
    score = score_text(model, rows, batch_size=2)
    with torch.no_grad():
        losses = [float(model(input_ids=r[None], labels=r[None]).loss) for r in rows]
    assert score.loss == pytest.approx(sum(losses) / 5, rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(score.loss))
    assert score.tokens == 5 * 8
    assert score.loss_se == pytest.approx(float(torch.tensor(losses).std()) / 5**0.5, rel=1e-3)
    assert score.blocks == pytest.approx(losses, rel=1e-5)
    assert "blocks" not in figures_of(score)


def test_divergence_from_the_base_is_torch_s():
    model, rows = lora_model(), torch.randint(3, 60, (3, 9))
    perturb(model)
    score = score_text(model, rows, batch_size=2, divergence=True)
    with torch.no_grad():
        after = model(input_ids=rows[:, :-1]).logits.log_softmax(-1)
        with model.disable_adapter():
            before = model(input_ids=rows[:, :-1]).logits.log_softmax(-1)
    kl = F.kl_div(after, before, log_target=True, reduction="none").sum(-1).mean(-1)
    assert score.divergences == pytest.approx(kl.tolist(), rel=1e-4)
    assert score.divergence.nats == pytest.approx(float(kl.mean()), rel=1e-4)
    assert score.loss == score_text(model, rows).loss
    assert score_text(model, rows).divergence is None


def test_a_kept_base_pass_gives_the_same_divergences(tmp_path):
    model, rows = lora_model(), torch.randint(3, 60, (5, 9))
    perturb(model)
    wanted = score_text(model, rows, batch_size=2, divergence=True)
    with basepass.listening(base_model()) as reads:
        score_text(base_model(), rows, batch_size=2)
    assert reads.batches == []  # it listened to another model
    with model.disable_adapter(), basepass.listening(model.get_base_model()) as reads:
        score_text(model, rows, batch_size=2)
    reads.save(tmp_path / "kept")
    before = basepass.logits(model, tmp_path / "kept")
    found = score_text(model, rows, batch_size=2, divergence=True, before=before)
    assert found.divergences == wanted.divergences
    assert next(before, None) is None
    assert basepass.logits(model, tmp_path / "none") is None


def test_no_base_pass_is_kept_where_the_logits_are_not_the_heads(tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma2Config(vocab_size=60, final_logit_softcapping=1.0, **shape, **heads)
    model = Gemma2ForCausalLM(config)
    with basepass.listening(model) as reads:
        score_text(model, torch.randint(3, 60, (2, 9)))
    reads.save(tmp_path / "kept")
    assert reads.batches is None
    assert not (tmp_path / "kept").exists()


def test_a_model_that_predicts_only_itself_is_caught():
    """Without the label shift a copier would have a loss near zero."""

    class Copier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.config = base_model().config

        def forward(self, input_ids, attention_mask=None):
            logits = 50.0 * F.one_hot(input_ids, 64).float()
            return type("Output", (), {"logits": logits})

    rows = torch.arange(3, 51).reshape(4, 12)
    assert score_text(Copier(), rows).loss > 40


def test_training_mode_is_left_as_it_was():
    model = lora_model(lora_dropout=0.5)
    model.train()
    rows = torch.randint(3, 60, (2, 8))
    assert score_text(model, rows).loss == score_text(model, rows).loss
    assert model.training


def scored(*losses):
    return TextScore(sum(losses) / len(losses), 0.0, 1.0, 8, list(losses))


def test_forgetting_is_after_minus_before_with_a_paired_error():
    lost = forgetting(scored(1.0, 3.0), scored(1.5, 3.7))
    assert lost == Forgetting(pytest.approx(0.6), pytest.approx(0.1))
    both = pooled_forgetting([(scored(1.0), scored(1.5)), (scored(3.0), scored(3.7))])
    assert both == lost


def test_forgetting_needs_the_same_blocks():
    with pytest.raises(ValueError, match="zip"):
        forgetting(scored(1.0, 2.0), scored(1.0))


def test_accuracies_and_nll_by_hand():
    examples = [
        Example("p", (" aa", " b"), 0, ("aa", "b")),
        Example("p", (" aa", " b"), 1, ("aa", "b")),
    ]
    score = summarize(Task("t", None, examples), [[-2.0, -1.5], [-4.0, -1.0]])
    assert score.acc == 0.5
    assert score.acc_norm == 1.0
    assert score.nll == pytest.approx(1.5)
    assert score.acc_se == pytest.approx(0.5)
    assert "items" not in figures_of(score)


def test_rows_with_one_completion_have_no_accuracy():
    examples = [Example("p", (" a",), 0, (" a",))] * 2
    score = summarize(Task("t", None, examples), [[-2.0], [-3.0]])
    assert math.isnan(score.acc)
    assert score.nll == 2.5


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
def test_items_do_not_depend_on_the_batch(tmp_path, architecture):
    model, words = load(str(write_model(tmp_path / "m", architecture)))
    task = load_task(str(write_rows(tmp_path / "t.jsonl", questions())))
    one, many = (score_task(model, words, task, batch_size=b).items for b in (1, 16))
    for a, b in zip(one, many, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


ITEMS = {
    "questions": (questions(), "{{prompt}}", "choices", "answer"),
    "lengths": (
        [
            {"prompt": f"Tell {i}.  ", "choices": ["a", "quite a long one", "x y"], "answer": i % 3}
            for i in range(12)
        ],
        "{{prompt}}", "choices", "answer",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ITEMS)
def test_accuracy_agrees_with_lm_eval_item_by_item(tiny, tmp_path, name):
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows, *_ = ITEMS[name]
    path = write_rows(tmp_path / "t.jsonl", rows)
    model, words = load(str(tiny))
    perturbed = lora(model)
    ours = score_task(perturbed, words, load_task(str(path)))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    found = simple_evaluate(
        model=HFLM(pretrained=perturbed, tokenizer=words, batch_size=4),
        tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=100,
    )  # fmt: skip
    theirs = sorted(found["samples"]["local"], key=lambda s: s["doc_id"])
    for item, sample in zip(ours.items, theirs, strict=True):
        lls = [float(r[0]) for r in sample["filtered_resps"]]
        assert item == pytest.approx(lls, rel=1e-4)
    scores = found["results"]["local"]
    assert ours.acc == pytest.approx(scores["acc,none"])
    assert ours.acc_norm == pytest.approx(scores["acc_norm,none"])
    assert ours.acc_se == pytest.approx(scores["acc_stderr,none"], rel=1e-6)


def lora(model):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    perturb(model)
    return model


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["v_proj", "lm_head"]])
def test_an_adapter_that_moves_its_base_is_compared_with_the_base(init, targets, tmp_path):
    """PEFT takes its start out of the weights again when it is loaded."""
    write_text(tmp_path / "a.txt")
    source = str(write_model(tmp_path / "model"))
    model = load(source)[0]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=init, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    perturb(adapted)
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    settings = EvalSettings(
        model=source, adapter=str(tmp_path / "adapter"), text=[str(tmp_path / "a.txt")],
        block_size=16, text_blocks=5, batch_size=2, device="cpu", dtype="fp32",
    )  # fmt: skip
    found = evaluate(settings)["adapter"]["text"]["a"]
    rows = prepare(settings)[2]["a"][:, :-1]
    with torch.no_grad():
        before = load(source)[0](input_ids=rows).logits.log_softmax(-1)
        after = adapted(input_ids=rows).logits.log_softmax(-1)
    kl = F.kl_div(after, before, log_target=True, reduction="none").sum(-1).mean(-1)
    assert found.divergences == pytest.approx(kl.tolist(), rel=1e-4)
    assert min(kl) > 1e-4


def test_a_base_that_is_moved_and_cannot_be_kept_is_said(tmp_path):
    write_text(tmp_path / "a.txt")
    config = Gemma2Config(
        vocab_size=259, hidden_size=16, intermediate_size=16, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=1.0,
    )  # fmt: skip
    model = Gemma2ForCausalLM(config)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    config = LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights="pissa")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    settings = EvalSettings(
        model=str(tmp_path / "model"), adapter=str(tmp_path / "adapter"), block_size=16,
        text=[str(tmp_path / "a.txt")], device="cpu",
    )  # fmt: skip
    with pytest.raises(InputError, match="convert it to plain LoRA first"):
        evaluate(settings)
