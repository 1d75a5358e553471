"""A study, whole: every method, killed and started again, with a run that fails."""

import fcntl
import json
import shutil
from pathlib import Path

import pytest

import hlora
from hlora.cli import main as cli
from hlora.run import phases
from hlora.study import measure, spec
from hlora.study.lines import read_lines
from hlora.study.methods import METHODS
from tests.tiny import questions, write_rows, write_text

STUDIES = Path(__file__).parents[2] / "studies"


@pytest.fixture
def place(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny, tmp_path / "tiny")
    for name in "abc":
        write_text(tmp_path / f"{name}.txt", f"the {name} cat sat on a mat")
    write_rows(tmp_path / "train.jsonl", questions())
    write_rows(tmp_path / "test.jsonl", questions(8))
    shutil.copy(STUDIES / "tiny.yaml", tmp_path / "s.yaml")
    return tmp_path


def edit(place, old, new):
    path = place / "s.yaml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def few(place, *methods, seeds="[0]"):
    """These methods alone, by default with one seed."""
    text = (place / "s.yaml").read_text()
    start, end = text.index("methods:"), text.index("phi:")
    listed = "methods: [" + ", ".join(methods) + f"]\nseeds: {seeds}\n"
    (place / "s.yaml").write_text(text[:start] + listed + text[end:])


def lines(place):
    return [json.loads(x) for x in (place / "results" / "s.jsonl").read_text().splitlines()]


def test_every_method_runs_and_shares_phase_nu(place, capsys):
    edit(place, "seeds: [0, 1]", "seeds: [0]")
    assert cli.main(["study", "s.yaml"]) == 0
    out = capsys.readouterr().out
    assert "min left]" in out
    found = {(r["run"]["method"], r["run"]["phi"]): r for r in lines(place)}
    assert {m for m, _ in found} == set(METHODS)
    assert all(r["error"] is None for r in found.values())
    for (name, phi), r in found.items():
        assert (phi is not None) == METHODS[name].sweeps
        assert set(r["forgetting"]) == {"a", "b", "c", "seen", "unseen"}
        assert r["unseen"] == ["c"]
        assert r["task"]["n"] == 8
    # plain, rslora, fisher, as published, at θ^ν, with corpus labels, factored, official, paper,
    # kronecker, sketch, blend, of own text, with its text, entries, laplace, at θ^ν; and Ω = 1
    # beside the plain one and beside the Fisher.
    assert len(list((place / "work" / "nu").iterdir())) == 19
    for r in found.values():
        assert r["versions"]["torch"]
        assert r["study"]["model"] == "tiny"
    original = found["ewc-original", 0.01]["recorded"]
    assert original["all_parameters_bytes"] > found["ewc", 0.01]["importance_bytes"]
    base = found["base", None]
    assert base["forgetting"]["seen"]["nats"] == 0
    assert (
        found["hlora", 0.01]["importance_bytes"] > found["hlora-factored", 0.01]["importance_bytes"]
    )
    assert found["lora-nu-mu", None]["settings"]["tune"]["phi"] == [0]
    whole, half = (found[row] for row in (("lora-mu", None), ("lora-rewound", 0.5)))
    assert half["log"] == whole["log"]
    for kind, of in half["text"].items():
        assert 0 < sum(of["divergences"]) < sum(whole["text"][kind]["divergences"])
        assert len(of["divergences"]) == len(of["blocks"]) == 4
    assert base["text"]["a"]["divergences"] == []
    for name, at, back in (("lora", None, "nu"), ("hlora", 0.01, None)):  # half of the way to θ^ν
        end = "lora-nu-mu" if at is None else "hlora-factored"
        whole, half = found[end, at], found[f"{name}-averaged", 0.5]
        assert half["log"] == whole["log"]
        assert half["text"] != whole["text"]
        if back:
            ends = [r["forgetting"]["unseen"]["nats"] for r in (found["nu", None], whole)]
            assert min(ends) < half["forgetting"]["unseen"]["nats"] < max(ends)
    assert found["blend-rewound", 0.5]["log"][0] != found["lora-rewound", 0.5]["log"][0]
    assert found["lora-steps", 2.0]["steps"] == 2
    assert found["osf", 0.5]["settings"]["tune"]["peft"]["effective_rank"] == 0.5
    assert found["lora-rate", 0.0001]["settings"]["tune"]["learning_rate"] == 0.0001
    assert found["budget", 0.1]["settings"]["tune"]["forget_at_most"] == 0.1
    assert found["budget", 0.1]["budgeted"].keys() >= {"predicted", "measured", "share", "kept"}
    assert sum(half["losses"]) / 8 == pytest.approx(half["task"]["nll"], rel=1e-4)
    for (name, _), r in found.items():
        of = METHODS[name]
        if of.swept == "kl_weight" and name != "kl-seldom":  # one look in every fourth step
            assert any(e["R"] > 0 for e in r["log"]), r["label"]
        if (of.sweeps and of.swept == "phi" and not of.rewinds) or "paper" in name:
            assert all(e["R"] > 0 for e in r["log"]), r["label"]


def test_a_stopped_study_goes_on_and_a_half_line_is_dropped(place, capsys):
    few(place, "base", "lora-mu", "hlora-factored", "kl")
    grid = spec.read_study(place / "s.yaml")
    assert cli.main(["study", "s.yaml"]) == 0
    whole = (place / "results" / "s.jsonl").read_text()
    kept = "\n".join(whole.splitlines()[:-2]) + "\n"
    (place / "results" / "s.jsonl").write_text(kept + whole.splitlines()[-2][:50])
    capsys.readouterr()
    assert cli.main(["study", "s.yaml"]) == 0
    assert "2 runs to do" in capsys.readouterr().out
    again = (place / "results" / "s.jsonl").read_text()
    assert again.startswith(kept)
    assert {r["key"] for r in lines(place)} == {spec.key_of(grid, r) for r in spec.runs_of(grid)}
    first = {json.loads(x)["key"]: json.loads(x)["task"] for x in whole.splitlines()}
    assert {r["key"]: r["task"] for r in lines(place)} == first


def test_what_a_kill_left_beside_a_finished_phase_is_cleaned_up(place, monkeypatch):
    """The kill came after the result was in place, before its checkpoints were gone."""
    few(place, "hlora-factored")
    edit(place, "max_steps: 4, batch_size: 4", "max_steps: 4, batch_size: 4, save_steps: 2")
    with monkeypatch.context() as patched:
        patched.setattr(phases, "clean_up", lambda settings: None)
        assert cli.main(["study", "s.yaml"]) == 0
    assert list(place.rglob("checkpoint-*"))
    before = lines(place)
    (place / "results" / "s.jsonl").unlink()
    assert cli.main(["study", "s.yaml"]) == 0
    assert not list(place.rglob("checkpoints"))
    assert [r["text"] for r in lines(place)] == [r["text"] for r in before]


def test_a_second_study_on_the_same_results_is_refused(place, capsys):
    results = Path("results/s.jsonl")
    results.parent.mkdir()
    results.touch()
    with results.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)  # of another opening: as another process would
        assert cli.main(["study", "s.yaml"]) == 2
    assert f"Another process is writing to {results}" in capsys.readouterr().err


def test_a_failed_run_is_noted_and_the_others_go_on(place, capsys, monkeypatch):
    few(place, "base", "lora-mu", "lora-rewound", "hlora-factored", "hlora-averaged")
    scores = measure._scores

    def fails(of, task, adapter, *scale):
        if adapter is not None and not fails.done:
            fails.done = True
            raise RuntimeError("the roof fell in")
        return scores(of, task, adapter, *scale)

    fails.done = False
    monkeypatch.setattr(measure, "_scores", fails)
    assert cli.main(["study", "s.yaml"]) == 2
    assert (
        "1 runs failed, the first with: RuntimeError: the roof fell in" in capsys.readouterr().err
    )
    assert sum(r["error"] is not None for r in lines(place)) == 1
    assert len(lines(place)) == len(spec.runs_of(spec.read_study(place / "s.yaml")))
    assert cli.main(["study", "s.yaml"]) == 0  # what failed is tried again
    latest = {r["key"]: r for r in lines(place)}
    assert all(r["error"] is None for r in latest.values())


def test_a_phase_nu_that_fails_is_noted_by_the_runs_that_need_it(place, monkeypatch, capsys):
    few(place, "base", "lora-mu", "hlora", "hlora-factored", "hlora-averaged")
    record = spec.record_settings

    def broken(of, method, seed):
        settings = record(of, method, seed)
        if settings.kind == "factored":
            settings.text = ["nowhere.txt"]
        return settings

    monkeypatch.setattr(spec, "record_settings", broken)
    assert cli.main(["study", "s.yaml"]) == 2
    failed = [r for r in lines(place) if r["error"]]
    assert {r["run"]["method"] for r in failed} == {"hlora-factored", "hlora-averaged"}
    assert "nowhere.txt" in failed[0]["error"]


def test_several_at_once_find_the_same(place):
    few(place, "base", "l2", "ewc-nu")  # a process for each thing that is shared, and each run
    edit(place, "ewc-nu: [0.01, 0.1]", "ewc-nu: [0.01]")
    edit(place, " l2: [0.01, 0.1]", " l2: [0.01]")
    assert cli.main(["study", "s.yaml", "--results", "one.jsonl"]) == 0
    shutil.rmtree(place / "work")
    assert cli.main(["study", "s.yaml", "--results", "two.jsonl", "--jobs", "2"]) == 0
    one, two = (
        {r["key"]: (r["task"], r["text"]) for r in read_lines(Path(f))}
        for f in ("one.jsonl", "two.jsonl")
    )
    assert one == two


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("  - hlora-paper\n", "  - hlora-papr\n", "hlora-papr.*hlora"),
        ("phi:", "phy:", "phy.*phi"),
        ("model: tiny\n", "", "model"),
        ("max_steps: 4, batch_size: 4, block", "max_stps: 4, block", "max_stps.*max_steps"),
        ("train: train.jsonl, ", "", "train.*test"),
        ("tasks:", "tasks: [", r"s\.yaml"),
    ],
)
def test_a_misspelt_study_is_refused_before_it_runs(place, capsys, old, new, message):
    edit(place, old, new)
    with pytest.raises(hlora.InputError, match=message):
        spec.read_study(place / "s.yaml")
    assert cli.main(["study", "s.yaml"]) == 2
    assert not (place / "work").exists()


def test_an_unknown_metric_names_the_nearest(place):
    edit(place, "seeds:", "metrics: [acc, forgeting_seen]\nseeds:")
    with pytest.raises(hlora.InputError, match=r"forgeting_seen.*forgetting_seen"):
        spec.read_study(place / "s.yaml")


def test_phi_may_differ_by_method(place):
    edit(place, "phi: {", "phi: {hlora: [0.5], l2: [1, 2]} # {")
    grid = spec.read_study(place / "s.yaml")
    found = {
        m: [r.phi for r in spec.runs_of(grid) if r.method == m and r.seed == 0] for m in METHODS
    }
    assert (found["hlora"], found["l2"], found["ewc"]) == ([0.5], [1, 2], [None])
    edit(place, "l2: [1, 2]", "l3: [1]")
    with pytest.raises(hlora.InputError, match=r"l3.*l2"):
        spec.read_study(place / "s.yaml")


def test_dear_methods_may_run_on_few_tasks_and_seeds(place):
    edit(place, "seeds: [0, 1]", "only: {ewc-original: {seeds: [1]}}\nseeds: [0, 1]")
    runs = spec.runs_of(spec.read_study(place / "s.yaml"))
    assert {r.seed for r in runs if r.method == "ewc-original"} == {1}
    assert {r.seed for r in runs if r.method == "ewc"} == {0, 1}


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("{ewc-orignal: {seeds: [1]}}", "ewc-orignal.*ewc"),
        ("{ewc: {seed: [1]}}", "'seed'.*seeds"),
        ("{ewc: {seeds: [7]}}", "seed 7.* 0, 1"),
        ("{ewc: {tasks: [party]}}", "party.*parity"),
        ("{ewc: [1]}", "tasks and seeds"),
    ],
)
def test_wrong_limits_are_refused(place, only, message):
    edit(place, "seeds: [0, 1]", f"only: {only}\nseeds: [0, 1]")
    with pytest.raises(hlora.InputError, match=message):
        spec.read_study(place / "s.yaml")


def test_the_first_place_that_exists_is_read(place, monkeypatch):
    edit(place, "general: {a: a.txt,", "general: {a: [data/nowhere.txt, data/a.txt, owner/name],")
    edit(place, "work: work", "work: work\ndata: .")
    grid = spec.read_study(place / "s.yaml")
    run = spec.runs_of(grid)[0]
    assert grid.general["a"] == "data/a.txt"
    assert grid.where("data/a.txt") == "./a.txt"
    before = spec.key_of(grid, run)
    # The same content elsewhere is the same run; other content is another.
    (place / "d").mkdir()
    shutil.copy(place / "a.txt", place / "d" / "a.txt")
    monkeypatch.setenv("HLORA_DATA", str(place / "d"))
    assert spec.key_of(spec.read_study(place / "s.yaml"), run) == before
    (place / "d" / "a.txt").write_text("something else")
    assert spec.key_of(spec.read_study(place / "s.yaml"), run) != before
    monkeypatch.setenv("HLORA_DATA", "elsewhere")
    assert spec.read_study(place / "s.yaml").general["a"] == "owner/name"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("seeds: [0, 1]", "seeds: []", "seeds.*empty"),
        ("seeds: [0, 1]", "seeds: [a]", "seeds.*whole"),
        ("seeds: [0, 1]", "seeds: 3", "seeds.*list.* 3"),
        ("phi: {", "phi: 0.1 # {", "phi.*list"),
        ("work: work", "work: [w]", "work.*text"),
        ("general: {a: a.txt, b: b.txt}", "general: a.txt", "general.*mapping"),
        ("general: {a: a.txt,", "general: {a: {b: c},", "text or task"),
    ],
)
def test_values_of_the_wrong_kind_are_refused(place, old, new, message):
    edit(place, old, new)
    with pytest.raises(hlora.InputError, match=message):
        spec.read_study(place / "s.yaml")


def test_a_study_and_its_report(place, capsys):
    """Two commands, from a study file to the page."""
    few(place, "base", "lora-mu", "lora-nu-mu", "ewc-original", "hlora", "l2", seeds="[0, 1]")
    assert cli.main(["study", "s.yaml"]) == 0
    capsys.readouterr()
    argv = ["report", "results/s.jsonl", "--page", "r.md", "--compare", "hlora", "ewc-original"]
    assert cli.main(argv) == 0
    assert "HLoRA, φ 0.01" in capsys.readouterr().out
    page = (place / "r.md").read_text()
    for part in ("Table 1", "Fig. 3", "Fig. 4", "Fig. 5", "Fig. 6", "Fig. 7", "| extrapolated |"):
        assert part in page, part


def test_a_dry_run_lists_the_runs(place, capsys):
    assert cli.main(["study", "s.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "HLoRA on parity, seed 1, φ 0.1" in out
    assert not (place / "work").exists()


OF_THE_COMMAND = sorted(p for p in STUDIES.glob("*.yaml") if p.stem != "domains")


@pytest.mark.parametrize("path", OF_THE_COMMAND, ids=lambda p: p.name)
def test_every_study_in_the_repository_is_valid(path):
    grid = spec.read_study(path)
    assert grid.unseen
    assert spec.runs_of(grid)


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    run = {"method": "hlora", "task": "t", "seed": 0, "phi": None}
    whole = json.dumps({"key": "k", "run": run, "error": "it failed"}) + "\n"
    path = tmp_path / "r.jsonl"
    for broken in ('{"b"', "[1]", '{"c": 2}', '{"key": "k", "run": {"method": "hlora"}}'):
        path.write_text(whole + broken + "\n" + whole)
        with pytest.raises(hlora.InputError, match=r"r\.jsonl, line 2"):
            read_lines(path)
    path.write_text(whole + '{"b"')
    assert [line["key"] for line in read_lines(path)] == ["k"]
