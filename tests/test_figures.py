"""Figures and the page, by what is in them."""

import pytest

import hlora
from hlora.core.layers import layer_grid
from hlora.study import figures
from hlora.study.page import Part, write
from hlora.study.rows import Results, Row
from hlora.study.tables import Table
from tests.results_lines import line

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
    assert '<tr class="strong"><td>c</td>' in page
    assert "--phi 1 &lt; x" in page
    for outside in ('src="http', 'href="http', "src=", "<script", "@import"):
        assert outside not in page
