"""One definition of a setting, three ways in."""

from dataclasses import fields

import pytest

import hlora
from hlora.cli.options import parse
from hlora.run import settings as config
from hlora.run.build import build, command_line
from hlora.run.settings import DOTTED

NEEDED = ["--model", "m", "--text", "a.txt", "b.txt", "--output", "o"]


def record(*argv):
    return parse(config.RecordSettings, [*NEEDED, *argv], "hlora record")


def test_the_command_line_sets_every_type():
    s = record(
        "--batch-size", "3", "--learning_rate=1e-4", "--resume", "--xi", "0.5",
        "--text-weights", "2", "1", "--preset", "official", "--training.optim=adafactor",
        "--training.weight_decay", "0.1",
    )  # fmt: skip
    assert s.text == ["a.txt", "b.txt"]
    assert (s.batch_size, s.learning_rate, s.resume, s.xi) == (3, 1e-4, True, 0.5)
    assert s.text_weights == [2.0, 1.0]
    assert s.training == {"optim": "adafactor", "weight_decay": 0.1}


def test_defaults_are_the_paper_s():
    s = record()
    assert (s.lora_rank, s.lora_alpha, s.learning_rate, s.batch_size, s.epochs) == (
        8, 32.0, 8e-4, 20, 5.0,
    )  # fmt: skip
    assert s.targets == ["q_proj", "v_proj"]


def test_a_yaml_file_sets_the_same_and_the_command_line_wins(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("model: x\nbatch-size: 7\nlora_rank: 4\ntraining: {optim: adafactor, a: 1}\n")
    s = record("--config", str(path), "--lora-rank", "16", "--training.a=2")
    assert (s.model, s.batch_size, s.lora_rank) == ("m", 7, 16)
    assert s.training == {"optim": "adafactor", "a": 2}


def test_the_command_line_of_settings_gives_them_back():
    s = record("--batch-size", "3", "--resume", "--training.optim=adafactor", "--xi", "0.5")
    words = command_line("record", s).split()
    assert words[:2] == ["hlora", "record"]
    assert parse(config.RecordSettings, words[2:], "") == s


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--batch-sise", "3"], "--batch-sise.*--batch-size"),
        (["--batch-size", "x"], "--batch-size.*'x'"),
        (["--batch-size", "0"], "--batch-size.*at least 1"),
        (["--xi", "much"], "--xi.*'much'"),
        (["--preset", "mine"], "--preset.*official.*'mine'"),
        (["--dtype", "fp8"], "--dtype.*bf16"),
        (["--training.optim"], r"--training\.optim"),
        (["--seed"], "--seed"),
        (["--config", "nowhere.yaml"], r"nowhere\.yaml"),
    ],
)
def test_a_wrong_setting_is_named(argv, message):
    with pytest.raises(hlora.InputError, match=message):
        record(*argv)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("batch_sise: 3", "batch_sise.*batch_size"),
        ("[1, 2]", "map names"),
        ("a: [", "YAML"),
        ("batch_size: [1, 2]", "--batch-size.*one value"),
        ("training: 3", "--training.*mapping"),
        ("resume: maybe", "--resume.*'maybe'"),
    ],
)
def test_a_wrong_settings_file_is_named(tmp_path, content, message):
    path = tmp_path / "s.yaml"
    path.write_text(content)
    with pytest.raises(hlora.InputError, match=message):
        record("--config", str(path))


def test_a_missing_setting_is_explained():
    with pytest.raises(hlora.InputError, match="--task"):
        parse(config.TuneSettings, ["--model", "m", "--output", "o"], "")


def test_python_takes_the_same_values_with_the_same_checks():
    s = build(config.TuneSettings, {"model": "m", "importance": "i", "task": "t", "output": "o"})
    assert (s.importance, s.phi, s.anchor) == (["i"], [], [])
    s = config.TuneSettings(model="m", task="t", output="o", importance="i", phi=0.0)
    assert (s.importance, s.phi) == (["i"], [0.0])
    with pytest.raises(hlora.InputError, match=r"phy.*phi"):
        build(config.TuneSettings, {"phy": 1})


COMMANDS = [
    config.RecordSettings, config.TuneSettings, config.EvalSettings, config.InspectSettings,
    config.ConvertSettings, config.StudySettings, config.DemoSettings,
]  # fmt: skip


@pytest.mark.parametrize("cls", COMMANDS)
def test_help_fits_the_terminal_and_explains_each_setting_once(cls, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse(cls, ["--help"], "hlora x")
    short = capsys.readouterr().out
    with pytest.raises(SystemExit):
        parse(cls, ["--help-all"], "hlora x")
    full = capsys.readouterr().out
    assert max(len(line) for line in (short + full).splitlines()) <= 80
    assert sum(line.startswith("  -") for line in short.splitlines()) <= 22
    for f in fields(cls):
        if f.metadata["positional"]:
            continue
        flag = f"--{f.name}.NAME" if f.name in DOTTED else f"--{f.name.replace('_', '-')}"
        assert sum(f"{line} ".startswith(f"  {flag} ") for line in full.splitlines()) == 1
        assert f.metadata["help"]
