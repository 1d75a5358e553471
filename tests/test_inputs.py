"""What is wrong is said before torch is imported."""

import json
import subprocess
import sys

import pytest

import hlora
from hlora.run.inputs import check
from hlora.run.settings import RecordSettings, TuneSettings
from tests.tiny import questions, write_rows, write_text

MODEL, TASK = ["--model", "m"], ["--task", "q.jsonl", "--output", "o"]
RUN = """
import json, sys, time
from hlora.cli.main import main
for argv in json.load(sys.stdin):
    began = time.process_time()
    code = main(argv)
    heavy = sorted({"torch", "transformers"} & sys.modules.keys())
    print(json.dumps([code, time.process_time() - began, heavy]))
    sys.stderr.write("\\x00")
"""
WRONG = {
    "no.jsonl": ["tune", *MODEL, "--task", "no.jsonl", "--output", "o"],
    "'scq'; did you mean sciq": ["tune", *MODEL, "--task", "scq", "--output", "o"],
    "no.txt": ["record", *MODEL, "--text", "a.txt", "no.txt", "--output", "o"],
    "kl.txt": ["tune", *MODEL, "--task", "q.jsonl", "--kl", "kl.txt", "--output", "o"],
    "replay.txt": ["tune", *MODEL, "--task", "q.jsonl", "--replay", "replay.txt", "--output", "o"],
    "./nope": ["eval", "--model", "./nope", "--text", "a.txt"],
    "nope.gguf": ["eval", "--model", "nope.gguf", "--text", "a.txt"],
    "pickled": ["eval", "--model", "pickle", "--text", "a.txt"],
    "columns of bad.jsonl": ["tune", *MODEL, "--task", "bad.jsonl", "--output", "o"],
    "--task-format": ["eval", *MODEL, "--task", "q.jsonl", "--task-format", "scq"],
    "importance folder nu": ["tune", *MODEL, "--importance", "nu", *TASK],
    "no finished importance": ["tune", *MODEL, "--importance", "m", *TASK],
    "no LoRA adapter": ["rewind", *MODEL, "--adapter", "m", "--output", "o"],
    "already holds": ["tune", *MODEL, "--task", "q.jsonl", "--output", "done"],
    "is a file": ["merge", "--adapter", "done", "--output", "a.txt"],
    "adapter_model.safetensors": ["merge", "--adapter", "done", "--output", "o"],
    "--output is the folder of the model m": ["record", *MODEL, "--overwrite", "--output", "m"],
    "--output is the folder of the model ./m/": ["tune", "--model", "./m/", *TASK[:3], "m"],
    "--record is the folder of the model m": ["tune", *MODEL, *TASK, "--record", "m"],
    "--output m/o/r lies inside the model's folder m": [
        "rewind", *MODEL, "--adapter", "done", "--output", "m/o/r"
    ],
    "--output m/o lies inside": ["merge", *MODEL, "--adapter", "done", "--output", "m/o"],
    "The model m lies inside --output .": ["tune", *MODEL, *TASK[:3], ".", "--overwrite"],
    "is the folder of the model ggufs/x.gguf": [
        "tune", "--model", "ggufs/x.gguf", *TASK[:3], "ggufs"
    ],
    "holds an adapter and no model": ["eval", "--model", "done", "--text", "a.txt"],
    "folder both also holds an adapter": ["eval", "--model", "both", "--text", "a.txt"],
    "both also holds": ["tune", "--model", "both/x.gguf", *TASK],
    "exclude": ["eval", *MODEL, "--text", "a.txt", "--load-in-4bit", "--load-in-8bit"],
}  # fmt: skip


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("m", "pickle", "done", "both", "ggufs"):
        (tmp_path / name).mkdir()
    for name in ("m", "both"):
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_text("")
    for name in ("both/x.gguf", "ggufs/x.gguf", "both/adapter_config.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "pickle" / "config.json").write_text("{}")
    (tmp_path / "pickle" / "pytorch_model.bin").write_text("")
    (tmp_path / "done" / "adapter_config.json").write_text("{}")
    write_text(tmp_path / "a.txt")
    write_rows(tmp_path / "q.jsonl", questions())
    write_rows(tmp_path / "bad.jsonl", [{"what": 1}])
    return tmp_path


def test_each_wrong_input_is_named_without_torch(place):
    done = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(list(WRONG.values())), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for said, (code, seconds, heavy), named in zip(
        done.stderr.split("\x00"), answers, WRONG, strict=False
    ):
        assert named in said
        assert said.count("\n") == 1
        assert (code, heavy) == (2, []), named
        assert seconds < 0.5, named  # 0.1 where nothing else runs
    assert len(answers) == len(WRONG)
    assert not (place / "o").exists()


def test_what_is_right_passes_and_hub_names_are_left_to_the_hub(place):
    check(RecordSettings(model="m", text=["a.txt", "owner/name@train"], output="o"))
    for task in ("q.jsonl", "sciq", "chemistry@test", "owner/name:config@train"):
        check(
            TuneSettings(
                model="owner/name", task=task, importance="me/nu", output="done", resume=True
            )
        )
    check(TuneSettings(model="ggufs/x.gguf", task="q.jsonl", output="ggufs/o"))
    check(TuneSettings(model="m", task="q.jsonl", output="m-tuned"))
    with pytest.raises(hlora.InputError, match="already holds"):
        check(TuneSettings(model="m", task="q.jsonl", output="done"))
