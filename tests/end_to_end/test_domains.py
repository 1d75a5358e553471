"""A domain after another, as commands: held to all that came before, and recorded on the way."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

import hlora
from hlora.cli import main as cli
from hlora.core import store
from hlora.run import phases, progress
from hlora.run.settings import TuneSettings
from tests.tiny import write_rows, write_text

MARKS = {"a": "abc", "b": "xyz", "c": "#+-"}


class Place:
    """A folder with a model and three tasks; commands run inside it."""

    def __init__(self, folder, model):
        self.folder, self.model = folder, str(model)
        for name, marks in MARKS.items():
            rows = [
                {"prompt": f"{marks[i % 3]}{marks[i // 3 % 3]}", "completion": f" {marks[i % 3]}"}
                for i in range(12)
            ]
            write_rows(folder / f"{name}.jsonl", rows)

    def base(self, output="base", *more):
        return self.run(
            "record", "--output", output, "--sequences", "6", "--block-size", "16", *more
        )

    def tune(self, task, *more, output=None, steps="4", model=None):
        return self.run(
            "tune", "--task", f"{task}.jsonl", "--output", output or f"mu-{task}", "--max-steps",
            steps, "--logging-steps", "2", "--learning-rate", "1e-2", *more, model=model,
        )  # fmt: skip

    def run(self, command, *words, model=None):
        at = ["--model", model or self.model, "--dtype", "fp32"]
        train = [] if command == "eval" else ["--batch-size", "4"]
        return cli.main([command, *at, *train, *words])

    def info(self, name, file="tune.json"):
        return json.loads((self.folder / name / file).read_text())


@pytest.fixture
def place(tmp_path, tiny, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, tiny)


def card(place, name):
    return (place.folder / name / "README.md").read_text()


def test_a_b_and_c_each_held_to_all_before_it(place, capsys):
    assert place.base() == 0
    assert place.tune("a", "--importance", "base", "--record", "A") == 0
    assert place.tune("b", "--importance", "base", "A", "--record", "B", "--kind", "dense") == 0
    capsys.readouterr()
    assert place.tune("c", "--importance", "base", "A", "B", "--phi", "0.5", "0.02", "0.03",
                      "--record", "C") == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "base: φ 0.5, anchored at base; A: φ 0.02, anchored at nu; B: φ 0.03" in said
    assert "Recorded 4 steps" in said
    held = place.info("mu-c")["held"]
    assert [(h["importance"], h["kind"], h["anchor"]) for h in held] == [
        ("base", "blend", "base"), ("A", "factored", "nu"), ("B", "dense", "nu"),
    ]  # fmt: skip
    assert [h["penalty"]["phi"] for h in held] == [0.5, 0.02, 0.03]
    assert all(e["R"] > 0 for e in place.info("mu-c")["log"])
    for name in ("mu-c", "C"):
        for said in (
            "Blend importance, `base`, with φ 0.5; it pulls towards the base model",
            "Factored importance, `A`, with φ 0.02",
            "Dense importance, `B`",
        ):
            assert said in card(place, name), name  # fmt: skip
    assert "How much each weight matters for `c`" in card(place, "C")
    # The folder of the importance holds the adapter that the domain ended with.
    ours, theirs = (load_file(f"{n}/adapter_model.safetensors") for n in ("C", "mu-c"))
    assert ours.keys() == theirs.keys()
    assert all(ours[k].equal(theirs[k]) for k in ours)
    assert cli.main(["inspect", "C"]) == 0
    assert place.run("eval", "--adapter", "mu-c", "--task", "a.jsonl", "b.jsonl") == 0


def test_phi_zero_for_all_is_training_on_from_the_last_one(place):
    assert place.tune("a", "--record", "A") == 0
    assert place.tune("b", "--importance", "A", "--record", "B") == 0
    assert place.tune("c", "--importance", "A", "B", "--phi", "0", output="free") == 0
    assert place.tune("c", "--importance", "B", "--phi", "0", output="alone") == 0
    assert place.tune("c", "--importance", "A", "B", "--phi", "5", output="held") == 0
    free, alone, held = (
        load_file(f"{n}/adapter_model.safetensors") for n in ("free", "alone", "held")
    )
    assert all(free[k].equal(alone[k]) for k in free)
    assert not all(free[k].equal(held[k]) for k in free)


def test_what_is_recorded_under_a_budget_is_the_adapter_that_was_scaled(place):
    write_text(place.folder / "text.txt")
    assert place.base() == 0
    budget = ["--forget-at-most", "1e-6", "--text", "text.txt"]
    assert place.tune("a", "--importance", "base", *budget, "--record", "A") == 0
    assert place.info("mu-a")["forgetting"]["share"] < 1
    ours, theirs = (load_file(f"{n}/adapter_model.safetensors") for n in ("A", "mu-a"))
    assert all(ours[k].equal(theirs[k]) for k in ours)
    assert sum(store.load("A").importance.totals().values()) > 0
    # The budget is the oldest one's; the others have their φ.
    assert place.tune("b", "--importance", "base", "A", *budget) == 0
    assert [h["penalty"]["phi"] for h in place.info("mu-b")["held"]] == [1.0, 0.01]


def test_a_killed_domain_resumes_to_the_same_importance(place, capsys, monkeypatch):
    assert place.tune("a", "--record", "A") == 0
    assert place.tune("b", "--importance", "A", "--record", "B") == 0
    words = ["--importance", "A", "B", "--save-steps", "2"]

    def run(name, *more):
        return place.tune("c", *words, "--record", f"C-{name}", *more, output=name)

    def stop(self, args, state, control, **kwargs):
        raise KeyboardInterrupt("stopped")

    assert run("whole") == 0
    with monkeypatch.context() as patched:
        patched.setattr(progress.Interruptible, "on_save", stop)
        assert run("killed") == 130
    assert not (place.folder / "C-killed" / store.MARKER).exists()
    usual = {"--importance": ["A", "B"], "--record": ["C-killed"], "--save-steps": ["2"]}
    for change, named in (
        ({"--importance": ["A"]}, "importance is not what"), ({"--phi": ["3"]}, "--phi"),
        ({"--importance": ["B", "A"]}, "importance is not what"), ({"--record": ["D"]}, "--record"),
    ):  # fmt: skip
        changed = [w for flag, values in {**usual, **change}.items() for w in (flag, *values)]
        assert place.tune("c", *changed, "--resume", output="killed") == 2
        assert named in capsys.readouterr().err
    assert run("killed", "--resume") == 0
    whole, killed = (store.load(f"C-{n}").importance.tensors() for n in ("whole", "killed"))
    assert all(whole[k].equal(killed[k]) for k in whole)
    assert run("killed", "--resume") == 0  # finished: it is read
    assert run("killed") == 2


def test_a_larger_rank_goes_on_from_a_smaller_one(place, capsys):
    assert place.tune("a", "--record", "A", "--lora-rank", "2", "--lora-alpha", "4") == 0
    to = ["--importance", "A", "--phi", "1e9", "--learning-rate", "1e-5"]
    assert place.tune("b", *to, "--lora-rank", "12", "--lora-alpha", "6", "--record", "B") == 0
    noted = store.load("B").info["pairs"]
    assert {(p["r"], p["s"]) for p in noted.values()} == {(12, 0.5)}
    was, now = (store.load(n).factors for n in "AB")
    for name, (B, A) in was.items():  # hardly moved, at this φ
        assert ((0.5 * now[name][0] @ now[name][1]) - (2 * B @ A)).abs().max() < 1e-3
    assert place.tune("c", "--importance", "A", "B") == 0
    assert place.tune("c", "--importance", "B", "--lora-rank", "4", "--overwrite") == 2
    assert "--lora-rank 4" in capsys.readouterr().err


def test_what_was_merged_is_held_in_the_merged_model(place, capsys):
    assert place.tune("a", "--record", "A") == 0
    assert cli.main(["merge", "--adapter", "A", "--output", "merged"]) == 0
    assert place.tune("b", "--importance", "A", model="merged") == 2
    assert "--anchor merged" in capsys.readouterr().err
    held = ["--anchor", "merged", "--lora-rank", "3", "--record", "B"]
    assert place.tune("b", "--importance", "A", *held, model="merged") == 0
    assert "into which earlier adapters were merged" in card(place, "mu-b")
    # B was recorded on the merged model, and goes on from its adapter there.
    both = ["--importance", "A", "B", "--anchor", "merged", "nu"]
    assert place.tune("c", *both, model="merged") == 0
    assert place.tune("c", *both, output="x") == 2
    assert "B was recorded on" in capsys.readouterr().err


def test_a_finished_run_whose_settings_are_no_lists_is_known_again(place):
    """As they were noted before there could be several."""
    words = ["--importance", "A", "--phi", "0.3"]
    assert place.tune("a", "--record", "A", steps="1") == 0
    assert place.tune("b", *words, steps="1") == 0
    info = place.info("mu-b")
    info["settings"] |= {"importance": "A", "phi": 0.3, "anchor": None}
    (place.folder / "mu-b" / "tune.json").write_text(json.dumps(info))
    assert place.tune("b", *words, "--resume", steps="1") == 0
    assert place.tune("b", *words[:3], "0.4", "--resume", steps="1") == 2


def test_the_notes_of_a_domain_are_told_where_they_are_damaged(place, capsys):
    assert place.tune("a", "--record", "A", steps="1") == 0
    assert cli.main(["convert", "A", "--to", "ones", "--output", "ones"]) == 0
    assert "How much each weight matters for `a`" in card(place, "ones")
    path = place.folder / "A" / store.MARKER
    noted = json.loads(path.read_text())
    for damage in ({"rows": "x"}, {"task": 3}, {"held": [{}]}, {"held": 1}, {"text": 3}):
        path.write_text(json.dumps({**noted, **damage}))
        assert cli.main(["convert", "A", "--to", "ones", "--output", "again"]) == 2
        assert "says of its recording is damaged" in capsys.readouterr().err


BAD = [
    (["--kind", "dense"], "--record"),
    (["--record", "X", "--kind", "blend"], "blend"),
    (["--record", "A"], "already holds a result"),
    (["--record", "mu"], "--output and --record"),
    (["--importance", "A", "--record", "A", "--overwrite"], "--record and --importance"),
    (["--importance", "A", "A"], "--importance and --importance"),
    (["--importance", "A", "Q"], "Q (llama: 2 matrices, q_proj)"),
    (["--importance", "G", "A", "base"], "G (gptj: 4 matrices"),
    (["--importance", "A", "B", "--phi", "1", "2", "3"], "--phi"),
    (["--importance", "A", "--phi", "1", "2"], "--phi"),
    (["--importance", "A", "B", "--anchor", "nu", "there"], "--anchor"),
    (["--importance", "A", "base", "--forget-at-most", "0.1"], "factored"),
    (["--importance", "A", "--record", "file.txt"], "is a file"),
    (["--importance", "A", "nowhere"], "nowhere"),
]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, tiny):
    from tests.tiny import write_model

    place = Place(tmp_path_factory.mktemp("shelf"), tiny)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(place.folder)
        assert place.base() == 0
        assert place.tune("a", "--record", "A") == 0
        assert place.tune("b", "--importance", "A", "--record", "B") == 0
        one = ["--targets", "q_proj", "--record"]
        assert place.tune("c", *one, "Q", output="mu-q") == 0
        gptj = str(write_model(place.folder / "gptj", "gptj"))
        assert place.tune("c", "--record", "G", output="mu-g", model=gptj) == 0
        (place.folder / "file.txt").write_text("x")
    return place


@pytest.mark.parametrize(("words", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_what_does_not_fit_is_one_sentence(words, message, shelf, monkeypatch, capsys):
    monkeypatch.chdir(shelf.folder)
    assert shelf.tune("c", *words, output="mu") == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_in_python_one_importance_needs_no_list(shelf, monkeypatch):
    monkeypatch.chdir(shelf.folder)
    common = {"model": shelf.model, "task": "c.jsonl", "max_steps": 1, "batch_size": 4}
    settings = TuneSettings(**common, output="py", importance="A", phi=0.1, record="P")
    assert phases.tune(settings).steps == 1
    assert store.load("P").info["held"][0]["penalty"]["phi"] == 0.1


STUDY = """
model: {model}
domains:
  a: {{train: a.jsonl, test: a.jsonl}}
  b: {{train: b.jsonl, test: b.jsonl}}
  c: {{train: c.jsonl, test: c.jsonl}}
methods: {{lora: {{}}, both: {{base: 1, domains: 1e3}}}}
seeds: [0, 1]
text: [text.txt]
record: {{sequences: 6, block_size: 16, batch_size: 4, dtype: fp32}}
tune: {{max_steps: 12, batch_size: 4, learning_rate: 2e-2, dtype: fp32, save_steps: 0}}
eval: {{block_size: 32, dtype: fp32}}
work: work
"""


def test_the_study_shows_what_is_left_of_each_domain(place, monkeypatch, capsys):
    from studies import domains

    for name in MARKS:  # choices, so that there is an accuracy
        marks = MARKS[name]
        rows = [
            {
                "prompt": f"{marks[i % 3]}{marks[i // 3 % 3]}",
                "choices": list(marks),
                "answer": i % 3,
            }
            for i in range(9)
        ]
        write_rows(place.folder / f"{name}.jsonl", rows)
    write_text(place.folder / "text.txt")
    (place.folder / "s.yaml").write_text(STUDY.format(model=place.model))
    domains.main(["s.yaml", "--page", "page.md"])
    page = (place.folder / "page.md").read_text()
    assert page.startswith("a → b → c, 2 seed(s).")
    lines = [line.split(" | ") for line in page.splitlines() if line.startswith("|")]
    head = lines[0]
    assert head[0] == "| method"
    assert [h.split(",")[0] for h in head[1:3]] == ["average accuracy %", "backward transfer"]
    assert {line[0] for line in lines} >= {"| lora", "| both", "| lora, after b", "| both, after c"}
    assert len(domains.Plan.read(Path(domains.__file__).with_suffix(".yaml")).domains) == 3
    plan = domains.Plan.read(place.folder / "s.yaml")
    runs = {m: domains.averaged([[s["domains"] for s in domains.chain(plan, m, seed)]
                                 for seed in (0, 1)]) for m in plan.methods}  # fmt: skip
    lost = {m: domains.backward_transfer(of, "nll")[0] for m, of in runs.items()}
    assert lost["both"] < lost["lora"]  # which forgets the letters of a and b
    again = [p.stat().st_mtime_ns for p in sorted(place.folder.glob("work/**/*.safetensors"))]
    domains.main(["s.yaml"])
    assert again == [
        p.stat().st_mtime_ns for p in sorted(place.folder.glob("work/**/*.safetensors"))
    ]
    assert page in capsys.readouterr().out
    (place.folder / "s.yaml").write_text("model: m\ndomain: {}\n")
    with pytest.raises(hlora.InputError, match="domains"):
        domains.main(["s.yaml"])
