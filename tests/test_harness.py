"""lm-evaluation-harness on data of our own, against our own scores."""

import json
import re

import pytest

import hlora
from hlora.cli import main as cli
from hlora.data.tasks import load_task
from hlora.run import harness
from hlora.run.evaluate import score_task
from hlora.run.models import load
from tests.test_evaluate import lora
from tests.tiny import questions, write_rows

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("default")

SCIQ = [
    {
        "question": f"What is {i}?", "distractor1": "a", "distractor2": "bc", "distractor3": "d e",
        "correct_answer": f"x{i}", "support": "",
    }
    for i in range(10)
]  # fmt: skip

TASK_FILE = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: t.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


SCIENCE = """
task: science
dataset_path: json
dataset_kwargs: {data_files: {test: sciq.test.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{support.lstrip()}}\\nQuestion: {{question}}\\nAnswer:"
doc_to_choice: "{{[distractor1, distractor2, distractor3, correct_answer]}}"
doc_to_target: 3
metric_list: [{metric: acc}, {metric: acc_norm}]
"""


def test_a_task_file_is_scored_as_by_us(tiny, tmp_path):
    path = write_rows(tmp_path / "sciq.test.jsonl", SCIQ)
    (tmp_path / "science.yaml").write_text(SCIENCE)
    model, words = load(str(tiny))
    model = lora(model)
    model.train()
    ours = score_task(model, words, load_task(str(path)))
    tasks = harness.prepare([str(tmp_path / "science.yaml")])
    found = harness.run(model, words, tasks, batch_size=4, limit=None)
    assert model.training
    score = found["science"]
    assert score.n == 10
    assert score.values["acc"][0] == pytest.approx(ours.acc)
    assert score.values["acc_norm"] == pytest.approx((ours.acc_norm, ours.acc_norm_se))


def test_the_command_scores_base_and_adapter(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "t.jsonl", questions(12))
    (tmp_path / "mine.yaml").write_text(TASK_FILE)
    model, _ = load(str(tiny))
    lora(model).save_pretrained("adapter")
    argv = ["eval", "--model", str(tiny), "--adapter", "adapter", "--lm-eval", "mine.yaml"]
    argv += ["--task", "t.jsonl", "--dtype", "fp32"]
    assert cli.main([*argv, "--json", "s.json"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"mine\s*│ adapter\s*│\s*12 │ acc", out)
    found = json.loads((tmp_path / "s.json").read_text())
    for which in ("base", "adapter"):
        of = found[which]["lm_eval"]
        assert of["mine"]["values"]["acc"][0] == pytest.approx(found[which]["task"]["t"]["acc"])
        assert of["mine"]["n"] == 12


@pytest.mark.parametrize(
    ("spec", "text", "message"),
    [
        ("sciqq", "", "'sciqq'"),
        ("nowhere.yaml", "", "cannot be read"),
        ("rows.jsonl", "", "--task"),
        ("t.yaml", "include: other.yaml", "'other.yaml'"),
        ("t.yaml", "task: x\ndoc_to_text: !function u.f", "Python code"),
        ("t.yaml", "task: x\n", "'dataset_path'"),
        ("t.yaml", "- a\n", "map names"),
        ("t.yaml", "a: [", "YAML"),
        ("t.yaml", TASK_FILE, "t.jsonl"),
    ],
)
def test_bad_tasks_are_named(spec, text, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if text:
        (tmp_path / spec).write_text(text)
    with pytest.raises(hlora.InputError, match=re.escape(message)):
        harness.prepare([spec])


def test_a_task_of_the_hub_that_cannot_be_reached(tiny, capsys):
    assert cli.main(["eval", "--model", str(tiny), "--lm-eval", "sciq"]) == 2
    assert "lm-eval" in capsys.readouterr().err
