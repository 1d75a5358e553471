"""`hlora demo` whole, on a tiny model and with a few steps."""

import shlex

import pytest

import hlora
from hlora.cli import main as cli
from hlora.data.chemistry import wordings
from hlora.data.pythontext import python_text
from hlora.data.tasks import load_task
from hlora.run.settings import DemoSettings
from hlora.study.lines import read_lines

pytest.importorskip("mendeleev")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")


def demo(tiny, folder, *more):
    return cli.main(["demo", "--model", str(tiny), "--output", str(folder), "--quick", *more])


def test_the_demo_ends_in_a_table_and_a_page(tiny, tmp_path, capsys):
    assert demo(tiny, tmp_path / "demo") == 0
    out = capsys.readouterr().out
    for word in ("LoRA(μ)", "HLoRA", "held", "forgot, unseen*", "NLL", "importance"):
        assert word in out
    assert max(len(line) for line in out.splitlines() if "PPL" in line) <= 80
    results = read_lines(tmp_path / "demo" / "demo.jsonl")
    assert [r["label"] for r in results] == [
        "Base", "LoRA(μ)", "LoRA(μ) rewound", "HLoRA", "held at base",
    ]  # fmt: skip
    assert [len(r["answers"]) for r in results] == [8] * 5
    assert all(len(r["text"]["code"]["blocks"]) == 2 for r in results)
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "hlora tune" in page
    assert "✓" in page

    assert demo(tiny, tmp_path / "demo") == 2
    assert "holds a finished demo" in capsys.readouterr().err
    (tmp_path / "demo" / "report.html").unlink()
    assert demo(tiny, tmp_path / "demo", "--phi", "0.5") == 2
    assert "other settings" in capsys.readouterr().err
    assert demo(tiny, tmp_path / "demo", "--overwrite", "--phi", "0.5") == 0


def test_a_demo_that_is_refused_overwrites_nothing(tiny, tmp_path, capsys):
    for name in ("demo.jsonl", "report.html"):
        (tmp_path / name).write_text("before")
    assert demo(tiny, tmp_path, "--overwrite", "--device", "cuda:9") == 2
    assert "'cuda:9'" in capsys.readouterr().err
    assert [p.read_text() for p in tmp_path.iterdir()] == ["before"] * 2


def test_its_commands_run_as_they_stand(tiny, tmp_path, monkeypatch):
    from hlora.study.demo import commands, demo_study

    monkeypatch.chdir(tmp_path)
    settings = DemoSettings(model=str(tiny), output="demo", quick=True)
    for command in commands(demo_study(settings)):
        assert cli.main(shlex.split(command)[1:]) == 0


def test_a_stopped_demo_goes_on_where_it_was(tiny, tmp_path, capsys, monkeypatch):
    from hlora.study import measure

    run, calls = measure.tune, []

    def stop_at_the_second(settings):
        calls.append(settings)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(settings)

    monkeypatch.setattr(measure, "tune", stop_at_the_second)
    assert demo(tiny, tmp_path / "demo") == 130
    monkeypatch.undo()
    capsys.readouterr()
    before = read_lines(tmp_path / "demo" / "demo.jsonl")
    assert [r["run"]["method"] for r in before] == ["base", "lora-mu", "lora-rewound"]
    assert demo(tiny, tmp_path / "demo", "--seed", "1") == 2
    assert "other settings" in capsys.readouterr().err
    assert demo(tiny, tmp_path / "demo") == 0
    assert "2 runs to do, 3 done before" in capsys.readouterr().out
    assert read_lines(tmp_path / "demo" / "demo.jsonl")[:3] == before


def test_the_chemistry_test_asks_in_other_words():
    train, test = (load_task(f"chemistry@{s}") for s in ("train", "test"))
    assert load_task("chemistry", split="test").examples == test.examples
    assert len(train.examples) > 800
    assert len(test.examples) > 400
    asked = {e.prompt for e in train.examples}
    assert not asked & {e.prompt for e in test.examples}
    train_words, test_words = ({w for ws in of.values() for w in ws} for of in wordings().values())
    assert not train_words & test_words
    for example in (*train.examples, *test.examples):
        assert len(set(example.choices)) == 4
    positions = [e.answer for e in test.examples]
    assert all(positions.count(i) > 60 for i in range(4))
    with pytest.raises(hlora.InputError, match="'valid'"):
        load_task("chemistry@valid")


def test_an_element_s_name_is_not_in_its_own_question():
    for example in load_task("chemistry@test").examples:
        answer = example.bare[example.answer]
        assert f" {answer} " not in example.prompt


@pytest.mark.parametrize("kind", ["docs", "docstrings"])
def test_general_text_is_parted_by_document(kind):
    train, test = (python_text(kind, s) for s in ("train", "test"))
    lines = {line for line in train.splitlines() if len(line) > 60}
    shared = [line for line in test.splitlines() if len(line) > 60 and line in lines]
    assert len(shared) < 0.02 * len(test.splitlines())
