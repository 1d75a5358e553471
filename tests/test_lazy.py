"""Nothing is tokenized that is not read, and what is read is what it always was."""

import pytest
import torch
from safetensors.torch import load_file

from hlora.cli import main as cli
from hlora.core import store
from hlora.data import answers, text
from hlora.data.rows import FIRST, Lazy, Rows
from hlora.run import phases
from tests.tiny import questions, write_rows


@pytest.fixture
def place(tiny, tmp_path, monkeypatch):
    """Commands on 1,000 questions, and how often each was tokenized."""

    class Place:
        folder, seen = tmp_path, []

        def tune(self, output, *more):
            self.seen.clear()
            return cli.main(
                ["tune", "--model", str(tiny), "--task", str(tmp_path / "q.jsonl"), "--output",
                 str(tmp_path / output), "--batch-size", "4", "--device", "cpu", *more]
            )  # fmt: skip

        def record(self, output, *more):
            self.seen.clear()
            return cli.main(
                ["record", "--model", str(tiny), "--kind", "factored", "--text",
                 *(str(p) for p in self.texts),
                 "--output", str(tmp_path / output), "--batch-size", "4", "--block-size", "32",
                 "--device", "cpu", *more]
            )  # fmt: skip

    place = Place()
    place.texts = [tmp_path / "a.txt"]
    write_rows(
        tmp_path / "q.jsonl",
        [{**q, "prompt": f"{i}: {q['prompt']}"} for i, q in enumerate(questions(1000))],
    )
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 40_000)
    pair, encode = answers.encode_pair, text.encode

    def counted(tokenizer, prompt, *rest):
        place.seen.append(prompt)
        return pair(tokenizer, prompt, *rest)

    def measured(tokenizer, piece, *rest, **named):
        place.seen.append(len(piece))
        return encode(tokenizer, piece, *rest, **named)

    monkeypatch.setattr(answers, "encode_pair", counted)
    monkeypatch.setattr(text, "encode", measured)
    return place


def test_a_task_is_tokenized_as_far_as_the_steps_go(place, monkeypatch, capsys):
    assert place.tune("few", "--max-steps", "3") == 0
    assert len(place.seen) == len(set(place.seen)) <= FIRST + 12 + 4  # the loader is a batch ahead
    assert "about" in capsys.readouterr().out
    monkeypatch.setattr(phases, "rows_needed", lambda settings: None)
    assert place.tune("all", "--max-steps", "3") == 0
    assert len(place.seen) == 1000
    assert "about" not in capsys.readouterr().out
    few, every = (load_file(place.folder / n / "adapter_model.safetensors") for n in ("few", "all"))
    assert all(torch.equal(few[k], every[k]) for k in every)


def test_epochs_read_all(place, capsys):
    assert place.tune("mu", "--epochs", "0.01") == 0
    assert len(place.seen) == 1000


def test_what_is_drawn_is_checked_before_the_first_step(place, monkeypatch, capsys):
    rows = questions(1000)
    for row in rows[FIRST:]:
        row["prompt"] = "x" * 300  # more than the model takes
    write_rows(place.folder / "q.jsonl", rows)
    monkeypatch.setattr(phases.Trained, "__init__", lambda *a: pytest.fail("trained"))
    assert place.tune("mu", "--max-steps", "2", "--save-steps", "1") == 2
    assert "--max-length" in capsys.readouterr().err
    assert not list((place.folder / "mu").glob("checkpoints/checkpoint-*"))


@pytest.mark.parametrize("kinds", [1, 2])
def test_text_is_tokenized_as_far_as_the_steps_go(place, kinds, capsys):
    if kinds == 2:
        place.texts.append(place.folder / "b.txt")
        place.texts[1].write_text("one two three four\n" * 40_000)
    assert place.record("nu", "--max-steps", "3") == 0
    assert sum(place.seen) < kinds * 140_000
    assert set(store.read_info(place.folder / "nu")["text"].values()) == {12}
    assert place.record("whole", "--epochs", "0.001") == 0
    assert sum(place.seen) > kinds * 700_000


def test_rows_that_are_made_when_read():
    made = []

    def make(index):
        made.append(index)
        return {"input_ids": torch.arange(index), "labels": torch.arange(index)}

    rows = Rows(Lazy(5, make), lambda: "source")
    assert len(rows) == 5
    assert not made
    assert len(rows[3]["input_ids"]) == len(rows.rows[-2]["input_ids"]) == 3
    assert made == [3]
    assert rows.tokens == "about 15 tokens"
    both = rows.plus(Rows([make(7)]))
    assert [len(both[i]["input_ids"]) for i in (3, 5)] == [3, 7]
    assert made == [3, 7]
    with pytest.raises(IndexError):
        rows.rows[5]
    assert rows.content() == ["source", [[list(range(i))] * 2 for i in range(5)]]
    assert rows.tokens == "10 tokens"
