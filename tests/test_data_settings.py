"""Values of settings: by the field's type, in range, and no secret of them is kept."""

import math
import os
import random
import string
from dataclasses import fields
from typing import get_type_hints

import pytest

import hlora
from hlora.cli import main as cli
from hlora.cli.main import COMMANDS
from hlora.cli.options import parse
from hlora.data.parse import parse_json
from hlora.data.tasks import load_task
from hlora.run import settings as config
from hlora.run.build import build, kind_of, plain, training_value
from hlora.study.spec import read_study
from tests.tiny import questions, write_rows, write_text

RECORD = ["--model", "m", "--text", "a.txt", "--output", "o"]


def record(tmp_path, yaml, *more):
    (tmp_path / "s.yaml").write_text(yaml)
    return parse(config.RecordSettings, [*RECORD, "--config", str(tmp_path / "s.yaml"), *more], "")


@pytest.mark.parametrize(
    ("line", "field", "value"),
    [
        ("learning_rate: 1e-2", "learning_rate", 0.01),
        ("learning_rate: 1E2", "learning_rate", 100.0),
        ("xi: 1e-3", "xi", 0.001),
        ("text_column: no", "text_column", "no"),
        ("text_column: 010", "text_column", "010"),
        ("text_column: 1:30", "text_column", "1:30"),
        ("text_column: 2020-01-01", "text_column", "2020-01-01"),
        ("text_column: null", "text_column", None),
        ("targets: [yes, off, 'on']", "targets", ["yes", "off", "on"]),
        ("resume: yes", "resume", True),
        ("resume: Off", "resume", False),
        ("max_steps: 1e3", "max_steps", 1000),
        ("text_weights: [1, 2.5e-1]", "text_weights", [1.0, 0.25]),
        ("training: {save_strategy: no}", "training", {"save_strategy": "no"}),
        ("training: {weight_decay: 1e-2}", "training", {"weight_decay": 0.01}),
        ("training: {run_name: 0123}", "training", {"run_name": "0123"}),
        ("training: {gradient_checkpointing: yes}", "training", {"gradient_checkpointing": True}),
        ("training: {lr_scheduler_kwargs: {num_cycles: 2}}", "training",
         {"lr_scheduler_kwargs": {"num_cycles": 2}}),
    ],
)  # fmt: skip
def test_yaml_is_converted_by_the_field_s_type(tmp_path, line, field, value):
    assert getattr(record(tmp_path, line), field) == value


def test_the_command_line_converts_as_yaml_does(tmp_path):
    words = ["--training.save_strategy", "no", "--training.weight_decay=1e-2"]
    words += ["--training.lr_scheduler_kwargs", '{"num_cycles": 2}', "--training.fp16_full_eval=no"]
    assert record(tmp_path, "", *words).training == {
        "save_strategy": "no", "weight_decay": 0.01, "lr_scheduler_kwargs": {"num_cycles": 2},
        "fp16_full_eval": False,
    }  # fmt: skip
    with pytest.raises(hlora.InputError, match=r"gradient_checkpointing.*maybe"):
        record(tmp_path, "", "--training.gradient_checkpointing", "maybe")


def test_a_study_s_names_are_text_and_its_numbers_numbers(tmp_path):
    (tmp_path / "s.yaml").write_text(
        "model: no\ngeneral: {no: python-docs}\nheld_out: {no: python-docs@test}\n"
        "tasks: {off: {train: t.jsonl, test: t.jsonl}}\nmethods: [hlora]\nseeds: [0, 1]\n"
        "phi: [1e-2]\nwork: w\nrecord: {learning_rate: 1e-3}\n"
    )
    study = read_study(tmp_path / "s.yaml")
    assert (study.model, list(study.general), list(study.tasks)) == ("no", ["no"], ["off"])
    assert (study.seeds, study.phi, study.record) == ([0, 1], [0.01], {"learning_rate": 0.001})


def test_a_task_format_s_words_are_text(tmp_path):
    (tmp_path / "f.yaml").write_text("prompt: '{{q}}'\nchoices: [no, yes]\nanswer: 1\n")
    path = write_rows(tmp_path / "t.jsonl", [{"q": "Is it?"}])
    [example] = load_task(str(path), format=str(tmp_path / "f.yaml")).examples
    assert (example.choices, example.answer) == ((" no", " yes"), 1)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--seed", "4294967296"], "--seed"),
        (["--seed", "-1"], "--seed"),
        (["--lora-dropout", "2"], "--lora-dropout"),
        (["--lora-dropout", "1"], "--lora-dropout"),
        (["--batch-size", "1e20"], "--batch-size"),
        (["--batch-size", "9" * 5000], "--batch-size"),
        (["--max-steps", "1e400"], "--max-steps"),
        (["--block-size", "inf"], "--block-size"),
        (["--epochs", "nan"], "--epochs"),
        (["--epochs", "1e300"], "--epochs"),
        (["--lora-rank", "1000000000"], "--lora-rank"),
        (["--lora-alpha", "-1"], "--lora-alpha"),
        (["--text-weights", "1", "nan"], "--text-weights"),
        (["--training.weight_decay", "much"], "weight_decay"),
        (["--training.max_grad_norm", "[1, 2"], "max_grad_norm"),
        (["--training.max_grad_norm", "nan"], "max_grad_norm"),
        (["--training.neftune_noise_alpha", "inf"], "neftune_noise_alpha"),
        (["--lora-alpha", "1e30"], "--lora-alpha"),
        (["--learning-rate", "1e-400"], "--learning-rate"),
        (["--training.weight_decay", "1e-400"], "weight_decay"),
    ],
)
def test_odd_numbers_are_refused(words, named):
    with pytest.raises(hlora.InputError, match=named):
        parse(config.RecordSettings, [*RECORD, *words], "")


@pytest.mark.parametrize("value", [{"a": 1}, [[1]], {"b": [None]}, object()])
@pytest.mark.parametrize("field", ["model", "batch_size", "resume", "learning_rate", "text"])
def test_values_of_a_wrong_type_are_refused(field, value):
    values = {"model": "m", "text": ["t"], "output": "o", field: value}
    if field == "text" and isinstance(value, list):
        values[field] = [value]
    with pytest.raises(hlora.InputError, match=f"--{field.replace('_', '-')}"):
        build(config.RecordSettings, values)


@pytest.mark.parametrize(
    "content",
    ["[" * 3000, "{a: " * 3000, "a: &a [x]\nb: [*a, *a]", "a: &a [*a]", "? [1]\n: 2", "\0", "- 1",
     "a: !!python/object/apply:os.system ['true']", "!!binary x", "\xff\xfe", "a: !!timestamp x",
     "a: !!int x", "a: !!float x", "<<: 3"],
)  # fmt: skip
def test_yaml_that_is_no_settings_is_one_error(tmp_path, content):
    with pytest.raises(hlora.InputError, match=r"s\.yaml"):
        record(tmp_path, content)
    with pytest.raises(hlora.InputError, match=r"s\.yaml"):
        read_study(tmp_path / "s.yaml")


def test_no_mutated_yaml_is_a_traceback(tmp_path):
    draw = random.Random(0)
    good = "model: m\ntext: [a, b]\nlearning_rate: 1e-3\n"
    good += "training: {optim: adafactor, a: [1, {b: c}]}\n"
    refused = 0
    for _ in range(400):
        text = list(good)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(len(text))
            text[at] = draw.choice(string.printable + "é\0*&!{}[]:#|>%@`")
        try:
            record(tmp_path, "".join(text))
        except hlora.InputError:
            refused += 1
    assert 100 < refused < 400


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "", "nul", "1" * 5000])
def test_json_that_is_none_is_one_error(text):
    with pytest.raises(hlora.InputError, match="here"):
        parse_json(text, "here")


def test_plain_values_are_those_of_json():
    assert plain({"a": ["1", "1e-2", "true", "no", "null"]}) == {"a": [1, 0.01, True, "no", None]}
    assert training_value("unknown", "0.5") == 0.5


SECRET = "hf_" + "s" * 34


@pytest.fixture
def no_token(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")


@pytest.mark.usefixtures("no_token")
def test_a_hub_token_is_used_and_never_written(tiny, tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "a.txt")
    write_rows(tmp_path / "q.jsonl", questions())
    common = ["--model", str(tiny), "--max-steps", "4", "--save-steps", "2", "--batch-size", "2"]
    common += ["--device", "cpu", f"--training.hub_token={SECRET}"]
    argv = [
        "record",
        *common,
        "--kind",
        "factored",
        "--text",
        "a.txt",
        "--block-size",
        "16",
        "--output",
        "nu",
    ]
    assert cli.main(argv) == 0
    argv = ["tune", *common, "--task", "q.jsonl", "--importance", "nu", "--output", "mu"]
    assert cli.main(argv) == 0
    assert os.environ["HF_TOKEN"] == SECRET
    from hlora.run import training

    monkeypatch.setattr(training, "clean_up", lambda settings: None)
    monkeypatch.setattr("hlora.run.phases.clean_up", lambda settings: None)
    assert cli.main([*argv, "--overwrite"]) == 0  # this time with its checkpoints
    assert cli.main(["tune", f"--hub_token={SECRET}"]) == 2
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any(p.name == "training_args.bin" for p in written)
    assert not [p for p in written if SECRET.encode() in p.read_bytes()]
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err + caplog.text


@pytest.mark.usefixtures("no_token")
def test_a_study_keeps_no_token(tmp_path):
    (tmp_path / "s.yaml").write_text(
        "model: m\ngeneral: {a: python-docs}\nheld_out: {a: python-docs@test}\nwork: w\n"
        "tasks: {t: {train: t.jsonl, test: t.jsonl}}\nmethods: [hlora]\nseeds: [0]\n"
        f"record: {{training: {{hub_token: {SECRET}, optim: adafactor}}}}\n"
    )
    study = read_study(tmp_path / "s.yaml")
    assert study.settings()["record"] == {"training": {"optim": "adafactor"}}


def numbers_of(cls):
    """The settings of a command that are numbers, with the type of each."""
    kinds = {f.name: kind_of(get_type_hints(cls)[f.name])[0] for f in fields(cls)}
    return {name: kind for name, kind in kinds.items() if kind in (int, float)}


ODD = ["4294967296", "1e20", "-1e20", "nan", "inf", "-inf", "1e400", "0x10", "", "9" * 5000, "[1]"]


@pytest.mark.parametrize("command", [c for c, (cls, _) in COMMANDS.items() if numbers_of(cls)])
def test_odd_numbers_are_refused_in_every_command(command):
    """Or taken as a number that is finite and, where it is whole, of 32 bits."""
    cls = COMMANDS[command][0]
    required = {f.name: "x" for f in fields(cls) if f.metadata["required"]}
    refused = []
    for name, kind in numbers_of(cls).items():
        for text in ODD:
            try:
                value = getattr(build(cls, {**required, name: text}), name)
            except hlora.InputError as error:
                refused.append((f"--{name.replace('_', '-')}", str(error)))
                continue
            for one in value if isinstance(value, list) else [value]:
                assert math.isfinite(one)
                assert kind is float or abs(one) < 2**32
    assert all(flag in said for flag, said in refused)
    assert len({flag for flag, _ in refused}) == len(numbers_of(cls))
