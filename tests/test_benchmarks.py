"""The benchmarks run and print what the docs are made of; no time is asserted."""

import json
import sys

import pytest
import torch

from benchmarks import host, importance, page, runaways, shapes, step, storage, targets
from hlora.core import store
from hlora.core.importance.dense import Dense
from hlora.core.importance.factored import Factored
from hlora.hf.peft import find_pairs
from hlora.hf.record import save_importance
from tests.conftest import lora_model
from tests.reference import sequence_gradients

pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::SyntaxWarning"
)


def run(module, monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, argv)])
    module.main()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The file of all benchmarks, at the size of a test."""
    place = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(storage, "WHOLE", ["tiny", "llama-3.2-3b"])
        run(step, patch, "--shapes", "tiny", "--batches", 2, "--tokens", 16, "--repeats", 2)
        run(importance, patch, "--shapes", "tiny", "--batch", 2, "--tokens", 16, "--timed", 2)
        run(storage, patch)
        run(host, patch)
    return place / "results/cost.json"


@pytest.fixture
def measured(results):
    """The rows of each."""
    return {part: of["rows"] for part, of in json.loads(results.read_text()).items()}


def test_the_cost_page_is_made_from_the_benchmarks(results, measured, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    rows = measured["step"]
    assert {r["addition"] for r in rows} == {
        "record, plain torch", "record, dense", "record, factored", "penalty, plain torch",
        "penalty, fp32", "penalty, bf16", "penalty, int8", "penalty, factored",
        "penalty, kronecker", "penalty, sketch", "penalty, blend", step.LOOKS,
    }  # fmt: skip
    assert all(r["step_ms"] > 0 and r["added_ms"] > 0 and r["floor_ms"] > 0 for r in rows)
    run(page, monkeypatch, "--json", results, "--output", tmp_path / "cost.md")
    text = (tmp_path / "cost.md").read_text()
    for part in ("EWC-LoRA, as published", "tiny, q,v", "| the LoRA step |", "not measured"):
        assert part in text
    assert "## The kernels" not in text  # they were not compiled
    assert (tmp_path / "cost.svg").is_file()


def test_the_host_waits_for_nothing_in_a_step(measured):
    rows = {r["addition"]: r for r in measured["host"]}
    assert {name: r["waits"] for name, r in rows.items()} == dict.fromkeys(rows, 0)
    for name in ("record, dense", "record, factored", "penalty, fp32", "penalty, factored"):
        assert 0 < rows[name]["percent"] < 2  # no loop over the 56 matrices


def test_waiting_is_seen():
    assert host.counted(lambda: float(torch.ones(2).sum())).waits == ["_local_scalar_dense"]


def test_the_sizes_that_are_counted_are_those_of_files(tmp_path):
    model = shapes.lora_model("tiny", "q,v", 4, torch.device("cpu"))
    pairs = find_pairs(model)
    dense = Dense({p.name: torch.rand(p.shape[:2]) for p in pairs})
    kinds = {f"dense {form}": dense.stored_as(form) for form in ("fp32", "bf16", "int8")}
    kinds["factored"] = Factored.of_dense(dense.decoded())
    for name, kind in kinds.items():
        save_importance(tmp_path / name, model, pairs, kind, {})
        written = (tmp_path / name / store.TENSORS).stat().st_size
        counted = storage.size_of(pairs, *storage.FORMS[name])
        assert counted <= written < counted + 200 * len(pairs) + 500  # the file's header


def test_what_was_to_be_reached_is_judged(measured):
    parts = [measured[p] for p in ("step", "importance", "storage")]
    words = {what: word for what, *_, word in targets.verdicts(*parts)}
    assert words["factored: on disk, of EWC-LoRA's"] == "reached"
    assert words["record, dense: of a step"] == "not measured"
    row = {
        "shape": targets.SHAPE, "targets": "q,v", "rank": 8, "batch": 20, "tokens": 128,
        "addition": "record, dense", "added_percent": 1.6, "added_peak_bytes": 1 << 20,
    }  # fmt: skip
    found = {what: rest for what, *rest in targets.verdicts([row], [], [])}
    assert found["record, dense: of a step"] == ["≤ 1.5 %", "1.6 %", "missed"]
    assert found["record, dense: peak memory"][-1] == "reached"


def test_runaway_sequences_are_named(tiny, tmp_path, monkeypatch, capsys):
    text = tmp_path / "sums.jsonl"
    text.write_text(
        "".join(json.dumps({"text": f"{n} and {n} are {2 * n}. " * 9}) + "\n" for n in range(40))
    )
    run(runaways, monkeypatch, "--model", tiny, "--text", text, "--tokens", 16, "--blocks", 12)
    row = capsys.readouterr().out.splitlines()[-1].split(" | ")
    assert row[:3] == ["| sums", "12", "fp32"]
    assert row[4] == "0 of 4"
    assert row[5].endswith("_proj")
    model = lora_model(dtype=torch.float64)
    model.eval()
    pairs, rows = find_pairs(model), torch.randint(3, 60, (10, 9))
    sizes, _ = runaways.looked_at(model, rows, 0, "corpus")
    for name, g in sequence_gradients(model, pairs, rows).items():
        torch.testing.assert_close(sizes[name], g.square().sum((1, 2)), rtol=1e-5, atol=0)
    delta, x = torch.ones(2, 4, 3), torch.ones(2, 4, 5)
    delta[0, 2], x[1, 3] = 3.0, 2.0
    for t, row, token in ((delta, 0, 2), (x, 1, 3)):
        long = t.clone()
        long[row, token] *= 10
        size, place = runaways.of_batch(*((long, x) if t is delta else (delta, long)))
        assert (size.argmax(), place[row]) == (row, token)


def test_the_peers_compute_the_same(monkeypatch, tmp_path):
    """A benchmark against something else would be worth nothing."""
    import torch

    from benchmarks.peers import PlainPenalty, PlainRecord
    from benchmarks.step import Bench
    from hlora.core.importance.dense import Dense, DenseTrace
    from hlora.core.lowrank import LowRank
    from hlora.core.pairs import group

    bench = Bench("tiny", "q,v", 4, 2, 16)
    optimizer = torch.optim.AdamW(bench.trained, lr=1e-3)
    import hlora

    ours = hlora.Record(tmp_path / "unused", kind="dense")
    ours.start(bench.model, optimizer)
    plain = PlainRecord(bench.pairs, optimizer)
    for _ in range(2):
        bench.step(optimizer)
    trace = ours._recorder.trace
    assert isinstance(trace, DenseTrace)
    stacked = {n: o for g, (t,) in trace.omega.items() for n, o in zip(g, t, strict=True)}
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
        change = LowRank.moved(*start[g.names], *g.factors(), g.s)
        _, by_A, _ = dense.pull(g, change, *g.factors())
        expected = 2 * 0.5 * g.s * by_A
        for pair, dB in zip(g.pairs, expected, strict=True):
            torch.testing.assert_close(pair.B.grad, dB, rtol=1e-3, atol=1e-6)
