"""What is wrong is said before the work, and a missing package by its name."""

import json
import os
import sys

import pytest

import hlora
from hlora.cli import main as cli
from hlora.data import chemistry
from hlora.data.read import load_hub
from hlora.data.source import Source
from hlora.data.tasks import load_task
from hlora.files import write_json
from hlora.run import harness, scoring
from tests.tiny import questions, write_rows, write_text


@pytest.mark.parametrize("where", ["folder", "file/s.json", "there.json"])
def test_a_json_file_that_cannot_be_written_is_refused_before_scoring(
    tiny, tmp_path, monkeypatch, capsys, where
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "there.json").write_text("")
    write_text(tmp_path / "a.txt")
    monkeypatch.setattr(scoring, "score", lambda *a: pytest.fail("scored"))
    argv = ["eval", "--model", str(tiny), "--text", "a.txt", "--block-size", "16"]
    assert cli.main([*argv, "--json", where]) == 2
    assert where.split("/")[0] in capsys.readouterr().err


def test_scores_under_a_name_that_is_no_utf_8_are_written(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "a.txt")
    os.rename(b"a.txt", b"a\xff.txt")
    argv = ["eval", "--model", str(tiny), "--text", "a\udcff.txt", "--block-size", "16"]
    assert cli.main([*argv, "--json", "s.json"]) == 0
    found = json.loads((tmp_path / "s.json").read_text("utf-8"))
    assert list(found["base"]["text"]) == ["a\udcff"]
    write_json(tmp_path / "x.json", {"a\udcff": 1})
    assert json.loads((tmp_path / "x.json").read_text("utf-8")) == {"a\udcff": 1}


def test_scores_that_json_has_no_word_for_are_null(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "t.jsonl", [{"prompt": "a", "completion": "b"}])
    argv = ["eval", "--model", str(tiny), "--task", "t.jsonl", "--json", "s.json"]
    assert cli.main(argv) == 0
    text = (tmp_path / "s.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["base"]["task"]["t"]["acc"] is None


@pytest.mark.parametrize(
    ("package", "use"),
    [
        ("datasets", lambda: next(load_hub("owner/name"))),
        ("pyarrow", lambda: list(Source.parse("a.parquet").documents())),
        ("lm_eval", lambda: harness.prepare(["sciq"])),
        ("mendeleev", lambda: load_task("chemistry")),
    ],
)
def test_a_missing_package_is_named(package, use, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    chemistry._facts.cache_clear()
    with pytest.raises(hlora.InputError, match="pip install"):
        use()


def test_reports_need_what_they_draw_with(tmp_path, monkeypatch, capsys):
    from tests.results_lines import study

    write_rows(tmp_path / "r.jsonl", study())
    for package in ("matplotlib", "scipy"):
        with monkeypatch.context() as patched:
            for name in [n for n in sys.modules if n.split(".")[0] == package]:
                patched.delitem(sys.modules, name)
            patched.setitem(sys.modules, package, None)
            assert cli.main(["report", str(tmp_path / "r.jsonl"), "--mixed"]) == 2
            assert "pip install" in capsys.readouterr().err


def test_the_largest_seed_works(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "q.jsonl", questions())
    argv = ["tune", "--model", str(tiny), "--task", "q.jsonl", "--output", "mu", "--max-steps", "2"]
    assert cli.main([*argv, "--seed", "4294967295", "--batch-size", "2147483647"]) == 0
