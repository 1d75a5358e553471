"""Figures and the page, by what is in them."""

import base64
import hashlib
import re

import pytest

import hlora
from hlora.core.layers import layer_grid
from hlora.study import figures
from hlora.study.alternatives import in_words
from hlora.study.cells import Table
from hlora.study.cost import costs
from hlora.study.page import Part, write
from hlora.study.rows import Results, Row
from tests.results_lines import line, study

pytest.importorskip("matplotlib")

NORMS = {
    f"model.layers.{i}.self_attn.{t}": 10.0**-i for i in (0, 1, 10) for t in ("q_proj", "v_proj")
}


def test_layers_are_laid_out_by_block_and_target():
    targets, blocks, rows = layer_grid({**NORMS, "lm_head": 3.0})
    assert targets == ["q_proj", "v_proj", "lm_head"]
    assert blocks == [0, 1, 10]
    assert rows[0] == [1.0, 0.1, 1e-10]
    assert rows[2] == [3.0, None, None]


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_heatmap_is_drawn(tmp_path, suffix):
    path = tmp_path / "sub" / f"a.{suffix}"
    figures.save_figure(figures.heatmap(NORMS), path)
    assert path.stat().st_size > 1000


def test_a_figure_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(hlora.InputError, match=r"a\.png"):
        figures.save_figure(figures.heatmap(NORMS), tmp_path / "file" / "a.png")


def test_bars_of_forgetting_name_kinds_and_models(tmp_path):
    runs = [("base", None), ("lora-mu", None), ("hlora", 0.01)]
    results = Results([line(m, "sciq", 0, phi) for m, phi in runs], [], [])
    figure = figures.forgetting_bars(results, Row("hlora", 0.01))
    svg = figures.save_both(figure, tmp_path / "bars")
    assert svg.startswith("<svg")
    for word in ("nats per token", "(unseen)", ">lora-mu<", ">hlora<"):
        assert word in svg
    assert ">base<" not in svg


def test_the_page_stands_alone_and_escapes_text(tmp_path):
    path = tmp_path / "r.html"
    heatmap = figures.heatmap(NORMS)
    parts = [
        Part("One", "text", Table(["m", "x"], [["a<b", "1"], ["c", "2"]], strong="c"),
             [("norms", heatmap, "a caption")], "hlora demo --phi 1 < x"),
    ]  # fmt: skip
    assert write(parts, path, title="A <title>", lead="lead & more") == [path]
    page = path.read_text("utf-8")
    assert "A &lt;title&gt;" in page
    assert "a&lt;b" in page
    assert "a caption" in page
    assert page.count("<svg") == 1
    assert re.search(r'<tr class="strong">\s*<th scope="row">c</th>', page)
    assert "--phi 1 &lt; x" in page
    for outside in ('src="http', 'href="http', "src=", "<script ", "@import"):
        assert outside not in page
    assert page.count("<script>") == 1
    assert (tmp_path / "tables" / "one.csv").read_text("utf-8") == "m,x\na<b,1\nc,2\n"


def test_only_the_page_s_own_script_may_run(tmp_path):
    write([Part("One", "text")], tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text("utf-8")
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    [policy] = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)
    assert {"default-src 'none'", f"script-src 'sha256-{digest}'"} <= set(policy.split("; "))


def test_parts_of_one_title_have_anchors_of_their_own(tmp_path):
    parts = [
        Part("Ünder: <b>", table=Table(["m"], [])),
        Part("Under b"),
        Part("日本"),
        Part("日本"),
    ]
    write(parts, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text("utf-8")
    assert re.findall(r'<section id="([^"]+)"', page) == ["under-b", "under-b-2", "part", "part-2"]
    assert re.findall(r'<li><a href="#([^"]+)"', page) == ["under-b", "under-b-2", "part", "part-2"]


def test_a_figure_is_told_in_words():
    said = in_words(figures.heatmap(NORMS))
    assert "largest v_proj 0 1, q_proj 0 1, v_proj 1 0.1" in said
    assert "v_proj 10 1e-10" in said
    results = Results(study(), [], [])
    pair = Row("hlora", 0.01), Row("ewc", 0.01)
    [value] = [v for s, v in results.values("ppl_seen", pair[0], "sciq").items() if s == 1]
    assert f", {value:.4g}," in in_words(figures.violins(results, *pair))
    phi = in_words(figures.phi_curves(results))
    mean = results.mean("forgetting_seen", Row("hlora", 0.003), "piqa")
    assert "forgot, seen against φ: no penalty (ν+μ) level at" in phi
    assert f"HLoRA {mean:.3g} at 0.003" in phi
    losses = in_words(figures.losses(results, pair[0]))
    assert "φR 0 at 0, 0.02 at 1, 0.01 at 2" in losses
    bars = in_words(figures.cost_bars(costs(results)))
    assert bars.count("EWC-LoRA, as published") == 2
    assert "20,000 sequences 2,000;" in bars


def test_a_legend_says_which_methods_have_fewer_seeds():
    runs = [("lora-mu", 0, None), ("lora-mu", 1, None), ("kl", 0, 1.0), ("kl", 0, 4.0),
            ("kl", 1, 4.0)]  # fmt: skip
    results = Results([line(m, "sciq", s, phi) for m, s, phi in runs], [], [])
    for draw, fewer in ((figures.frontier, [False, True]), (figures.phi_curves, [True])):
        labels = [text.get_text() for text in draw(results).legends[0].get_texts()]
        assert [label.endswith(" (1 of 2 seeds)") for label in labels] == fewer


def test_a_line_joins_the_same_seeds():
    """A mean over two seeds beside one of the first alone would bend it."""
    runs = [("lora-mu", 0, None), ("kl", 0, 1.0), ("kl", 0, 4.0), ("kl", 1, 4.0)]
    found = Results([line(m, "sciq", s, phi) for m, s, phi in runs], [], [])
    first = Results([r for r in found.lines if r["run"]["seed"] == 0], [], [])
    apart = Results([r for r in found.lines if r["run"] != found.lines[2]["run"]], [], [])
    for draw in (figures.frontier, figures.phi_curves):
        drawn, alone, unlike = (
            [xy.get_xydata().tolist() for axes in draw(of).axes for xy in axes.lines]
            for of in (found, first, apart)
        )
        assert drawn == alone
        assert unlike != alone  # no seed in common: each has its own


def test_a_legend_is_whole_and_of_all_panels():
    methods = ("lora-mu", "kl", "blend-looked-seldom", "lora-rewound", "kl-own", "blend-own")
    runs = [("lora-mu", "piqa", 0, None)]
    runs += [(m, "sciq", seed, 1.0) for m in methods for seed in (0, 1)[: 1 + (m == "kl")]]
    figure = figures.frontier(Results([line(*run) for run in runs], [], []))
    [legend] = figure.legends
    assert len(legend.get_texts()) == len(methods)
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.width


def test_the_frontier_is_of_the_kl_where_every_run_measured_it():
    lines = [line(m, "sciq", 0, phi) for m, phi in (("lora-mu", None), ("ewc", 1.0))]
    unmeasured = {
        **lines[0],
        "text": {k: {**v, "divergences": []} for k, v in lines[0]["text"].items()},
    }
    for of, scale in ((lines, "log"), ([unmeasured, *lines[1:]], "linear")):
        figure = figures.frontier(Results(of, [], []))
        assert figure.axes[0].get_yscale() == scale
        assert ("KL, unseen" in in_words(figure)) == (scale == "log")
