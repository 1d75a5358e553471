"""Tasks as data: the hub's columns, prompts as lm-evaluation-harness has them."""

from pathlib import Path

import pytest
import torch

import hlora
from hlora.data.answers import answer_rows, encode_pair
from hlora.data.formats import FORMATS
from hlora.data.rows import Collate
from hlora.data.tasks import load_task
from hlora.data.text import block_rows
from tests.tiny import questions, tokenizer, write_rows

TASKS = Path(__file__).parents[2] / "shared" / "data" / "tasks"

ROWS = {
    "sciq": {
        "question": "What is wet?", "distractor1": "sand", "distractor2": "fire",
        "distractor3": "salt", "correct_answer": "water", "support": "Water is wet.",
    },
    "piqa": {"goal": "Boil water.", "sol1": "Heat it.", "sol2": "Cool it.", "label": 0},
    "medmcqa": {
        "question": "Which?", "opa": "a bone", "opb": "a nerve", "opc": "a vein", "opd": "skin",
        "cop": 2,
    },
    "openbookqa": {
        "question_stem": "Fire is", "choices": {"text": ["hot", "cold"], "label": ["A", "B"]},
        "answerKey": "A",
    },
    "arc_easy": {
        "question": "Ice is", "choices": {"text": ["hot", "cold"], "label": ["1", "2"]},
        "answerKey": "2",
    },
    "choices": {"prompt": "1 + 1 =", "choices": ["2", "3"], "answer": 0},
    "completion": {"prompt": "1 + 1 =", "completion": " 2"},
}  # fmt: skip


def one(tmp_path, row, **settings):
    return load_task(str(write_rows(tmp_path / "t.jsonl", [row])), **settings)


@pytest.mark.parametrize("name", ROWS)
def test_a_file_s_task_is_recognised_by_its_columns(tmp_path, name):
    task = one(tmp_path, ROWS[name])
    assert task.format.name == name
    assert task.name == "t"
    [example] = task.examples
    right = example.bare[example.answer]
    assert right in ("water", "Heat it.", "C", "hot", "cold", "2", " 2")
    assert example.prompt == example.prompt.rstrip(" ")


def test_prompts_are_those_of_the_harness(tmp_path):
    examples = {n: one(tmp_path, r).examples[0] for n, r in ROWS.items()}
    assert examples["sciq"].prompt == "Water is wet.\nQuestion: What is wet?\nAnswer:"
    assert examples["sciq"].choices == (" sand", " fire", " salt", " water")
    assert examples["piqa"].prompt == "Question: Boil water.\nAnswer:"
    assert examples["medmcqa"].prompt.endswith("A. a bone\nB. a nerve\nC. a vein\nD. skin\nAnswer:")
    assert examples["medmcqa"].choices == (" A", " B", " C", " D")
    assert examples["openbookqa"].prompt == "Fire is"
    assert examples["completion"].choices == (" 2",)


@pytest.mark.parametrize("path", sorted(TASKS.glob("*.test.jsonl")), ids=lambda p: p.name)
def test_every_real_row_is_read(path):
    task = load_task(str(path))
    assert task.format.name == path.name.split(".")[0]
    assert len(task.examples) == path.read_bytes().count(b"\n")
    assert all(0 <= e.answer < len(e.choices) for e in task.examples)


def test_the_real_tasks_are_here():
    if not TASKS.is_dir():
        pytest.skip(f"{TASKS} is not here")
    assert len(list(TASKS.glob("*.test.jsonl"))) == 5


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("medmcqa", {"cop": 4}, "'4'.*4 choices"),
        ("medmcqa", {"cop": -1}, "'-1'"),
        ("piqa", {"label": 2}, "'2'.*2 choices"),
        ("arc_easy", {"answerKey": "C"}, "'C'.*1, 2"),
        ("choices", {"answer": "x"}, "'x'"),
        ("choices", {"choices": "yes"}, "'choices'"),
        ("choices", {"choices": ["", "b"]}, "empty"),
        ("openbookqa", {"choices": ["hot"]}, r"'choices\.text'"),
    ],
)
def test_a_bad_row_is_named(tmp_path, name, change, message):
    with pytest.raises(hlora.InputError, match=f"row 2: .*{message}"):
        load_task(str(write_rows(tmp_path / "t.jsonl", [ROWS[name], {**ROWS[name], **change}])))


def test_wrong_places_names_and_columns_are_one_sentence(tmp_path):
    with pytest.raises(hlora.InputError, match=r"sciqq.*sciq"):
        load_task("sciqq")
    with pytest.raises(hlora.InputError, match=r"nowhere\.jsonl"):
        load_task(str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(hlora.InputError, match="folder"):
        load_task(str(tmp_path))
    with pytest.raises(hlora.InputError, match="no rows"):
        load_task(str(write_rows(tmp_path / "t.jsonl", [])))
    with pytest.raises(hlora.InputError, match="a, b"):
        one(tmp_path, {"a": 1, "b": 2})
    with pytest.raises(hlora.InputError, match="choices"):
        one(tmp_path, ROWS["choices"], format="choice")


def test_a_task_can_be_defined_in_a_file(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "prompt: 'Q: {{q}}'\nchoices: ['{{right}}', '{{wrong}}']\nanswer: 0\n"
    )
    row = {"q": "2 + 2?", "right": "4", "wrong": "5"}
    task = one(tmp_path, row, format=str(tmp_path / "mine.yaml"))
    assert (task.examples[0].prompt, task.examples[0].choices) == ("Q: 2 + 2?", (" 4", " 5"))
    (tmp_path / "mine.yaml").write_text("promt: x\n")
    with pytest.raises(hlora.InputError, match="'promt'"):
        one(tmp_path, row, format=str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("prompt: '{{nothing}}'\nchoices: [a, b]\nanswer: 0\n")
    with pytest.raises(hlora.InputError, match=r"'nothing'.*q, right"):
        one(tmp_path, row, format=str(tmp_path / "mine.yaml"))
    (tmp_path / "mine.yaml").write_text("prompt: '{{'\nchoices: [a, b]\nanswer: 0\n")
    with pytest.raises(hlora.InputError, match=r"'\{\{'"):
        one(tmp_path, row, format=str(tmp_path / "mine.yaml"))


def test_a_template_cannot_reach_into_python(tmp_path):
    (tmp_path / "evil.yaml").write_text(
        "prompt: '{{ q.__class__.__mro__ }}'\nchoices: [a, b]\nanswer: 0\n"
    )
    with pytest.raises(hlora.InputError):
        one(tmp_path, {"q": "x"}, format=str(tmp_path / "evil.yaml"))


def test_a_hub_task_goes_through_the_hub_s_loader(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    folder = tmp_path / "piqa"
    folder.mkdir()
    write_rows(folder / "train.jsonl", [ROWS["piqa"]] * 3)
    write_rows(folder / "validation.jsonl", [ROWS["piqa"]] * 2)
    moved = type(FORMATS["piqa"])(**{**vars(FORMATS["piqa"]), "hub": str(folder)})
    monkeypatch.setitem(FORMATS, "piqa", moved)
    assert len(load_task("piqa").examples) == 3
    assert len(load_task("piqa", split="test").examples) == 2
    assert len(load_task("piqa", limit=1).examples) == 1


def plain(rows):
    return [{k: v.tolist() for k, v in rows[i].items()} for i in range(len(rows))]


def test_loss_is_on_the_answer_only(tmp_path):
    words = tokenizer()
    task = one(tmp_path, ROWS["completion"])
    [row] = answer_rows(task, words, 64).rows
    prompt, answer = words("1 + 1 =")["input_ids"], words(" 2")["input_ids"]
    assert row["input_ids"].tolist() == [*prompt, *answer, words.eos_token_id]
    assert row["labels"].tolist() == [-100] * len(prompt) + [*answer, words.eos_token_id]


def test_a_long_prompt_loses_its_beginning(tmp_path):
    words = tokenizer()
    task = one(tmp_path, {"prompt": "abcdefghij", "completion": "xyz"})
    [row] = answer_rows(task, words, 8).rows
    assert words.decode(row["input_ids"][:-1]) == "ghijxyz"
    assert row["labels"][:4].tolist() == [-100] * 4


def test_padding_is_neither_seen_nor_learned():
    first = {"input_ids": torch.tensor([5, 6, 7]), "labels": torch.tensor([-100, 6, 7])}
    batch = Collate(0)([first, {"input_ids": torch.tensor([8]), "labels": torch.tensor([8])}])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]


def test_text_and_tasks_mix_as_one_data_set(tmp_path):
    """Replay: a ConcatDataset of both through one collator."""
    words = tokenizer()
    blocks = block_rows(torch.arange(3, 27).reshape(4, 6))
    answers = answer_rows(one(tmp_path, ROWS["completion"]), words, 64)
    mixed = torch.utils.data.ConcatDataset([blocks, answers])
    [batch] = torch.utils.data.DataLoader(mixed, batch_size=5, collate_fn=Collate(0))
    assert {t.shape for t in batch.values()} == {(5, len(answers[0]["input_ids"]))}
    assert batch["labels"][:4, :6].tolist() == batch["input_ids"][:4, :6].tolist()
    assert batch["attention_mask"].sum(1).tolist() == [6, 6, 6, 6, len(answers[0]["input_ids"])]
    assert (batch["labels"][:4, 6:] == -100).all()


def test_spaces_at_the_end_of_a_prompt_belong_to_the_answer():
    words = tokenizer()
    head, tail = encode_pair(words, "a b  ", "c")
    assert (words.decode(head), words.decode(tail)) == ("a b", "  c")
    assert torch.tensor(head + tail).shape == (6,)


def test_the_built_in_formats_are_consistent():
    for name, format in FORMATS.items():
        assert format.name == name
        assert format.columns
    assert len(questions()) == 24


def test_of_a_hub_data_set_no_more_rows_are_read_than_asked_for(monkeypatch):
    datasets = pytest.importorskip("datasets")
    read = []

    def endless(name, config, *, split, streaming, revision):
        assert (name, config, split, streaming) == ("me/chats", "small", "train", True)
        while True:
            read.append(1)
            yield {"messages": [{"role": r, "content": "x"} for r in ("user", "assistant")]}

    monkeypatch.setattr(datasets, "load_dataset", endless)
    task = load_task("me/chats:small", limit=5)
    assert (task.format.name, len(task.examples), len(read)) == ("messages", 5, 5)
