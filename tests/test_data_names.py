"""Names and errors from files are text: no markup, no HTML, no commands to a terminal."""

import json
import random
import re

import pytest
from rich.table import Table

import hlora
from hlora.cli import main as cli
from hlora.cli.screen import Screen, say
from hlora.errors import InputError, visible
from hlora.study.cells import as_markdown
from hlora.study.lines import checked
from tests.damage import changed
from tests.results_lines import line, study
from tests.tiny import questions, write_rows, write_text

EVIL = (
    "a[/red]:smile:\x1b]0;owned\x07\x9b31m\u202e$\\frac$"
    "<script>x</script>[l](javascript:x)`|www.x.org\nb"
)


def test_what_does_not_print_is_shown_as_its_escape():
    assert visible("größe, ±, \xa0, φ") == "größe, ±, \xa0, φ"
    shown = visible(EVIL)
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)
    assert "\\x1b" in shown
    assert str(InputError(EVIL)).isprintable()


def test_screen_and_errors_are_plain(capsys):
    table = Table(title=EVIL)
    table.add_column(EVIL)
    table.add_row(EVIL)
    screen = Screen(width=400)
    screen.print(table)
    screen.print(EVIL)
    say(EVIL)
    assert cli.main([EVIL]) == 2
    for said in capsys.readouterr():
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", said)
        assert "[/red]" in said
        assert ":smile:" in said


def test_markdown_shows_names_as_they_are():
    shown = as_markdown(EVIL)
    assert "\n" not in shown
    assert "<script" not in shown
    assert not re.search(r"(?<!\\)[\[\]`|$]", shown)
    assert as_markdown("https://x.org") == "https:\\//x.org"
    assert as_markdown("p < 0.05, R & D, 5 * 3") == "p < 0.05, R & D, 5 * 3"


def test_eval_prints_odd_names(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "[red]a[.txt")
    write_rows(tmp_path / "[red]\x1b[31m.jsonl", questions(4))
    argv = ["eval", "--model", str(tiny), "--text", "[red]a[.txt", "--block-size", "16"]
    assert cli.main([*argv, "--task", "[red]\x1b[31m.jsonl"]) == 0
    out = capsys.readouterr().out
    assert out.count("[red]") == 2
    assert "\x1b[31m" not in out


def test_a_report_of_odd_names_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = [
        line(m, EVIL, s, p)
        for m, p in (("base", None), ("lora-mu", None), ("hlora", 0.003), ("ewc", 0.003))
        for s in (0, 1)
    ]
    lines.append({**line("hlora", "sciq", 0, 0.01), "error": EVIL})
    write_rows(tmp_path / "r.jsonl", lines)
    assert cli.main(["report", "r.jsonl", "--page", "p.md"]) == 0
    assert "\x1b" not in capsys.readouterr().out
    for page in (tmp_path / "p.md", tmp_path / "r-report" / "index.html"):
        text = page.read_text("utf-8")
        assert "<script>x" not in text
        assert "[l](javascript:x)" not in text or page.suffix == ".html"


@pytest.mark.parametrize(
    "change",
    [
        {"text": {"wiki": 3}}, {"text": {"wiki": {"loss": "x"}}}, {"text": {"wiki": {}}},
        {"forgetting": {"seen": {"nats": 1.0}}}, {"run": {"method": "a"}}, {"run": None},
        {"run": {"method": [], "task": "t", "seed": 0, "phi": None}}, {"log": 3},
        {"norms": {"a": None}}, {"seen": "wiki"}, {"task": {"acc": []}}, {"versions": 3},
        {"seconds": {"record": "long"}}, {"steps": 10**30}, {"task": {"n": 3, "nll": 1.0}},
    ],
)  # fmt: skip
def test_a_line_of_another_shape_is_refused(change):
    checked(line("hlora", "sciq", 0, 0.01), "here")
    with pytest.raises(hlora.InputError, match="here"):
        checked({**line("hlora", "sciq", 0, 0.01), **change}, "here")


def test_a_results_file_nested_deep_is_one_error(tmp_path):
    (tmp_path / "r.jsonl").write_text("[" * 100_000 + "\n{}\n")
    assert cli.main(["report", str(tmp_path / "r.jsonl")]) == 2


def test_no_mutated_results_are_a_traceback(tmp_path, monkeypatch):
    """The report's tables and words; its figures are drawn from what they hold."""
    from hlora.study import figures

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "save_both", lambda figure, stem: "<svg/>")
    draw, lines, codes = random.Random(0), study(), set()
    monkeypatch.setattr("hlora.cli.report.show", lambda *a, **k: None)
    for _ in range(4):
        at = draw.randrange(len(lines))
        bad = [*lines[:at], changed(draw, lines[at]), *lines[at + 1 :]]
        (tmp_path / "r.jsonl").write_text("".join(json.dumps(x) + "\n" for x in bad))
        codes.add(cli.main(["report", "r.jsonl", "--mixed", "--output", "o"]))
    assert codes <= {0, 2}
