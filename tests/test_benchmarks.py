"""The benchmarks run and print what the docs are made of; no time is asserted."""

import json
import sys

import pytest

from benchmarks import importance, kinds, page, step

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::SyntaxWarning"
)


def run(module, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, argv)])
    module.main()


def test_the_cost_page_is_made_from_the_two_benchmarks(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    run(step, monkeypatch, "--shapes", "tiny", "--batches", 2, "--tokens", 16, "--repeats", 2,
        "--json", "s.json")  # fmt: skip
    run(importance, monkeypatch, "--shapes", "tiny", "--batch", 2, "--tokens", 16, "--timed", 2,
        "--json", "i.json")  # fmt: skip
    run(page, monkeypatch, "--step", "s.json", "--importance", "i.json", "--output", "cost.md")
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert {r["addition"] for r in rows} == {
        "record, plain torch", "record, dense", "record, factored", "penalty, plain torch",
        "penalty, fp32", "penalty, bf16", "penalty, int8", "penalty, factored",
    }  # fmt: skip
    assert all(r["step_ms"] > 0 and r["added_ms"] > 0 for r in rows)
    text = (tmp_path / "cost.md").read_text()
    assert "EWC-LoRA, as published" in text
    assert "tiny, q,v" in text
    assert (tmp_path / "cost.svg").is_file()


def test_the_peers_compute_the_same(monkeypatch):
    """A benchmark against something else would be worth nothing."""
    import torch

    from benchmarks.peers import PlainPenalty, PlainRecord
    from benchmarks.step import Bench
    from hlora.importance import Dense, DenseTrace
    from hlora.lowrank import LowRank
    from hlora.pairs import group

    bench = Bench("tiny", "q,v", 4, 2, 16)
    optimizer = torch.optim.AdamW(bench.trained, lr=1e-3)
    import hlora

    ours = hlora.Record("unused", kind="dense")
    ours.start(bench.model, optimizer)
    plain = PlainRecord(bench.pairs, optimizer)
    for _ in range(2):
        bench.step(optimizer)
    assert isinstance(ours._trace, DenseTrace)
    stacked = {n: o for g, t in ours._trace.omega.items() for n, o in zip(g, t, strict=True)}
    for pair, omega in zip(bench.pairs, plain.omega, strict=True):
        torch.testing.assert_close(stacked[pair.name], omega, rtol=1e-2, atol=1e-9)

    Omega = {p.name: torch.rand(p.shape[:2]) for p in bench.pairs}
    dense, groups = Dense(Omega), group(bench.pairs)
    dense.arrange(groups)
    peer = PlainPenalty(bench.pairs, torch.optim.SGD(bench.trained, lr=1.0), Omega, 0.5)
    start = {g.names: g.factors() for g in groups}
    bench.step(optimizer)
    bench.model.zero_grad()
    peer.add(optimizer)
    for g in groups:
        _, dP, _ = dense.pull(g, LowRank.moved(*start[g.names], *g.factors(), g.s))
        expected = 0.5 * g.s * dP[:, :, : g.r]
        for pair, dB in zip(g.pairs, expected, strict=True):
            torch.testing.assert_close(pair.B.grad, dB, rtol=1e-3, atol=1e-6)


def test_the_kinds_study_runs_and_goes_on(tiny, tmp_path, monkeypatch, capsys):
    pytest.importorskip("mendeleev")
    monkeypatch.chdir(tmp_path)
    argv = ["--model", tiny, "--quick", "--results", "k.jsonl", "--work", "w"]
    run(kinds, monkeypatch, *argv, "--seeds", 0)
    before = (tmp_path / "k.jsonl").read_text()
    run(kinds, monkeypatch, *argv, "--seeds", 0, 1, "--page", "kinds.md")
    after = (tmp_path / "k.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 2 * len(kinds.ROWS)
    assert "| factored − dense |" in capsys.readouterr().out
    assert "| factored − dense |" in (tmp_path / "kinds.md").read_text()
