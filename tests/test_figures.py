"""Figures and the page, by what is in them."""

import pytest

import hlora
from hlora.core.layers import layer_grid
from hlora.study import plots as figures
from hlora.study.html import Section, Table, write_report

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
    figures.save_figure(figures.heatmap(NORMS, "title"), path)
    assert path.stat().st_size > 1000


def test_a_figure_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(hlora.InputError, match="cannot be written"):
        figures.save_figure(figures.heatmap(NORMS), tmp_path / "file" / "a.png")


def test_curves_and_bars_name_their_parts():
    log = [{"step": i, "loss": 3.0 - i, "R": i, "penalty": i / 10, "total_loss": 3.0 - 0.9 * i}
           for i in range(3)]  # fmt: skip
    svg = figures.as_svg(figures.loss_curves(log))
    assert svg.startswith("<svg")
    assert all(word in svg for word in ("task", "total", "φR", "optimizer step"))
    assert "plain" in figures.as_svg(figures.several_losses({"plain": log, "ours": log}))
    bars = figures.as_svg(
        figures.forgetting_chart({"docs": {"a": (0.1, 0.01), "b": (-0.1, 0.02)}}, highlight="a")
    )
    assert all(word in bars for word in ("docs", "nats per token", ">a<", ">b<"))


def test_figures_without_their_keys_still_draw():
    log = [{"step": 1, "loss": 2.0}]
    assert "<svg" in figures.as_svg(figures.loss_curves(log))


def test_the_page_stands_alone_and_escapes_text(tmp_path):
    path = tmp_path / "r.html"
    write_report(
        path, "A <title>", "lead & more",
        [Section("One", "text", Table(["m", "x"], [["a<b", "1"], ["c", "2"]], strong="c"),
                 [("<svg id='s'></svg>", "a caption")], "hlora demo --phi 1 < x")],
    )  # fmt: skip
    page = path.read_text("utf-8")
    assert "A &lt;title&gt;" in page
    assert "a&lt;b" in page
    assert "<svg id='s'></svg>" in page
    assert '<tr class="strong"><td>c</td>' in page
    assert "--phi 1 &lt; x" in page
    for outside in ("http://", "https://", "src=", "<script", "@import"):
        assert outside not in page
