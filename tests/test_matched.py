"""Forgetting at a share of what LoRA learns: worked out by hand, and the bootstrap's errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hlora.study import tables
from hlora.study.matched import CONTRASTS, LATER, MARGIN, Matched, estimate, holm
from hlora.study.methods import METHODS
from hlora.study.metrics import METRICS
from hlora.study.rows import Results
from tests.results_lines import line


def a_run(method, seed=0, phi=None, nll=1.0, kl=0.0, rise=0.0, noise=0.0):
    """NLL of 5 at the base; two far kinds, one near; every document alike but for the noise."""
    made = line(method, "a", seed, phi=phi)
    wobble = noise * np.linspace(-1, 1, 40)
    made["losses"] = [nll] * 20
    made["seen"], made["unseen"] = ["near"], ["far", "farther"]
    made["text"] = {
        kind: {
            "loss": 3.0, "tokens": 40, "blocks": list(3.0 + times * rise + wobble),
            "divergences": [] if method == "base" else list(times * (kl + wobble)),
        }
        for kind, times in (("near", 0.5), ("far", 1), ("farther", 3))
    }  # fmt: skip
    made["forgetting"] = {k: {"nats": 0.0, "se": 0.0} for k in ("seen", "unseen", *made["text"])}
    return made


def results(*lines):
    return Results([a_run("base", nll=5.0), *lines], [], [])


def test_between_two_strengths_a_line_is_read():
    found = results(
        a_run("lora-mu", nll=1.0, kl=0.2, rise=0.1),
        a_run("kl", phi=1.0, nll=1.2, kl=0.1, rise=0.05),  # 95 % of the gain of 4
        a_run("kl", phi=4.0, nll=2.0, kl=0.025, rise=0.015),  # 75 %
    )
    of = Matched.of(found, "a")
    assert of.plain()[0] == pytest.approx(0.4)  # the mean of 0.2 and 0.6
    assert of.least("kl", 0.95)[0] == pytest.approx(0.2)
    assert of.least("kl", 0.99)[0] == pytest.approx(0.4 * 0.5**0.2)  # a fifth of the way, in logs
    assert of.least("kl", 0.85)[0] == pytest.approx(0.2 * 0.25**0.5)
    assert of.least("kl", 0.75)[0] == pytest.approx(0.05)
    by_loss = Matched.of(found, "a", measure="loss")
    assert by_loss.least("kl", 0.95)[0] == pytest.approx(0.1)
    assert by_loss.least("kl", 0.85)[0] == pytest.approx((0.1 + 0.03) / 2)  # it may be below zero
    assert Matched.of(found, "a", "seen").least("kl", 0.95)[0] == pytest.approx(0.05)
    assert of.least("kl", 0.95)[1:].std() < 1e-12  # documents and questions that are all alike


def test_the_strongest_run_is_a_bound_and_nothing_is_extrapolated():
    found = results(a_run("lora-mu", kl=0.2), a_run("kl", phi=1.0, nll=2.0, kl=0.1))
    of = Matched.of(found, "a")
    assert of.least("kl", 0.5)[0] == pytest.approx(0.2)
    assert of.bounded("kl", 0.5)
    assert not of.bounded("kl", 0.9)
    cells = dict(zip((table := tables.matched(found, "a")).headings, table.rows[-1], strict=True))
    assert not cells["KL, far, at 95%"].startswith("≤")
    weaker = results(a_run("lora-mu", kl=0.2), a_run("kl", phi=1.0, kl=0.1))
    assert tables.matched(weaker, "a").rows[-1][1].startswith("≤ 0.2")


def test_runs_that_are_far_apart_are_not_joined():
    """Between plain LoRA and a run that forgets a tenth as much, nothing is known."""
    lora = a_run("lora-mu", nll=1.0, kl=0.2)
    for kl, joined in ((0.06, True), (0.02, False)):
        of = Matched.of(results(lora, a_run("kl", phi=4.0, nll=1.4, kl=kl)), "a")
        assert math.isfinite(of.least("kl", 0.95)[0]) == joined
        assert of.least("kl", 0.9)[0] == pytest.approx(2 * kl)  # at the run itself
        if not joined:
            table = tables.matched(of.results, "a")
            assert table.rows[-1][1:3] == ["–", "–"]


def test_runs_are_joined_by_what_they_are_held_with_not_by_the_loss():
    """A loss below the base's may rise again as a method holds more strongly."""
    found = results(
        a_run("lora-mu", nll=1.0, kl=0.2, rise=0.1),
        a_run("kl", phi=1.0, nll=1.2, kl=0.1, rise=-0.03),
        a_run("kl", phi=4.0, nll=2.0, kl=0.05, rise=-0.02),
    )
    of = Matched.of(found, "a", measure="loss")
    assert [p.gone for p in of.curve("kl")[0]] == pytest.approx([0.4, 0.2, 0.1])
    assert of.least("kl", 0.99)[0] == pytest.approx(2 * (0.1 - 0.13 * 0.2))


def test_a_method_is_read_where_it_forgets_least():
    """A strength that learns more and forgets less beats those before it."""
    found = results(
        a_run("lora-mu", nll=1.0, kl=0.2), a_run("kl", phi=1.0, nll=1.4, kl=0.15),
        a_run("kl", phi=2.0, nll=0.9, kl=0.05),
    )  # fmt: skip
    of = Matched.of(found, "a")
    assert of.least("kl", 0.99)[0] == pytest.approx(0.1)
    assert [p.gone for p in of.curve("kl")[0]] == pytest.approx([0.4, 0.3, 0.1])


def test_a_gain_that_is_not_reached_is_said():
    found = results(
        a_run("lora-mu", nll=1.0, kl=0.2), a_run("lora-nu-mu", nll=2.0, kl=0.3),
        a_run("hlora", phi=0.1, nll=3.0, kl=0.1),
    )  # fmt: skip
    of = Matched.of(found, "a")
    assert of.least("hlora", 0.99)[0] == math.inf
    assert of.least("hlora", 0.5)[0] == pytest.approx(0.2)
    table = tables.matched(found, "a")
    assert table.rows[-1][0] == METHODS["hlora"].label
    assert table.rows[-1][1] == "–"


def test_a_rewound_method_begins_where_that_method_ended():
    """And not at plain LoRA: no line leads from there to it."""
    found = results(
        a_run("lora-mu", nll=1.0, kl=0.2), a_run("blend", phi=0.3, nll=1.1, kl=0.1),
        a_run("blend-rewound", phi=0.5, nll=1.5, kl=0.02),
    )  # fmt: skip
    points = Matched.of(found, "a").curve("blend-rewound")[0]
    assert [p.lost[0] for p in points] == pytest.approx([0.2, 0.04])


def test_differences_are_paired_over_documents():
    """That documents differ, which all methods share, is no error of a difference."""
    found = results(
        a_run("lora-mu", nll=1.0, kl=0.2, noise=0.1),
        a_run("blend", phi=1.0, nll=1.0, kl=0.10, noise=0.1),
        a_run("kl", phi=1.0, nll=1.0, kl=0.101, noise=0.1),
    )
    of = Matched.of(found, "a")
    single = estimate(of.least("blend", 0.99))
    assert single.low < single.value - 0.02
    assert single.value + 0.02 < single.high
    difference = estimate(of.least("blend", 0.99) - of.least("kl", 0.99))
    assert difference.value == pytest.approx(-0.002)
    assert difference.high - difference.low < 1e-9
    assert difference.alike
    assert difference.p < 0.01
    assert not estimate(of.least("blend", 0.99) - of.plain()).alike


def test_the_error_over_seeds_is_the_bootstrap_s():
    gains = {0: 0.08, 1: 0.10, 2: 0.15}
    found = results(
        *(a_run("lora-mu", s, nll=1.0, kl=0.2) for s in gains),
        *(a_run("blend", s, phi=1.0, nll=1.0, kl=kl) for s, kl in gains.items()),
        a_run("kl", 0, phi=1.0, nll=1.0, kl=0.1),
    )
    of = Matched.of(found, "a")
    draws = of.least("blend", 0.99)
    assert draws[0] == pytest.approx(2 * np.mean(list(gains.values())))
    assert draws[1:].std() == pytest.approx(2 * np.std(list(gains.values())) / 3**0.5, rel=0.1)
    # A method with fewer seeds is read on those, and compared on those that both have.
    assert (of.seeds("kl"), of.seeds("blend"), of.seeds("kl", "blend")) == ([0], [0, 1, 2], [0])
    assert of.least("kl", 0.99)[0] == pytest.approx(0.2)
    assert of.least("blend", 0.99, [0])[0] == pytest.approx(2 * gains[0])
    assert of.least("kl-own", 0.99) is None
    rows = {row[0]: row[-1] for row in tables.matched(found, "a").rows}
    assert rows == {
        METHODS["lora-mu"].label: "3", METHODS["blend"].label: "3", METHODS["kl"].label: "1"
    }  # fmt: skip


def test_no_table_where_the_runs_do_not_tell():
    assert (
        tables.matched(Results([line("base", "a", 0), line("lora-mu", "a", 0)], [], []), "a")
        is None
    )
    assert tables.contrasts(results(a_run("lora-mu", kl=0.2))) is None


def test_first_runs_of_another_seed_hide_no_contrast():
    def of_seed(seed, *strengths):
        runs = [a_run("lora-mu", seed, nll=1.0, kl=0.4)]
        for method in ("held-own", "kl"):
            runs += [a_run(method, seed, phi=phi, nll=nll, kl=0.2 / phi) for phi, nll in strengths]
        return runs

    whole, begun = [(1.0, 1.1), (2.0, 1.5)], [(1.0, 1.1)]  # 87.5 % of the gain, and 97.5 %
    one = tables.contrasts(results(*of_seed(0, *whole)))
    two = tables.contrasts(results(*of_seed(0, *whole), *of_seed(1, *begun)))
    both = tables.contrasts(results(*of_seed(0, *whole), *of_seed(1, *whole)))
    assert [[row[2:4] for row in of.rows] for of in (one, two, both)] == [
        [["99%", seeds], ["95%", seeds]] if seeds == "2" else [["99%", of_99], ["95%", "1"]]
        for seeds, of_99 in (("1", "1"), ("1", "2"), ("2", "2"))
    ]  # with 99 % both seeds can be read: a stronger run keeps less


def test_a_seed_that_tells_nothing_hides_no_figure_and_is_said():
    """And such a mean over some of the seeds is not the best of a column."""
    found = results(
        *(a_run("lora-mu", seed, nll=1.0, kl=0.4) for seed in (0, 1)),
        a_run("kl", 0, phi=1.0, nll=1.02, kl=0.1), a_run("kl", 1, phi=1.0, nll=1.1, kl=0.05),
        *(a_run("blend", seed, phi=1.0, nll=1.02, kl=0.2) for seed in (0, 1)),
    )  # fmt: skip
    table = tables.matched(found, "a")
    cells = {row[0]: row[1:] for row in table.rows}
    assert cells[METHODS["kl"].label][0] == "≤ 0.200 [0.200, 0.200] (1 of 2)"
    assert cells[METHODS["blend"].label][0] == "≤ 0.400 [0.400, 0.400]"
    marked = {table.rows[i][0] for i, column in table.marked if column == 1}
    assert marked == {METHODS["blend"].label}
    assert "≤ 0.200,0.200,0.200" in table.csv()


def test_contrasts_are_corrected_for_their_number():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert {m for pair in [*CONTRASTS, *LATER] for m in pair} <= set(METHODS)
    of = {m: a_run(m, phi=1.0, kl=0.4 + i / 500) for i, m in enumerate(METHODS) if m != "lora-mu"}
    weak = [a_run(m, phi=1.0, kl=0.8, nll=1.0) for m in of if m != "base"]
    strong = [{**r, "run": {**r["run"], "phi": 2.0}, "losses": [1.3] * 20} for r in of.values()]
    found = results(a_run("lora-mu", kl=0.9), *weak, *strong[1:])
    table = tables.contrasts(found)
    # 92.5 % of the gain at the strongest: both shares are read between two runs.
    marks = [row[0].endswith("*") for row in table.rows]
    assert marks == [*[False] * 2 * len(CONTRASTS), *[True] * 2 * len(LATER)]
    assert not tables.not_run(found)
    only_bounds = results(a_run("lora-mu", kl=0.9), *weak)
    assert tables.contrasts(only_bounds) is None
    assert len(tables.not_run(results(a_run("kl", phi=1.0)))) == len(CONTRASTS) + len(LATER)
    assert f"within ±{MARGIN:g}" in table.headings


def test_kl_counts_every_kind_alike():
    run = a_run("lora-mu", kl=0.2)  # and 0.6 farther away
    assert METRICS["kl_unseen"].of(run) == pytest.approx(0.4)
    run["text"]["far"]["divergences"] = [1.0]  # of one document
    assert METRICS["kl_unseen"].of(run) == pytest.approx(0.8)
    assert METRICS["kl_seen"].of(run) == pytest.approx(0.1)
    assert METRICS["kl_unseen"].of(line("base", "a", 0)) is None
