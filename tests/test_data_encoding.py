"""The beginning-of-text token, and text and tokens that a tokenizer or a model cannot take."""

import json
import math
import time

import pytest
import torch
from tokenizers.processors import TemplateProcessing

import hlora
from hlora.cli import main as cli
from hlora.data.answers import answer_rows, encode_pair
from hlora.data.encode import render_chat
from hlora.data.source import Source
from hlora.data.tasks import load_task
from hlora.data.text import blocks
from hlora.run.evaluate import score_task, score_text, summarize
from hlora.run.models import load
from tests.test_evaluate import lora
from tests.tiny import questions, tokenizer, write_model, write_rows, write_text

BOS, EOS = 1, 2


def with_bos():
    """A tokenizer that begins every text with <s>, as Gemma's and LLaMA's do."""
    words = tokenizer()
    words.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return words


@pytest.fixture(scope="module")
def model_with_bos(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("bos"))
    with_bos().save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("default")
def test_items_with_bos_agree_with_lm_eval(model_with_bos, tmp_path):
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    rows = [
        *questions(16),
        {"prompt": "A line\n", "choices": ["x", "y z"], "answer": 0},
        {"prompt": "Tabs \t ", "choices": ["x", "y z"], "answer": 1},
        {"prompt": "<s>begun", "choices": ["x", "y z"], "answer": 1},
        {"prompt": "long " * 80, "choices": ["x", "y z"], "answer": 1},
    ]
    path = write_rows(tmp_path / "t.jsonl", rows)
    model, words = load(str(model_with_bos))
    assert words("a")["input_ids"][0] == BOS
    model = lora(model)
    ours = score_task(model, words, load_task(str(path)))
    task = {
        "task": "local", "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "output_type": "multiple_choice", "test_split": "test", "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=words, batch_size=4), tasks=[task],
        task_manager=TaskManager(include_defaults=False), bootstrap_iters=100,
    )  # fmt: skip
    theirs = sorted(found["samples"]["local"], key=lambda s: s["doc_id"])
    for item, sample in zip(ours.items, theirs, strict=True):
        assert item == pytest.approx([float(r[0]) for r in sample["filtered_resps"]], rel=1e-4)
    assert ours.acc == pytest.approx(found["results"]["local"]["acc,none"])
    assert ours.acc_norm == pytest.approx(found["results"]["local"]["acc_norm,none"])


def test_documents_and_blocks_begin_with_bos(tmp_path):
    words = with_bos()
    path = write_rows(tmp_path / "a.jsonl", [{"text": "abc"}, {"text": "defghijkl"}])
    found = blocks(Source.parse(str(path)), words, 6)
    abc, rest = (words(t, add_special_tokens=False)["input_ids"] for t in ("abc", "defghijkl"))
    assert found.tolist() == [
        [BOS, *abc, EOS, BOS],
        [BOS, *rest[:5]],
        [BOS, *rest[5:], EOS],
    ]
    assert blocks(Source.parse(str(path)), words, 6, limit=1).tolist() == found[:1].tolist()


def test_a_text_that_begins_with_bos_gets_no_second(tmp_path):
    words = with_bos()
    (tmp_path / "a.txt").write_text("<s>abcdefgh")
    assert blocks(Source.parse(str(tmp_path / "a.txt")), words, 8)[0, :2].tolist()[1] != BOS
    assert encode_pair(words, "<s>a", "b")[0].count(BOS) == 1


def test_tuning_keeps_bos_when_a_prompt_is_cut(tmp_path):
    words = with_bos()
    row = {"prompt": "abcdefghij", "completion": "xyz"}
    task = load_task(str(write_rows(tmp_path / "t.jsonl", [row])))
    for length in (64, 8):
        [found] = answer_rows(task, words, length).rows
        assert found["input_ids"][0] == BOS
        assert found["input_ids"].tolist().count(EOS) == 1
    assert words.decode(found["input_ids"][1:-1]) == "hijxyz"


CHAT = "{% for m in messages %}[{{m.role}}]{{m.content}}</s>{% endfor %}" \
       "{% if add_generation_prompt %}[assistant]{% endif %}"  # fmt: skip


def test_chats_are_rendered_with_the_chat_template(tmp_path):
    words = tokenizer()
    asked, said = {"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}
    rows = [{"prompt": [asked], "completion": [said]}, {"prompt": "1?", "completion": [said]}]
    task = load_task(str(write_rows(tmp_path / "t.jsonl", rows)))
    with pytest.raises(hlora.InputError, match=r"row 1.*chat template"):
        answer_rows(task, words, 64)[0]
    words.chat_template = CHAT
    for row in answer_rows(task, words, 64).rows:
        assert words.decode(row["input_ids"]) == "[user]1?</s>[assistant]2</s>"
        learned = row["input_ids"][row["labels"] != -100]
        assert words.decode(learned) == "2</s>"
    path = write_rows(tmp_path / "c.jsonl", [{"id": 1, "messages": [asked, said]}] * 9)
    text = words.decode(blocks(Source.parse(str(path)), words, 32)[0])
    assert text.startswith("[user]1?</s>[assistant]2</s>")
    words.chat_template = "{{ messages.nothing.here }}"
    with pytest.raises(hlora.InputError, match="row 1"):
        answer_rows(task, words, 64)[0]


CHATS = [
    CHAT,
    "{%- for m in messages %}\n    {{- '<|im_start|>' + m.role + '\\n' + m['content'] | trim }}\n"
    "{%- endfor %}\n\n{%- if add_generation_prompt %}\n    {{- 'assistant' }}\n{%- endif %}\n",
    "{{ bos_token }}{% if tools is not none %}{{ tools | tojson(indent=4) }}{% endif %}"
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.name is defined %}x{% endif %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('no') }}{% endif %}"
    "{% set ns.n = ns.n + 1 %}{{ m | tojson }}{{ ns.n ~ '/' ~ loop.length }}{{ loop.last }}"
    "{% if loop.first %}{% continue %}{% endif %}{{ nothing }}{% endfor %}{{ dict(a=1).a }}",
    "{% macro say(m) %}{{ m.role[:1] | upper }}: {{ m.content.strip().split()[-1] }}{% endmacro %}"
    "{% for m in messages[::-1] %}{{ say(m) }}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% endfor %}{{ strftime_now('%Y') | length }}\n",
]  # fmt: skip


@pytest.mark.parametrize("template", CHATS)
def test_chats_read_as_transformers_renders_them(template):
    from transformers.utils import chat_template_utils

    words = tokenizer()
    words.chat_template = template
    chat = [{"role": "user", "content": " a <b> é"}, {"role": "assistant", "content": "c\n"}]
    for ask in (True, False):
        chat_template_utils._compile_jinja_template.cache_clear()
        ours = render_chat(words, chat, "row 1", ask=ask)
        chat_template_utils._compile_jinja_template.cache_clear()
        assert ours == words.apply_chat_template(chat, tokenize=False, add_generation_prompt=ask)


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.system('touch ran') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ 'a' * 10**10 }}",
        "{% set ns = namespace(s='a') %}{% for i in range(99999) %}{% set ns.s = ns.s ~ ns.s %}"
        "{% endfor %}",
        "{% for i in range(10**9) %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ messages | tojson(indent=10**9) }}",
        "{{ 1 // 0 }}", "{{ x() }}", "{% if %}", "{{ messages[7].content.role }}",
    ],
)  # fmt: skip
def test_no_chat_template_runs_code_or_on(tmp_path, monkeypatch, template):
    monkeypatch.chdir(tmp_path)
    words = tokenizer()
    words.chat_template = template
    began = time.monotonic()
    with pytest.raises(hlora.InputError, match="row 1"):
        render_chat(words, [{"role": "user", "content": "a"}], "row 1")
    assert time.monotonic() - began < 10
    assert not (tmp_path / "ran").exists()


TURNS = [
    {"role": "system", "content": "be brief"}, {"role": "user", "content": "1?"},
    {"role": "assistant", "content": "2"}, {"role": "user", "content": "3?"},
    {"role": "assistant", "content": "4"}, {"role": "user", "content": "thanks"},
]  # fmt: skip
WHOLE = "[system]be brief</s>[user]1?</s>[assistant]2</s>[user]3?</s>[assistant]4</s>"


def of_messages(tmp_path, messages, template=CHAT, length=256):
    """The row of one conversation, as text and what of it is learned."""
    words = tokenizer()
    words.chat_template = template
    task = load_task(str(write_rows(tmp_path / "m.jsonl", [{"id": 7, "messages": messages}])))
    [row] = answer_rows(task, words, length).rows
    learned = [
        t if keep else -1 for t, keep in zip(row["input_ids"], row["labels"] != -100, strict=True)
    ]
    pieces = [[]]
    for token in learned:
        pieces = [*pieces, []] if token == -1 and pieces[-1] else pieces
        pieces[-1] += [token] if token != -1 else []
    return words.decode(row["input_ids"]), [words.decode(p) for p in pieces if p]


def test_every_answer_of_a_conversation_is_learned_and_nothing_else(tmp_path):
    """What follows the last answer has none to learn, and is left out."""
    assert of_messages(tmp_path, TURNS) == (WHOLE, ["2</s>", "4</s>"])
    assert of_messages(tmp_path, TURNS[1:3]) == ("[user]1?</s>[assistant]2</s>", ["2</s>"])


def test_a_long_conversation_loses_its_beginning_and_the_labels_with_it(tmp_path):
    whole, learned = of_messages(
        tmp_path, TURNS, length=len("2</s>[user]3?</s>[assistant]4</s>") - 9
    )
    assert whole == "2</s>[user]3?</s>[assistant]4</s>"
    assert learned == ["2</s>", "4</s>"]


def test_answers_that_a_template_rewrites_later_are_passed_over(tmp_path, caplog):
    """As those that drop the thoughts of earlier answers."""
    last = "{% if loop.last and m.role == 'assistant' %}<think>{% endif %}"
    template = CHAT.replace("{{m.content}}", last + "{{m.content}}")
    whole, learned = of_messages(tmp_path, TURNS, template)
    assert whole == WHOLE.replace("4</s>", "<think>4</s>")
    assert learned == ["<think>4</s>"]
    assert "only the last answer" in caplog.text


@pytest.mark.parametrize(
    "messages",
    [
        TURNS[:2], TURNS[2:3], [], "1?", None, [{"role": "user"}],
        [TURNS[1], {"role": "assistant", "content": " "}],
    ],
)  # fmt: skip
def test_messages_without_an_answer_are_refused(tmp_path, messages):
    with pytest.raises(hlora.InputError, match=r"row 1.*messages"):
        of_messages(tmp_path, messages)


@pytest.mark.parametrize("content", [None, math.nan, 3, ["2"], [{"type": "image", "url": "x"}], {}])
def test_a_message_that_is_no_text_is_refused(tmp_path, content):
    """A template would write None, nan or a list as Python does."""
    for messages in ([{"role": "user", "content": content}, *TURNS[2:3]],
                     [*TURNS[:2], {"role": "assistant", "content": content}]):  # fmt: skip
        with pytest.raises(hlora.InputError, match=r"row 1: message \d holds no text"):
            of_messages(tmp_path, messages)
        path = write_rows(tmp_path / "c.jsonl", [{"messages": messages}])
        with pytest.raises(hlora.InputError, match=r"row 1: message \d holds no text"):
            list(Source.parse(str(path)).documents())


def test_a_message_in_parts_is_their_text_and_a_call_needs_none(tmp_path):
    parts = [{"type": "text", "text": "1"}, {"type": "text", "text": "?"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    messages = [{"role": "user", "content": parts}, call, *TURNS[3:5]]
    text, _ = of_messages(tmp_path, messages)
    assert text == "[user]1?</s>[assistant]</s>[user]3?</s>[assistant]4</s>"


@pytest.mark.parametrize("first", [{"messages": [{"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"}]}, {"prompt": "a", "completion": "b"}])  # fmt: skip
def test_a_later_row_without_its_column_is_named(tmp_path, first):
    path = write_rows(tmp_path / "t.jsonl", [first, {"other": 1}])
    with pytest.raises(hlora.InputError, match="row 2"):
        load_task(str(path))


def test_other_lists_are_not_text(tmp_path):
    row = {"prompt": ["a", "b"], "completion": "c"}
    with pytest.raises(hlora.InputError, match=r"row 1.*list"):
        load_task(str(write_rows(tmp_path / "t.jsonl", [row])))


def test_true_is_not_text(tmp_path):
    row = {"prompt": "Is it?", "completion": True}
    with pytest.raises(hlora.InputError, match=r"row 1.*true or false"):
        load_task(str(write_rows(tmp_path / "t.jsonl", [row])))


@pytest.fixture
def narrow(tmp_path):
    """A model that knows fewer tokens than its tokenizer gives."""
    folder = write_model(tmp_path / "narrow")
    model, words = load(str(folder))
    model.resize_token_embeddings(258)
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


BAD = {"a lone surrogate": "a \ud800 b", "an unknown token": "a \u00ad b"}


@pytest.mark.parametrize("text", BAD)
@pytest.mark.parametrize("command", ["record", "tune", "eval"])
@pytest.mark.parametrize("more", [[], ["--dry-run"]])
def test_a_row_that_cannot_be_taken_is_named_at_the_start(
    narrow, tmp_path, monkeypatch, capsys, text, command, more
):
    if command == "eval" and more:
        return
    monkeypatch.chdir(tmp_path)
    text = BAD[text]
    write_rows(tmp_path / "a.jsonl", [{"text": "fine " * 40}, {"text": text}])
    write_rows(tmp_path / "t.jsonl", [{"prompt": "a", "completion": c} for c in ("b", text)])
    argv = {
        "record": ["--text", "a.jsonl", "--output", "nu", "--block-size", "8"],
        "tune": ["--task", "t.jsonl", "--output", "mu"],
        "eval": ["--text", "a.jsonl", "--block-size", "8"],
    }[command]
    assert cli.main([command, "--model", str(narrow), "--device", "cpu", *argv, *more]) == 2
    assert "jsonl, row 2" in capsys.readouterr().err


def test_lengths_that_the_model_cannot_take_are_refused(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "a.txt")
    write_rows(tmp_path / "t.jsonl", [{"prompt": "p " * n, "completion": "c"} for n in (9, 200)])
    common = ["--model", str(tiny), "--dry-run", "--output", "x"]
    assert cli.main(["record", *common, "--text", "a.txt", "--block-size", "300"]) == 2
    assert "--block-size 256" in capsys.readouterr().err
    assert cli.main(["tune", *common, "--task", "t.jsonl"]) == 2
    said = capsys.readouterr().err
    assert "row 2" in said
    assert "--max-length 256" in said
    assert cli.main(["tune", *common, "--task", "t.jsonl", "--max-length", "256"]) == 0


def test_an_answer_without_tokens_is_refused(tmp_path):
    words = tokenizer()
    with pytest.raises(hlora.InputError, match="here"):
        encode_pair(words, "", "<s>", "here")


def test_a_score_that_is_no_number_is_never_right():
    task = load_task("chemistry@test", limit=3)
    nan, inf = math.nan, math.inf
    count = len(task.examples[0].choices)
    score = summarize(task, [[nan] * count, [inf] * count, [-1.0] * (count - 1) + [nan]])
    assert score.acc == score.acc_norm == 0
    assert math.isnan(score.nll)


def test_a_loss_too_large_for_a_float_s_e_to_the_x_is_infinite():
    class Sure(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids):
            logits = torch.full((*input_ids.shape, 4), -1e4)
            logits[..., 0] = 0
            return type("Output", (), {"logits": logits})

    score = score_text(Sure(), torch.ones(2, 4, dtype=torch.long))
    assert score.perplexity == math.inf


def test_two_tasks_of_one_file_name_are_both_scored(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "test.jsonl", questions(4))
        write_text(tmp_path / name / "wiki.txt")
    both = ["a/test.jsonl", "b/test.jsonl"]
    argv = ["eval", "--model", str(tiny), "--json", "s.json", "--task", *both]
    assert cli.main(argv) == 0
    assert list(json.loads((tmp_path / "s.json").read_text())["base"]["task"]) == both
    assert cli.main([*argv[:3], "--task", both[0], both[0]]) == 2
    assert "twice" in capsys.readouterr().err
    assert cli.main([*argv[:3], "--text", "a/wiki.txt", "b/wiki.txt", "--block-size", "8"]) == 2
    assert "NAME=WHERE" in capsys.readouterr().err
