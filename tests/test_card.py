"""The card in each folder: what it says, in what form, and what it does not tell."""

import json
import re

import pytest
import yaml

from hlora.cli import main as cli
from hlora.core import card, store
from tests.tiny import questions, write_rows, write_text

SECRET = "hf_thisIsASecret"


def parts(folder):
    """Front matter and text."""
    _, front, text = (folder / "README.md").read_text("utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory):
    """Importance, an adapter on a budget of it, the same rewound, a recording, plain LoRA."""
    folder = tmp_path_factory.mktemp("cards") / "Home of Jane"
    folder.mkdir()
    text = str(write_text(folder / "a.txt"))
    task = str(write_rows(folder / "q|<b>`x`.jsonl", questions()))
    common = ["--model", str(tiny), "--device", "cpu", "--batch-size", "4"]
    held = ["--importance", str(folder / "base"), "--forget-at-most"]
    train = ["--max-steps", "4", "--logging-steps", "2", "--training.hub_token", SECRET]
    for command, output, *more in (
        ["record", "base", "--kind", "blend", "--sequences", "6", "--block-size", "16"],
        ["record", "nu", "--kind", "factored", "--text", text, "--block-size", "32", *train],
        ["tune", "mu", *held, "1e-6", "--text", text, "--task", task, *train, "--seed", "3"],
        ["tune", "lora", "--task", task, *train, "--kl", text],
        ["rewind", "back", "--adapter", str(folder / "lora"), "--forget-at-most", "1e-6",
         "--text", text, "--task", task, "--block-size", "16"],
        ["convert", "ones", "--to", "ones"],
    ):  # fmt: skip
        of = [str(folder / "nu")] if command == "convert" else common
        assert cli.main([command, *of, "--output", str(folder / output), *more]) == 0
    return folder


def test_an_adapter_s_card_says_what_it_learned_was_held_by_and_forgot(made):
    front, text = parts(made / "mu")
    assert front["library_name"] == "peft"
    assert {"hlora", "lora"} <= set(front["tags"])
    assert "base_model" not in front  # a local folder is none of the hub
    assert "24 rows" in text
    assert "4 optimizer steps" in text
    assert "budget of 1e-06" in text
    assert "Blend importance, `base`" in text
    assert re.search(r"Predicted \S+, measured \S+ ± \S+; scaled by 0\.", text)
    assert "on `a.txt`" in text
    assert "- learning rate: `0.0008`" in text
    assert "- seed: `3`" in text
    assert "epochs" not in text
    assert "PeftModel.from_pretrained" in text
    assert f"peft `{card.versions()['peft']}`" in text


def test_plain_lora_and_a_rewound_adapter(made):
    _, text = parts(made / "lora")
    assert "plain LoRA" not in text  # --kl held it
    assert "KL divergence from the base model on `a.txt`, with weight 1" in text
    assert "Not measured" in text
    _, text = parts(made / "back")
    assert "Made from `lora`" in text
    assert re.search(r"alike, by 0\.\d+", text)
    assert "as trained" in text
    assert "learning rate" not in text  # that of the adapter, which it does not know


def test_importance_has_a_card_that_is_no_part_of_what_is_checked(made):
    for name, said in {
        "base": ["`blend`", "the model wrote itself, 6 rows", "without training, at the base"],
        "nu": ["`factored`", "`a`", "learning rate"],
        "ones": ["stored as ones", "`factored"],
    }.items():
        _, text = parts(made / name)
        assert all(s in text for s in said), name
        assert "learning rate" in text or name == "base"
        store.load(made / name)
        (made / name / "README.md").write_text("mine")
        store.load(made / name)


def test_nobody_s_folders_or_secrets_are_told_and_names_stay_names(made):
    for name in ("base", "nu", "mu", "lora", "back", "ones"):
        whole = (made / name / "README.md").read_text("utf-8")
        assert "Jane" not in whole
        assert SECRET not in whole
        assert "More Information Needed" not in whole
    assert "`` q|<b>`x` ``" in (made / "lora" / "README.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("name", "front"),
    [
        ("meta-llama/Llama-3.2-3B", "meta-llama/Llama-3.2-3B"),
        ("owner/name@main", "owner/name"),
        ("/home/jane/models/llama", None),
        ("C:\\Users\\jane\\llama", None),
        ("", None),
        ('a"\n---\nb: [/x', None),
    ],
)
def test_the_base_model_is_named_where_it_is_on_the_hub(name, front, made, tmp_path):
    info = store.read_info(made / "nu")
    info["base_model"] |= {"name": name, "revision": "0123abc"}
    card.write_card(tmp_path, card.recorded(info))
    found, text = parts(tmp_path)
    assert found.get("base_model") == front
    assert "jane" not in text
    assert "`0123abc`" in text
    if front:
        from huggingface_hub import ModelCard

        assert ModelCard.load(tmp_path / "README.md").data.base_model == front


@pytest.mark.parametrize("text", ["a`b", "```", "`", "<img src=x>", "a\nb", "\x1b[31mred", "x|y"])
def test_code_shows_any_text_as_text(text):
    shown = card.code(text)
    fence = re.match("`+", shown)[0]
    assert shown.endswith(fence)
    inside = shown[len(fence) : -len(fence)]
    assert fence not in inside
    assert not {"\n", "\x1b"} & set(shown)


def test_one_block_of_text_has_no_error(made, tiny, tmp_path, capsys):
    """Neither in the card nor in the notes, which are JSON, nor on the screen."""
    text, task = tmp_path / "a.txt", write_rows(tmp_path / "q.jsonl", questions())
    text.write_text("the cat sat on a mat and saw the rat " * 4)
    argv = ["--model", str(tiny), "--device", "cpu", "--text", str(text), "--task", str(task)]
    tune = ["tune", *argv, "--importance", str(made / "base"), "--forget-at-most", "1e-6"]
    tune += ["--max-steps", "2", "--output", str(tmp_path / "mu")]
    back = ["rewind", *argv, "--adapter", str(made / "lora"), "--forget-at-most", "1e-6"]
    back += ["--output", str(tmp_path / "back"), "--text-blocks", "1", "--task-rows", "1"]
    check = ["eval", *argv, "--adapter", str(made / "lora"), "--text-blocks", "1"]
    check += ["--task-rows", "1", "--block-size", "32", "--json", str(tmp_path / "eval.json")]
    for command, file in ((tune, "mu/tune.json"), (back, "back/rewind.json"), (check, "eval.json")):
        assert cli.main(command) == 0
        assert "nan" not in capsys.readouterr().out
        assert "NaN" not in (tmp_path / file).read_text()
    noted = json.loads((tmp_path / "mu" / "tune.json").read_text())["forgetting"]
    assert noted["measured_se"] is None
    for folder in ("mu", "back"):
        _, said = parts(tmp_path / folder)
        assert "nan" not in said
        assert re.search(r"\d nats per token, as trained|measured \S+;", said)
