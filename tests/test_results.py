"""Tables, claims and the report from made-up lines whose answers are known."""

import json
import math
import re
from pathlib import Path

import pytest

import hlora
from hlora.cli import main as cli
from hlora.run.means import mean_se
from hlora.run.settings import USUAL_METRICS
from hlora.study import claims, tables
from hlora.study.budgets import budgets
from hlora.study.cost import costs
from hlora.study.metrics import METRICS, perplexity
from hlora.study.page import parts
from hlora.study.paper import TABLE_1, TABLE_2, e_perplexity
from hlora.study.rows import Results, Row, read
from hlora.study.stats import shown
from tests.results_lines import line, study


def write(path, lines, tail=""):
    path.write_text("".join(json.dumps(r) + "\n" for r in lines) + tail, "utf-8")
    return path


@pytest.fixture
def whole():
    return Results(study(), [], [])


def test_the_papers_perplexity_is_converted():
    # 4.94 is 2 to the nats: log2(4.94) = 2.3045 nats, e to that is 10.02.
    assert e_perplexity(4.94) == pytest.approx(10.02, abs=0.005)
    assert e_perplexity(3.28) == pytest.approx(5.55, abs=0.005)
    for model, rows in TABLE_2.items():
        assert rows["lora-nu-mu"] == TABLE_1[model]["lora-nu-mu"]


def test_perplexity_is_over_all_tokens_of_the_kinds():
    r = line("base", "sciq", 0)
    r["text"] = {"a": {"loss": 1.0, "tokens": 30}, "b": {"loss": 2.0, "tokens": 10}}
    assert perplexity(r, ["a", "b"]) == pytest.approx(math.exp(1.25))
    assert perplexity(r, ["c"]) is None


def test_means_come_with_their_error_and_one_seed_is_said():
    assert mean_se([1.0, 3.0]) == (2.0, 1.0)
    assert shown([1.0, 3.0], 1) == "2.0 ± 1.0"
    assert shown([1.0], 1) == "1.0 (n = 1)"
    assert shown([], 1) == "–"


def test_values_are_by_seed_and_over_tasks(whole):
    row = Row("hlora", 0.01)
    assert whole.values("forgetting_seen", row, "sciq") == pytest.approx(
        {0: 0.05, 1: 0.064, 2: 0.07}, abs=0.002
    )
    assert whole.values("nll", row, "sciq") == pytest.approx({0: 4.0, 1: 4.1, 2: 4.2})
    assert [r.label for r in whole.rows][:3] == ["Base", "LoRA(μ)", "LoRA(ν+μ)"]
    # Seeds that lack a task are left out of the mean over tasks.
    short = Results(whole.lines[:-1], [], [])
    assert list(short.values("acc", Row("l2", 0.03), *whole.tasks)) == [0, 1]
    assert short.whole(Row("l2", 0.03), *whole.tasks) == [0, 1]
    assert whole.values("nll", row) == {}  # over no task


def test_the_gain_is_of_plain_lora_s(whole):
    def at(nll, *run):
        made = line(*run)
        return {**made, "task": {**made["task"], "nll": nll}}

    lines = [
        at(5.0, "base", "sciq", 0), at(1.0, "lora-mu", "sciq", 0), at(2.0, "kl", "sciq", 0, 1.0),
        at(3.0, "kl", "sciq", 1, 1.0),
    ]  # fmt: skip
    found = Results(lines, [], [])
    assert found.values("gain", Row("kl", 1.0), "sciq") == pytest.approx(
        {0: 75}
    )  # no LoRA of seed 1
    assert found.values("gain", Row("lora-mu", None), "sciq") == {0: 100}
    assert found.values("gain", Row("base", None), "sciq") == {}
    assert "gain %" in tables.means(found, ["sciq"], USUAL_METRICS).headings


def test_the_nll_is_never_pooled_over_tasks(whole):
    """The longest answers would be all that a mean shows."""
    row = Row("hlora", 0.01)
    assert whole.values("nll", row, *whole.tasks) == {}
    heads = tables.means(whole, whole.tasks, USUAL_METRICS).headings
    assert "NLL" not in heads
    assert tables.means(whole, ["sciq"], USUAL_METRICS).headings == [*heads[:2], "NLL", *heads[2:]]
    against = tables.head_to_head(whole, row).headings
    assert [h for h in against if "NLL" in h] == ["NLL, sciq", "NLL, piqa"]
    [nll] = [v for v in claims.judge(whole, row) if v.claim.startswith("NLL")]
    against = [of.against for of in nll.evidence]
    assert len(against) == len(set(against)) > 2
    assert all(name.endswith(("(sciq)", "(piqa)")) for name in against)


def test_claims_are_judged_from_the_figures(whole):
    ours = Row("hlora", 0.01)
    found = {v.claim: v for v in claims.judge(whole, ours)}
    by_start = {k: next(v for c, v in found.items() if c.startswith(k)) for k in (
        "Lower perplexity than LoRA", "Lower perplexity than EWC", "Lower perplexity than the base",
        "Accuracy", "The penalty", "The layer", "Importance", "The importance takes",
        "What the change costs",
        "The importance takes less time than a lean", "Lower perplexity than EWC-LoRA from",
        "v_proj", "The importance takes less time than a lean",
        "Lower perplexity than EWC-LoRA from the same",
    )}  # fmt: skip
    assert by_start["Lower perplexity than LoRA"].word == claims.HOLDS
    # The original's forgetting is zero here and so smaller; the lean one's larger.
    assert by_start["Lower perplexity than EWC"].word == "1 × holds, 1 × does not hold"
    assert by_start["Lower perplexity than the base"].word == claims.FAILS
    assert by_start["Accuracy"].word == claims.ALIKE
    assert by_start["The penalty"].word == claims.HOLDS
    of = by_start["The penalty"].evidence[0]
    assert of.against.startswith("LoRA(ν+μ)")
    assert re.fullmatch(r"-0\.(199|20\d) ± 0\.001", of.found)
    assert of.word == claims.HOLDS
    assert len(by_start["Lower perplexity than EWC"].evidence) == 2
    assert by_start["The layer"].word == claims.MISSING
    assert by_start["Importance"].word == claims.HOLDS
    # 10 s for 100 sequences is 2000 s for 20,000, against 60 s of ν.
    assert by_start["The importance takes"].word == claims.HOLDS
    [fisher] = by_start["The importance takes"].evidence
    assert "20,000 sequences" in fisher.against
    assert "2000 s" in fisher.found
    assert by_start["The importance takes less time than a lean"].word == claims.FAILS
    assert by_start["Lower perplexity than EWC-LoRA from the same"].word == claims.MISSING
    assert by_start["What the change costs"].word == claims.HOLDS
    assert by_start["v_proj"].word == claims.HOLDS


def test_a_method_is_compared_on_the_tasks_where_its_seeds_are(whole):
    ours, dear = Row("hlora", 0.01), Row("l2", 0.03)
    lines = [r for r in whole.lines if r["run"]["method"] != "l2" or r["run"]["task"] == "sciq"]
    lines.append(line("l2", "piqa", 0, 0.03))
    part = Results(lines, [], [])
    assert claims.shared_tasks(part, ours, dear) == ["sciq"]
    assert claims.difference(part, "nll", ours, dear, "sciq").n == 3
    assert claims.difference(part, "acc", ours, dear).n == 3
    assert claims.named_with_tasks(part, ours, dear) == (
        "L2 to the general-phase weights (θ^ν), φ 0.03 (sciq)"
    )
    assert claims.shared_tasks(part, ours, Row("lora-mu", None)) == ["sciq", "piqa"]
    nobody = Row("ewc-nu", None)
    assert claims.shared_tasks(part, ours, nobody) == []
    assert claims.difference(part, "acc", ours, nobody).n == 0


def test_a_claim_of_one_seed_stays_open():
    one = Results(study(seeds=1), [], [])
    words = {v.word for v in claims.judge(one, Row("hlora", 0.01)) if "perplexity" in v.claim}
    assert words == {claims.OPEN, claims.MISSING}  # no row of EWC at θ^ν


def test_costs_are_scaled_to_the_published_number_of_sequences(whole):
    rows = costs(whole)
    original = rows["EWC-LoRA, as published, 20,000 sequences"]
    assert (original.seconds, original.bytes) == (2000.0, 50_000)
    assert original.extrapolated
    assert not rows["EWC-LoRA, lean, 100 sequences"].extrapolated


def test_tables_hold_every_row(whole):
    table = tables.means(whole, ["sciq"], USUAL_METRICS)
    assert [r[0] for r in table.rows] == [r.label for r in whole.rows]
    assert all(len(r) == len(table.headings) for r in table.rows)
    first = tables.beside_the_paper(whole, whole.rows, TABLE_1, tables.PERPLEXITY)
    assert first.rows[0][5] == "10.02"
    second = tables.beside_the_paper(whole, whole.rows, TABLE_1, tables.ACCURACY)
    assert second.rows[0][3] == "95.1"
    assert {len(r) for t in (first, second) for r in [t.headings, *t.rows]} == {9, 7}
    kinds = tables.by_kind(whole, whole.rows)
    assert kinds.headings == ["method", "wiki", "docs*"]
    t = tables.t_tests(whole, Row("hlora", 0.01), Row("ewc", 0.01))
    assert all(len(r) == len(t.headings) for r in t.rows)


def test_only_the_papers_tasks_stand_beside_the_papers_figures():
    lines = [line("lora-mu", "sciq", 0), line("lora-mu", "facts", 0), line("hlora", "facts", 0)]
    table = tables.beside_the_paper(
        Results(lines, [], []), [Row("lora-mu", None)], TABLE_1, ("acc",)
    )
    assert table.headings == ["method", "sciq, accuracy %", "LLaMA-3.2, sciq", "GPT-J, sciq"]
    of_facts = Results(lines[1:], [], [])
    titles = [part.title for part in parts(of_facts, None, None, USUAL_METRICS)]
    assert not any("the paper's" in title for title in titles)


def test_a_strength_is_named_where_the_method_names_it():
    labels = [Row(*of).label for of in (
        ("budget", 0.05), ("lora-steps", 100), ("blend", 1.0), ("blend-rewound", 0.5),
    )]  # fmt: skip
    assert labels == [
        "blend, a budget of 0.05", "LoRA(μ), 100 steps", "blend at base, φ 1",
        "blend at base of φ 0.3, rewound, φ 0.5",
    ]  # fmt: skip


def test_the_best_is_that_of_rivals_with_as_many_runs(whole):
    """The base model forgets nothing; a method with fewer seeds is no rival."""

    def best(results):
        table = tables.means(results, ["sciq"], ["forgetting_seen", "seconds_tune"])
        return {(table.rows[i][0], j) for i, j in table.marked}

    # What is made up: only EWC-LoRA as published forgets less than HLoRA.
    assert best(whole) == {("EWC-LoRA, as published, φ 0.01", 1)}
    lines = [
        r for r in whole.lines if r["run"] != {**r["run"], "method": "ewc-original", "seed": 2}
    ]
    assert best(Results(lines, [], [])) == {(f"HLoRA, φ {phi}", 1) for phi in ("0.003", "0.01")}


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_reads_a_line(metric, whole):
    elsewhere = metric in ("peak_bytes", "gain", "kl_apart")
    assert METRICS[metric].of(whole.lines[1]) is not None or elsewhere
    METRICS[metric].of(whole.lines[0])


def test_a_half_line_is_passed_over_and_a_failed_run_replaced(tmp_path):
    bad = line("hlora", "sciq", 0, 0.01, error="the roof fell in")
    path = write(tmp_path / "r.jsonl", [bad, *study()], '{"key": "x", "ru')
    found = read(path)
    assert len(found.lines) == len(study())
    assert found.failed == []


def test_unlike_runs_are_not_averaged_silently(tmp_path):
    lines = study()
    lines[3]["study"] = {"model": "tiny", "tune": {"max_steps": 300}}
    path = write(tmp_path / "r.jsonl", lines)
    with pytest.raises(hlora.InputError, match=r"max_steps.* 300 .* 4 "):
        read(path)
    assert len(read(path, ["study.tune.max_steps=4"]).lines) == len(lines) - 1
    assert read(path, mixed=True).mixed
    assert {r["run"]["seed"] for r in read(path, ["run.seed=1"], mixed=True).lines} == {1}
    lines[3] = {**study()[3], "versions": {"hlora": "0.2.0"}}
    with pytest.raises(hlora.InputError, match=r"versions\.hlora.*0\.1\.0"):
        read(write(path, lines))


def test_kinds_that_are_set_apart_are_neither_seen_nor_unseen(tmp_path):
    def blocks(r, kinds):
        lost = {"wiki": 0.1, "docs": 0.2, "chat": 0.9}
        rise = 0.0 if r["run"]["method"] == "base" else 1.0
        text = {
            k: {"loss": 3.0, "tokens": 40 * n, "blocks": [3.0 + rise * lost[k]] * n}
            for k, n in kinds.items()
        }
        return {**r, "text": text, "unseen": ["docs", "chat"]}

    kinds = {"wiki": 2, "docs": 3, "chat": 5}
    lines = [blocks(line(m, "sciq", 0), kinds) for m in ("base", "lora-mu")]
    path = write(tmp_path / "r.jsonl", lines)
    whole, found = read(path), read(path, apart=["chat"])
    assert whole.lines[1]["unseen"] == ["docs", "chat"]
    assert found.lines[1]["unseen"] == ["docs"]
    assert found.lines[1]["apart"] == ["chat"]
    assert found.lines[1]["forgetting"]["unseen"]["nats"] == pytest.approx(0.2)
    assert found.lines[1]["forgetting"]["seen"]["nats"] == pytest.approx(0.1)

    with pytest.raises(hlora.InputError, match="no such kind of text 'chatt'; did you mean chat"):
        read(path, apart=["chatt"])
    with pytest.raises(hlora.InputError, match="base model's run, which sciq has not"):
        read(write(path, lines[1:]), apart=["chat"])
    with pytest.raises(hlora.InputError, match="kept every block's loss; wiki has none"):
        read(write(path, [line("base", "sciq", 0), line("lora-mu", "sciq", 0)]), apart=["docs"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere.jsonl"], "There is no results file nowhere.jsonl"),
        (["empty.jsonl"], "holds no runs yet"),
        (["failed.jsonl"], "All runs in failed.jsonl failed, the first with: the roof"),
        (["r.jsonl", "--metrics", "acuracy"], "unknown metric 'acuracy'; did you mean acc"),
        (["r.jsonl", "--compare", "hlora"], "takes two rows"),
        (["r.jsonl", "--compare", "hlorra", "ewc"], "no run of 'hlorra'; did you mean hlora?"),
        (["r.jsonl", "--compare", "hlora@0.5", "ewc"], "not run with φ 0.5; there are 0.003, 0.01"),
        (["r.jsonl", "--where", "versions.tork=1"], "No run in r.jsonl has 'versions.tork'"),
        (["r.jsonl", "--where", "versions.torch=1"], "versions.torch is 2.13.0"),
        (["r.jsonl", "--where", "x"], "KEY=VALUE"),
        (["binary.jsonl"], "cannot be read as results"),
    ],
)
def test_bad_input_is_one_sentence(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "r.jsonl", study())
    write(tmp_path / "failed.jsonl", [line("hlora", "a", 0, error="the roof")])
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    assert cli.main(["report", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_report_is_written_whole(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "r.jsonl", study())
    assert (
        cli.main(["report", "r.jsonl", "--page", "docs/r.md", "--compare", "hlora@0.003", "l2"])
        == 0
    )
    out = capsys.readouterr().out
    assert "48 runs of tiny: 8 rows × 2 tasks (sciq, piqa) × 3 seeds" in out
    html = (tmp_path / "r-report" / "index.html").read_text()
    for part in ("s claims", "Table 1", "Table 2", "Fig. 3", "Fig. 4", "Fig. 5", "Fig. 6",
                 "Fig. 7", "HLoRA, φ 0.003 against", "hlora report r.jsonl"):  # fmt: skip
        assert part in html, part
    assert html.count("<svg") == 6
    # Nothing from elsewhere: what is not in the page are its tables, beside it.
    assert not re.search(r'(src|href)="(?!#|data:|tables/)', html)
    page = (tmp_path / "docs" / "r.md").read_text()
    for name in ("frontier", "fig3", "fig4", "fig5", "fig6", "fig7"):
        assert f"(r/{name}.svg)" in page
        assert (tmp_path / "docs" / "r" / f"{name}.svg").is_file()
        assert (tmp_path / "docs" / "r" / f"{name}.png").is_file()


def test_the_report_of_a_study_just_begun(tmp_path, monkeypatch, capsys):
    """One seed, no HLoRA, no penalty: what there is, is shown, and the rest left out."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "r.jsonl", [line("base", "sciq", 0), line("lora-mu", "sciq", 0)])
    assert cli.main(["report", "r.jsonl"]) == 0
    assert "ONE SEED (0)" in capsys.readouterr().out
    html = (tmp_path / "r-report" / "index.html").read_text()
    assert "Fig. 3" not in html
    assert "Table 1" in html


def test_the_report_of_a_study_cut_short(tmp_path, monkeypatch, capsys):
    """The second task has only some of its runs: nothing is averaged over unlike tasks."""
    monkeypatch.chdir(tmp_path)
    lines = study(seeds=1)
    write(tmp_path / "r.jsonl", [*lines[:-8], *(r for r in lines[-8:-5])])
    assert cli.main(["report", "r.jsonl"]) == 0
    assert "Not on every task with every seed: EWC-LoRA" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "page", "more"),
    [
        ("smollm2", "results.md", []),
        ("forgetting", "forgetting.md", ["--mixed", "--apart", "chat"]),
    ],
)
def test_the_page_in_the_docs_is_that_of_the_results_in_the_repository(lines, page, more, tmp_path):
    root = Path(__file__).parents[1]
    results = str(root / "results" / f"{lines}.jsonl")
    argv = ["report", results, "--output", str(tmp_path / "r"), *more]
    assert cli.main([*argv, "--page", str(tmp_path / page)]) == 0
    made, kept = (
        [line for line in path.read_text("utf-8").splitlines() if not line.startswith("hlora ")]
        for path in (tmp_path / page, root / "docs" / page)
    )
    assert made == kept


def test_the_fisher_s_sequences_are_those_that_are_gathered():
    from hlora.core.importance.fisher_original import SEQUENCES
    from hlora.study.paper import EWC_SEQUENCES

    assert EWC_SEQUENCES == SEQUENCES


def test_tasks_that_were_not_trained_on_have_a_table(whole):
    assert tables.others(whole, "sciq") is None
    lines = [
        {**r, "others": {"arc": {"acc": 0.5 + 0.01 * r["run"]["seed"], "nll": 3.0}}}
        for r in whole.lines if r["run"]["method"] in ("base", "lora-mu")
    ]  # fmt: skip
    table = tables.others(Results(lines, [], []), "piqa")
    assert table.headings == ["method", "arc, accuracy %", "arc, NLL"]
    assert table.rows[1] == ["LoRA(μ)", "51.0 ± 0.6", "3.00 ± 0.00"]


def test_a_budget_says_whether_it_held(whole):
    assert budgets(whole) is None
    told = {
        "budget": 0.05, "predicted": 0.04, "measured": 0.06, "measured_se": 0.003, "share": 0.9,
        "kept": 0.045,
    }  # fmt: skip
    lines = [
        line("base", "sciq", 0), line("budget", "sciq", 0, 0.05, budgeted=told),
        line("budget", "piqa", 1, 0.02, budgeted={**dict.fromkeys(told), "budget": 0.02}),
    ]  # fmt: skip
    table = budgets(Results(lines, [], []))
    assert [row[1:] for row in table.rows] == [
        ["sciq", "0", "0.05", "0.0400", "0.0600 ± 0.0030", "1.50", "0.900", "0.0450", "0.90"],
        ["piqa", "1", "0.02", *"––––––"],
    ]
    assert "budget" in table.rows[0][0]
    names = [p.name for p in parts(Results(lines, [], []), None, None, ["nll"])]
    assert "budgets" in names
