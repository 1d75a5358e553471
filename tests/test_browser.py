"""The report where it is read: in a browser, on a phone and a screen, light and dark."""

import io
import re

import pytest

from hlora.cli import main as cli
from tests.browser import NAMES, Browser, found
from tests.results_lines import line, study
from tests.tiny import write_rows

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")
WIDTHS, THEMES = (360, 1280), ("light", "dark")
INK, PAPER = {"light": 27, "dark": 231}, {"light": 255, "dark": 22}
"""How bright text and page are, of 255."""
EVIL = ("<script>hacked = 1</script>", "<img src=x onerror='hacked = 1'>", "#000000: t" + "o" * 300)


@pytest.fixture(scope="module")
def browser():
    program = found()
    if program is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on the PATH")
    browser = Browser(program)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A report with every part; two of its names are an attack, one is very long."""
    folder = tmp_path_factory.mktemp("report")
    lines = study(tasks=("sciq", EVIL[2]))
    lines += [line(name, task, 0) for name in EVIL[:2] for task in ("sciq", EVIL[2])]
    write_rows(folder / "r.jsonl", lines)
    assert cli.main(["report", str(folder / "r.jsonl"), "--output", str(folder)]) == 0
    return folder / "index.html"


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_complains_overflows_or_is_blank(browser, page, width, theme):
    browser.complaints.clear()
    browser.show(page, width, theme)
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run("innerWidth") == width  # a phone would zoom out to what is wider
    assert browser.run("typeof hacked") == "undefined"
    shot = Image.open(io.BytesIO(browser.screenshot())).convert("L")
    assert shot.size == (width, 800)
    counts = shot.histogram()
    assert counts.index(max(counts)) == PAPER[theme]
    assert counts[INK[theme]] > 200  # letters
    assert browser.complaints == []


@pytest.mark.parametrize("theme", THEMES)
def test_figures_can_be_read_in_both_themes(browser, page, theme):
    """Every text and every line of a figure stands out from the page."""
    browser.show(page, 1280, theme)
    colors = browser.run(
        """[...document.querySelectorAll("figure svg text, figure svg .ytick use")].map((of) => {
          const style = getComputedStyle(of);
          return of.tagName === "text" ? style.fill : style.stroke;
        })"""
    )
    assert len(colors) > 150
    bright = {sum(map(int, re.findall(r"\d+", color)[:3])) / 3 for color in colors}
    assert bright == {INK[theme] + (2 / 3 if theme == "dark" else 0)}
    page_color = browser.run("getComputedStyle(document.querySelector('#patch_1 path')).fill")
    assert page_color == browser.run("getComputedStyle(document.body).backgroundColor")


def test_a_phone_shows_verdicts_and_a_fixed_first_column(browser, page):
    browser.show(page, 360, "light")
    box = "document.querySelector('#claims .scroll')"
    verdict = f"{box}.querySelector('tbody td').getBoundingClientRect()"
    assert browser.run(f"{verdict}.right") <= 360
    hint = f"getComputedStyle({box}.previousElementSibling).visibility"
    first = f"{box}.querySelector('tbody th').getBoundingClientRect().left"
    assert browser.run(hint) == "visible"
    before, there = browser.run(first), browser.run(f"{verdict}.left")
    browser.run(f"{box}.scrollLeft = 9999")
    browser.run("new Promise((done) => setTimeout(done, 100))")
    assert browser.run(f"{verdict}.left") < there
    assert browser.run(first) == before
    assert browser.run(hint) == "hidden"  # there is no more to the right


def test_columns_sort_by_their_figures(browser, page):
    browser.show(page, 1280, "light")
    column = (
        "[...document.querySelectorAll('#task-sciq tbody tr')].map((r) => r.cells[5].innerText)"
    )
    first = browser.run(column)

    def figures():
        return [float(cell.split()[0]) for cell in browser.run(column)]

    click = "document.querySelectorAll('#task-sciq thead button')[5].click()"
    browser.run(click)
    assert figures() == sorted(figures())
    assert first != browser.run(column)
    browser.run(click)
    assert figures() == sorted(figures(), reverse=True)
    sort = "document.querySelectorAll('#task-sciq thead th')[5].ariaSort"
    assert browser.run(sort) == "descending"
    browser.run(click)
    assert browser.run(column) == first


def test_what_is_missing_sorts_last_either_way(browser, page):
    browser.show(page, 1280, "light")
    at = "[...document.querySelectorAll('#table-1 thead th')].length - 1"
    last = f"[...document.querySelectorAll('#table-1 tbody tr')].at(-1).cells[{at}].innerText"
    for _ in range(2):
        browser.run(f"document.querySelectorAll('#table-1 thead button')[{at}].click()")
        assert browser.run(last) == "–"


def test_every_anchor_leads_somewhere_and_every_figure_has_words(browser, page):
    browser.show(page, 1280, "light")
    links = browser.run("[...document.querySelectorAll('nav a')].map((a) => a.hash)")
    assert len(links) > 15
    assert browser.run(f"{links!r}.every((at) => document.querySelector(at + ' h2'))")
    files = browser.run("[...document.querySelectorAll('.files a')].map((a) => a.pathname)")
    assert files
    assert all((page.parent / "tables" / name.rsplit("/", 1)[1]).is_file() for name in files)
    assert len(files) == browser.run("document.querySelectorAll('table').length")
    told = browser.run(
        "[...document.querySelectorAll('figure')].map((f) => ["
        "f.querySelector('[role=img]').ariaLabel, f.querySelector('.words p').textContent])"
    )
    assert len(told) == 6
    assert all(words and label.endswith(words) for label, words in told)
