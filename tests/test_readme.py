"""What the README tells people to type works."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from hlora.cli import main as cli
from hlora.core.importance.blend import Blend
from hlora.hf.peft import find_pairs
from hlora.hf.record import save_importance
from tests.conftest import lora_model, make_trainer, token_rows
from tests.tiny import questions, write_rows, write_text

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def code(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_two_snippets_run_as_they_stand(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    at_base = lora_model()
    rows = torch.randint(3, 60, (6, 9))
    importance, summary = Blend.gather(at_base, find_pairs(at_base), rows)
    notes = {"summary": summary}
    save_importance(tmp_path / "base", at_base, find_pairs(at_base), importance, notes)
    snippets = code("python")
    assert len(snippets) == 2

    def trainer(model, args, train_dataset):
        return make_trainer(model, tmp_path / "run", rows=train_dataset)

    names = {
        "Trainer": trainer, "args": None, "peft_model": lora_model(),
        "new_peft_model": lora_model(seed=4), "general_text": token_rows(),
        "domain": token_rows(seed=2),
    }  # fmt: skip
    names["new_peft_model"].base_model.model.load_state_dict(
        names["peft_model"].base_model.model.state_dict()
    )
    logged = []
    for snippet in snippets:
        exec(snippet, names)
        logged.append([e for e in names["trainer"].state.log_history if "loss" in e][-1])
    assert logged[0].keys() >= {"R", "forgetting", "penalty", "total_loss", "penalty_grad_ratio"}
    assert (tmp_path / "nu" / "importance.json").is_file()
    assert logged[1].keys() >= {"R", "penalty", "total_loss", "penalty_grad_ratio"}


def test_the_commands_run_as_they_stand(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "docs.txt")
    write_text(tmp_path / "held-out.txt")
    write_rows(tmp_path / "more.jsonl", [{"text": "one more document"}] * 9)
    write_rows(tmp_path / "rows.jsonl", questions())
    pytest.importorskip("matplotlib")
    few = ["--max-steps", "2", "--batch-size", "2"]
    small = {
        "record": ["--block-size", "32", "--batch-size", "2"], "tune": few,
        "eval": ["--block-size", "32"],
        "rewind": ["--block-size", "32", "--text-blocks", "2"],
    }  # fmt: skip
    argv = ["tune", "--model", str(tiny), "--task", "rows.jsonl", "--output", "lora", *few]
    assert cli.main(argv) == 0  # README: an adapter that is already trained, by anyone
    commands = [
        line for block in code("bash") for line in block.splitlines() if line.startswith("hlora ")
    ]
    assert [c.split()[1] for c in commands] == [
        "record", "tune", "tune", "rewind", "record", "tune", "eval", "inspect",
    ]  # fmt: skip
    for command in commands:
        words = shlex.split(command, comments=True)[1:]
        words = [{"smollm2-135m": str(tiny), "sciq": "rows.jsonl"}.get(w, w) for w in words]
        steps = ["--max-steps", "2"] if "factored" in words else []
        assert cli.main([*words, *small.get(words[0], []), *steps]) == 0
    assert (tmp_path / "layers.png").is_file()


def test_the_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
