"""`hlora demo` whole, on a tiny model and with a few steps."""

import json

import pytest

from hlora.cli import main as cli
from hlora.data.chemistry import TEST, TRAIN, write_chemistry
from hlora.data.tasks import load_task
from hlora.study.demo_general import SEEN, UNSEEN, write_general

pytest.importorskip("mendeleev")
pytest.importorskip("matplotlib")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")


def demo(tiny, folder, *more):
    return cli.main(["demo", "--model", str(tiny), "--output", str(folder), "--quick", *more])


def test_the_demo_ends_in_a_table_and_a_page(tiny, tmp_path, capsys):
    assert demo(tiny, tmp_path / "demo") == 0
    out = capsys.readouterr().out
    for word in ("[6/6", "LoRA(μ)", "LoRA(ν+μ)", "HLoRA", "forgot, unseen*", "NLL", "importance"):
        assert word in out
    assert max(len(line) for line in out.splitlines() if "PPL" in line) <= 80
    results = json.loads((tmp_path / "demo" / "demo.json").read_text())
    assert [r["method"] for r in results["rows"]] == [
        "base", "after ν", "LoRA(μ)", "LoRA(ν+μ)", "HLoRA",
    ]  # fmt: skip
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "hlora tune" in page

    assert demo(tiny, tmp_path / "demo") == 2
    assert "holds a finished demo" in capsys.readouterr().err
    assert demo(tiny, tmp_path / "demo", "--overwrite") == 0


def test_a_stopped_demo_goes_on_where_it_was(tiny, tmp_path, capsys, monkeypatch):
    from hlora.cli import tune

    run, calls = tune.run, []

    def stop_at_the_second(settings):
        calls.append(settings)
        if len(calls) == 2:
            raise KeyboardInterrupt
        run(settings)

    monkeypatch.setattr(tune, "run", stop_at_the_second)
    assert demo(tiny, tmp_path / "demo") == 130
    monkeypatch.undo()
    capsys.readouterr()
    assert demo(tiny, tmp_path / "demo") == 0
    out = capsys.readouterr().out
    assert "nu is done already" in out
    assert "lora-mu is done already" in out
    assert "hlora is done already" not in out
    (tmp_path / "demo" / "demo.json").unlink()
    assert demo(tiny, tmp_path / "demo", "--phi", "0.5") == 2
    assert "demo with other settings" in capsys.readouterr().err


def test_the_chemistry_test_asks_in_other_words(tmp_path):
    write_chemistry(tmp_path)
    train, test = (load_task(str(tmp_path / f"chemistry.{s}.jsonl")) for s in ("train", "test"))
    assert len(train.examples) > 800
    assert len(test.examples) > 400
    asked = {e.prompt for e in train.examples}
    assert not asked & {e.prompt for e in test.examples}
    assert not {w for ws in TRAIN.values() for w in ws} & {w for ws in TEST.values() for w in ws}
    for example in (*train.examples, *test.examples):
        assert len(set(example.choices)) == 4
    positions = [e.answer for e in test.examples]
    assert all(positions.count(i) > 60 for i in range(4))


def test_an_element_s_name_is_not_in_its_own_question(tmp_path):
    write_chemistry(tmp_path)
    for example in load_task(str(tmp_path / "chemistry.test.jsonl")).examples:
        answer = example.bare[example.answer]
        assert f" {answer} " not in example.prompt


def test_general_text_is_parted_by_document(tmp_path):
    write_general(tmp_path)
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {
        f"{UNSEEN}.test.txt", *(f"{k}.{s}.txt" for k in SEEN for s in ("train", "test")),
    }  # fmt: skip
    for kind in SEEN:
        train, test = ((tmp_path / f"{kind}.{s}.txt").read_text() for s in ("train", "test"))
        lines = {line for line in train.splitlines() if len(line) > 60}
        shared = [line for line in test.splitlines() if len(line) > 60 and line in lines]
        assert len(shared) < 0.02 * len(test.splitlines())
