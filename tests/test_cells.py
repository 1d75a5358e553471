"""What the cells of a report's tables say, as figures, Markdown and CSV."""

import csv
import io

import pytest

from hlora.study.cells import Figure, Table, figure_of

METHODS = Table(
    ["method", "NLL", "p", "gain", "p", "n"],
    [
        ["Base", "4.100 ± 0.010", "< 0.001", "0.000 [-0.100, 0.200]", "0.500", "1,024"],
        ["LoRA", "3.100 ± 0.020", "–", "1.500 [1.000, 2.000]", "–", "3"],
        ["held", "3.100 (n = 1)", "0.040", "not reached", "0.001", "1"],
        ["=1+1", "–", "–", "–", "–", "–"],
    ],
    best={1: min, 3: max},
    apart=frozenset({"Base"}),
)


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ("+0.05 ± 0.01", ("+0.05", "0.01", None, None)),
        ("-0.100 [-0.200, +0.100]", ("-0.100", None, "-0.200", "+0.100")),
        ("23,656", ("23656", None, None, None)),
        ("3.1 (n = 1)", ("3.1", None, None, None)),
        ("< 0.001", ("0.001", None, None, None)),
    ],
)
def test_a_cell_is_one_figure(cell, said):
    assert figure_of(cell) == Figure(*said)


@pytest.mark.parametrize(
    "cell", ["", "–", "not reached", "nan", "3 × holds", "1.0 / 2.0", "=1", "2b"]
)
def test_words_are_no_figure(cell):
    assert figure_of(cell) is None


def test_the_best_of_a_column_is_marked_as_far_as_its_digits_show():
    assert METHODS.marked == {(1, 1), (2, 1)}  # one alone is no best
    assert METHODS.markdown()[3].startswith("| LoRA | **3.100 ± 0.020** | – | 1.500 ")
    alone = Table(["m", "x"], [["a", "1"], ["Base", "0"]], best={1: min}, apart=METHODS.apart)
    assert not alone.marked


def test_figures_stand_to_the_right_and_words_to_the_left():
    assert METHODS.numeric == [False, True, True, True, True, True]
    words = Table(["m", "x", "y"], [["a", "3", "–"], ["b", "none", "1"], ["c", "none", "–"]])
    assert words.markdown()[1] == "| --- | --- | ---: |"
    assert Table(["a", "b"], []).markdown()[1] == "| --- | --- |"


def test_csv_has_a_column_for_every_number():
    head, *rows = csv.reader(io.StringIO(METHODS.csv()))
    assert head == [
        "method", "NLL", "NLL, one standard error", "NLL, p", "gain", "gain, low", "gain, high",
        "gain, p", "n",
    ]  # fmt: skip
    assert rows[0] == [
        "Base", "4.100", "0.010", "< 0.001", "0.000", "-0.100", "0.200", "0.500", "1024"
    ]  # fmt: skip
    assert rows[2] == ["held", "3.100", "", "0.040", "not reached", "", "", "0.001", "1"]


def test_no_cell_of_a_csv_is_a_formula_or_a_command():
    evil = ["=cmd|x", "@SUM(A1)", "+1+1", "-2+3", "\t=1", "a\x1b[2J", 'q"\n,=1']
    text = Table(evil, [evil, ["-0.5"] * len(evil)]).csv()
    head, row, figures = csv.reader(io.StringIO(text))
    assert head == row == [
        "'=cmd|x", "'@SUM(A1)", "'+1+1", "'-2+3", "\\t=1", "a\\x1b[2J", 'q"\n,=1'
    ]  # fmt: skip
    assert figures == ["-0.5"] * len(evil)


def test_a_bound_is_a_figure_and_stays_a_bound():
    rows = [["a", "≤ 0.020 [0.010, 0.030]"], ["b", "0.050 [0.040, 0.060]"], ["c", "–"]]
    table = Table(["method", "KL"], rows, best={1: min})
    assert figure_of("≤ 0.020 [0.010, 0.030]") == ("0.020", None, "0.010", "0.030")
    assert table.numeric == [False, True]
    assert table.marked == {(0, 1)}
    assert table.csv().splitlines()[:2] == [
        'method,KL,"KL, low","KL, high"',
        "a,≤ 0.020,0.010,0.030",
    ]
