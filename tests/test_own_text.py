"""Text that the model writes itself, and a gathering that needs no other."""

import shutil

import pytest
import torch
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

import hlora
from hlora.cli import main as cli
from hlora.data.encode import separator
from hlora.errors import InputError
from hlora.run import dry_run
from hlora.run import own_text as writing
from hlora.run.models import load
from hlora.run.own_text import own_text
from hlora.run.phases import GeneralPhase, tune
from hlora.run.settings import RecordSettings, TuneSettings
from tests.tiny import tokenizer, write_rows, write_text

CHAT = "{% for m in messages %}the user {{ m['content'] }} end{% endfor %}"
MARKED = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"


def begins_text(tokenizer):
    """Made to put its beginning-of-text token before any text."""
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    return tokenizer


def test_it_begins_as_text_and_as_a_chat(tiny):
    model, tokenizer = load(str(tiny))
    begins_text(tokenizer).chat_template = CHAT
    rows = own_text(model, tokenizer, 5, 24)
    assert rows.shape == (5, 24)
    assert rows.dtype == torch.int64
    begins = tokenizer("the user", add_special_tokens=False)["input_ids"]
    assert 4 < len(begins) <= 12
    assert (rows[:3, 0] == tokenizer.bos_token_id).all()
    assert (rows[3:, : len(begins)] == torch.tensor(begins)).all()
    assert len({tuple(r) for r in rows.tolist()}) == 5


def test_a_chat_whose_beginning_fills_a_row_is_not_written(tiny):
    model, tokenizer = load(str(tiny))
    begins_text(tokenizer).chat_template = CHAT
    rows = own_text(model, tokenizer, 6, 9)  # "the user" alone is longer than half of that
    assert (rows[:, 0] == tokenizer.bos_token_id).all()
    assert len({tuple(r) for r in rows.tolist()}) == 6


def test_a_chat_that_begins_as_any_text_gets_its_half(tiny):
    model, tokenizer = load(str(tiny))
    start = tokenizer.bos_token or tokenizer.eos_token
    tokenizer.chat_template = start + CHAT.replace("the user ", "")
    assert own_text(model, tokenizer, 5, 12).shape == (5, 12)


@pytest.mark.parametrize(
    ("template", "more", "expected"),
    [
        (None, [], "<s>"),
        (CHAT, ["<|endoftext|>"], "<s>"),  # a turn is marked by words
        ("<s>" + CHAT, ["<|endoftext|>"], "<s>"),  # once, before all
        (CHAT.replace("the user", "<s>"), ["<|endoftext|>"], "</s>"),
        (MARKED, ["<|endoftext|>"], "<|endoftext|>"),
        (MARKED, ["<|end_of_text|>"], "<|end_of_text|>"),
        (MARKED, [], "<s>"),  # it has no other
    ],
)
def test_documents_are_written_behind_what_is_no_mark_of_a_turn(template, more, expected):
    words = tokenizer()
    words.add_tokens([AddedToken(m, special=True) for m in more])
    words.chat_template = template
    assert separator(words) == words.convert_tokens_to_ids(expected)


def test_what_stands_before_any_text_separates_though_it_marks_turns(tiny):
    """As <s> does in Llama 2's chats."""
    words = begins_text(load(str(tiny))[1])
    words.chat_template = CHAT.replace("the user", words.bos_token)
    assert separator(words) == words.bos_token_id


def test_a_template_of_one_turn_is_looked_at_too():
    words = tokenizer()
    words.add_tokens([AddedToken("<|endoftext|>", special=True)])
    words.chat_template = "{% if messages | length > 1 %}{{ raise_exception('one') }}{% endif %}"
    words.chat_template += MARKED
    assert separator(words) == words.convert_tokens_to_ids("<|endoftext|>")


@pytest.mark.parametrize("refused", ["{{ raise_exception('never') }}", "{% if %}"])
def test_a_template_that_refuses_a_turn_leaves_documents(refused, tiny, caplog):
    model, tokenizer = load(str(tiny))
    tokenizer.chat_template = refused
    rows = own_text(model, tokenizer, 4, 9)
    assert rows.shape == (4, 9)
    assert "The model writes documents only." in caplog.text


@pytest.mark.parametrize("kind", ["blend", "fisher"])
def test_gradients_that_are_all_zero_are_refused(kind, tiny, tmp_path, capsys):
    model, tokenizer = load(str(tiny))
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    argv = ["record", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "base")]
    argv += ["--kind", kind, "--sequences", "4", "--block-size", "16"]
    argv += ["--text", str(write_text(tmp_path / "a.txt", count=3000))]
    assert cli.main(argv) == 2
    assert "All gradients are zero" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize("chat", [True, False])
def test_tokens_that_the_model_does_not_know_are_named(chat, tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path / "model")
    _, tokenizer = load(str(tiny))
    tokenizer.add_tokens([AddedToken("<turn>", special=True)])
    if chat:
        tokenizer.chat_template = CHAT.replace("the user", "<turn>")
    else:
        tokenizer.bos_token = "<turn>"
    tokenizer.save_pretrained(tmp_path / "model")
    record = ["record", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "base")]
    for more in ([], ["--dry-run"]):
        assert cli.main([*record, "--sequences", "4", *more]) == 2
        assert "the two do not belong together" in capsys.readouterr().err
    assert not (tmp_path / "base").exists()


def test_a_tokenizer_without_a_first_or_last_token_is_refused(tiny):
    model, tokenizer = load(str(tiny))
    tokenizer.bos_token = tokenizer.eos_token = None
    for what in (own_text, writing.trial):
        with pytest.raises(InputError, match="set bos_token or eos_token"):
            what(model, tokenizer, 4, 9)


def test_without_a_beginning_of_text_token_the_end_separates():
    words = tokenizer()
    words.bos_token = None
    assert separator(words) == words.eos_token_id


@pytest.mark.parametrize("leads", [True, False])
def test_rows_begin_as_the_tokenizer_begins_any_text(leads, tiny):
    """The mark that documents are written behind is before a row only where it is before any text:
    after another first token the model is another one. Here it always writes the same."""
    model, tokenizer = load(str(tiny))
    if leads:
        begins_text(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.mul_(1e4)
    [row] = own_text(model, tokenizer, 1, 10)
    if leads:
        assert row[0] == tokenizer.bos_token_id
    else:
        row = torch.cat([torch.tensor([tokenizer.bos_token_id]), row])
    with torch.no_grad():
        said = model(input_ids=row[None]).logits[0].argmax(-1)
    assert torch.equal(row[1:], said[:-1])
    assert len(row) == (10 if leads else 11)


def test_the_seed_decides_and_the_model_stays_as_it_was(tiny):
    model, tokenizer = load(str(tiny))
    model.train()
    one, same, other = (own_text(model, tokenizer, 4, 9, seed=s) for s in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert model.training


def test_its_tokens_come_as_often_as_the_model_says(tiny):
    model, tokenizer = load(str(tiny))
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
    rows = own_text(model, tokenizer, 4000, 1, batch_size=1000)
    start = torch.tensor([[tokenizer.bos_token_id]])
    with torch.no_grad():
        expected = model(input_ids=start).logits[0, -1].softmax(-1)
    found = torch.bincount(rows[:, 0], minlength=len(expected)) / len(rows)
    assert (found - expected).abs().max() < 0.04  # five standard errors of a share of a half


@pytest.mark.parametrize("kind", ["kronecker", "sketch", "blend", None])
def test_from_no_text_to_a_held_adapter(kind, tiny, tmp_path, capsys):
    common = ["--model", str(tiny), "--batch-size", "4", "--device", "cpu"]
    nu = str(tmp_path / "nu")
    argv = ["record", *common, "--sequences", "6", "--block-size", "16", "--output", nu]
    assert cli.main([*argv, *(["--kind", kind] if kind else [])]) == 0
    assert "6 that the model writes" in capsys.readouterr().out
    assert hlora.load(nu).info["summary"]["own_text"] == 6
    assert hlora.load(nu).info["kind"] == (kind or "blend")
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "the cat", "completion": " sat on a mat"}\n' * 8)
    argv = ["tune", *common, "--importance", nu, "--task", str(task), "--max-steps", "4"]
    argv += ["--lora-rank", "3", "--output", str(tmp_path / "mu")]
    if kind != "kronecker":
        argv += ["--forget-at-most", "0.01"]
    assert cli.main(argv) == 0
    assert cli.main(["inspect", nu]) == 0


def planned(argv, monkeypatch, capsys):
    """What --dry-run says where a batch takes 10 s, and a row of the model's own text 3 s."""
    seconds = {dry_run.Work: 10.0, dry_run.Beside: 3.0}

    def timed(of, args):
        of.once()
        return seconds[type(of)]

    monkeypatch.setattr(dry_run, "_timed", timed)
    assert cli.main([*argv, "--dry-run"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "own", "time"),
    [("blend", 86, "0:04:58"), ("kronecker", 86, "0:04:58"), ("fisher", 0, "0:00:40")],
)
def test_a_gathering_is_planned_as_what_it_is(kind, own, time, tiny, tmp_path, monkeypatch, capsys):
    """Each row once, in four batches, and the text that the model writes before."""
    argv = ["record", "--model", str(tiny), "--kind", kind, "--sequences", "70", "--output"]
    argv += [str(tmp_path / "nu"), "--device", "cpu", "--block-size", "16"]
    if kind == "fisher":
        argv += ["--text", str(write_text(tmp_path / "a.txt", count=3000))]
    said = planned(argv, monkeypatch, capsys)
    assert "gathering   4 batches of 20 rows, once" in said
    assert "not trained" in said
    assert "steps" not in said
    assert ("own text" in said) == (own > 0)
    assert not own or f"own text    {own} in all, 3.00 s each" in said
    assert f"time        about {time} " in said


@pytest.mark.parametrize("what", ["--kl", "--replay"])
def test_a_plan_of_tuning_counts_the_text_that_is_written(
    what, tiny, tmp_path, monkeypatch, capsys
):
    task = write_rows(tmp_path / "task.jsonl", [{"prompt": "a", "completion": " b"}] * 20)
    argv = ["tune", "--model", str(tiny), "--task", str(task), "--output", str(tmp_path / "mu")]
    argv += [what, "own", "--device", "cpu", "--max-steps", "2"]
    written = 128 if what == "--kl" else 5
    assert f"own text    {written} in all" in planned(argv, monkeypatch, capsys)


def test_a_plan_counts_what_a_budget_measures_and_only_plan_takes_it(
    tiny, tmp_path, monkeypatch, capsys
):
    nu, text = str(tmp_path / "nu"), str(write_text(tmp_path / "a.txt", count=3000))
    argv = ["record", "--model", str(tiny), "--sequences", "8", "--block-size", "16"]
    assert cli.main([*argv, "--output", nu]) == 0
    rows = write_rows(tmp_path / "task.jsonl", [{"prompt": "a", "completion": " b"}] * 20)
    argv = ["tune", "--model", str(tiny), "--task", str(rows), "--output", str(tmp_path / "mu")]
    argv += ["--device", "cpu", "--max-steps", "2", "--batch-size", "5", "--importance", nu]
    assert "last check" not in planned(argv, monkeypatch, capsys)
    said = planned([*argv, "--forget-at-most", "0.1", "--text", text], monkeypatch, capsys)
    assert "last check  5 in all, 3.00 s each" in said  # 24 rows, in batches of 5
    settings = TuneSettings(
        model="nowhere", task=str(rows), output=str(tmp_path / "mu"), dry_run=True
    )  # refused before the model is looked for
    with pytest.raises(InputError, match=r"DomainPhase\(settings\).plan\(\)"):
        tune(settings)
    assert not (tmp_path / "mu").exists()


def test_one_row_in_a_batch_is_tried_on_several(tiny, tmp_path):
    phase = GeneralPhase(
        RecordSettings(
            model=str(tiny), output=str(tmp_path / "nu"), sequences=9, block_size=16, batch_size=1
        )
    )
    work, _ = phase._work()
    assert (work.times, work.does) == (9, 4)


@pytest.mark.parametrize("cached", [True, False])
def test_a_little_is_written_to_know_how_long_it_takes(cached, tiny, monkeypatch):
    model, tokenizer = load(str(tiny))
    if not cached:
        monkeypatch.setattr(writing, "_cache_of", lambda model: {})
    read = []
    model.register_forward_pre_hook(
        lambda module, args, given: read.append(given["input_ids"].shape), with_kwargs=True
    )
    once, does = writing.trial(model, tokenizer, 40, 33)
    once()
    assert does == 40 * 8 / 32  # of 40 rows, a quarter of their tokens
    assert read == [(40, 1 if cached else n) for n in range(16, 24)]


def test_with_text_it_is_half_and_half(tiny, tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text("the cat sat on a mat and saw the rat " * 200)
    argv = ["record", "--model", str(tiny), "--kind", "blend", "--sequences", "8", "--text"]
    argv += [str(text), "--block-size", "16", "--output", str(tmp_path / "nu"), "--device", "cpu"]
    assert cli.main(argv) == 0
    assert (
        hlora.load(tmp_path / "nu").info["summary"] | {"own_text": 4, "sequences": 8}
        == (hlora.load(tmp_path / "nu").info["summary"])
    )


def test_one_row_of_its_own_is_kept_too(tiny, tmp_path):
    text = write_text(tmp_path / "a.txt")
    argv = ["record", "--model", str(tiny), "--sequences", "3", "--text", str(text), "--output"]
    assert cli.main([*argv, str(tmp_path / "nu"), "--block-size", "16", "--device", "cpu"]) == 0
    importance = hlora.load(tmp_path / "nu").importance
    assert importance.written.shape == (1, 16)
    assert len(importance.watched) > 1


def test_text_is_kept_for_looks_only_where_asked_to(tiny, tmp_path, capsys):
    text = write_text(tmp_path / "a.txt")
    argv = ["record", "--model", str(tiny), "--sequences", "8", "--block-size", "16"]
    for given, kept in ((["--text", str(text)], 4), (["--text", str(text), "--keep-text"], 8)):
        nu = tmp_path / f"nu{kept}"
        assert cli.main([*argv, *given, "--output", str(nu), "--device", "cpu"]) == 0
        assert hlora.load(nu).importance.written.shape == (kept, 16)
    rows = hlora.load(tmp_path / "nu8").importance.written
    own = hlora.load(tmp_path / "nu4").importance.written
    alike = (rows[:, None] == own[None]).all(-1).any(-1)
    assert alike.sum() == 4  # the others are of the text
    for more in (["--keep-text"], ["--keep-text", "--text", str(text), "--kind", "fisher"]):
        assert cli.main([*argv, *more, "--output", str(tmp_path / "no")]) == 2
        error = capsys.readouterr().err
        assert "--keep-text keeps rows of --text for looks, but" in error
        assert error.count("\n") == 1


def test_options_of_a_gathering_are_refused_in_a_recording(tiny, tmp_path, capsys):
    text = write_text(tmp_path / "a.txt")
    argv = ["record", "--model", str(tiny), "--text", str(text), "--output", str(tmp_path / "nu")]
    assert cli.main([*argv, "--kind", "dense", "--sequences", "8"]) == 2
    assert "--sequences" in capsys.readouterr().err


def test_a_recording_without_text_is_refused(tiny, tmp_path, capsys):
    argv = ["record", "--model", str(tiny), "--kind", "dense", "--output", str(tmp_path / "nu")]
    assert cli.main(argv) == 2
    assert "--text" in capsys.readouterr().err
