"""Whole commands on a tiny model, as a user types them."""

import json
import logging
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

import hlora
from hlora.cli import main as cli
from hlora.core import store
from hlora.run import phases, scoring
from hlora.run.models import load, new_adapter
from hlora.run.scoring import evaluate
from hlora.run.settings import EvalSettings, RecordSettings, TrainSettings, TuneSettings
from tests.tiny import questions, write_model, write_rows, write_text

PLAIN = TrainSettings(model="m", output="o")


class Place:
    """A folder with a model, text and a task; commands run inside it."""

    def __init__(self, folder, model):
        self.folder, self.model = folder, str(model)
        write_text(folder / "a.txt")
        write_text(folder / "b.txt", "one two three four five")
        write_rows(folder / "q.jsonl", questions())

    def record(self, *more, output="nu"):
        return cli.main(
            ["record", "--model", self.model, "--kind", "factored", "--text",
             str(self.folder / "a.txt"), str(self.folder / "b.txt"),
             "--output", str(self.folder / output), "--block-size", "32", "--batch-size", "4",
             "--max-steps", "6", "--logging-steps", "2", "--dtype", "fp32", *more]
        )  # fmt: skip

    def tune(self, *more, output="mu"):
        return cli.main(
            ["tune", "--model", self.model, "--importance", str(self.folder / "nu"), "--task",
             str(self.folder / "q.jsonl"), "--output", str(self.folder / output), "--batch-size",
             "4", "--max-steps", "6", "--logging-steps", "2", "--dtype", "fp32", *more]
        )  # fmt: skip

    def adapter(self, name):
        return load_file(self.folder / name / "adapter_model.safetensors")


@pytest.fixture
def place(tmp_path, tiny):
    return Place(tmp_path, tiny)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
def test_both_phases_end_to_end(tmp_path, architecture, capsys):
    place = Place(tmp_path, write_model(tmp_path / "model", architecture))
    assert place.record() == 0
    out = capsys.readouterr().out
    assert "effective number of layers" in out
    assert "negative ω" in out
    assert place.tune("--phi", "0.1") == 0
    assert "R " in capsys.readouterr().out
    info = json.loads((tmp_path / "mu" / "tune.json").read_text())
    assert [e["step"] for e in info["log"]] == [2, 4, 6]
    assert all(e["R"] > 0 for e in info["log"])
    scores = tmp_path / "scores.json"
    code = cli.main(
        ["eval", "--model", place.model, "--adapter", str(tmp_path / "mu"), "--text",
         str(tmp_path / "a.txt"), "--task", str(tmp_path / "q.jsonl"), "--block-size", "32",
         "--json", str(scores)]
    )  # fmt: skip
    assert code == 0
    found = json.loads(scores.read_text())
    assert found["forgetting"]["a"]["nats"] == pytest.approx(
        found["adapter"]["text"]["a"]["loss"] - found["base"]["text"]["a"]["loss"]
    )
    assert found["adapter"]["task"]["q"]["n"] == 24
    assert cli.main(["inspect", str(tmp_path / "nu"), "--plot", str(tmp_path / "p.svg")]) == 0
    assert "v_proj" in capsys.readouterr().out
    assert "<svg" in (tmp_path / "p.svg").read_text()


def test_nothing_is_left_beside_the_result(place):
    place.record("--save-steps", "2")
    assert sorted(p.name for p in (place.folder / "nu").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "importance.json",
        "importance.safetensors",
    ]  # fmt: skip


def test_a_second_general_task_adds_to_the_first(place):
    place.record()
    assert place.record("--importance", str(place.folder / "nu"), output="both") == 0
    first, both = (store.load(place.folder / n).importance.totals() for n in ("nu", "both"))
    assert all(both[n] > first[n] for n in first)


@pytest.mark.parametrize("phase", ["record", "tune"])
def test_a_killed_run_resumes_to_the_same_bits(place, phase, monkeypatch):
    """Stopped as `kill -9` would, right after a checkpoint; dropout on, so the RNG counts."""
    dropout = ["--lora-dropout", "0.2"]
    place.record(*dropout)
    run = place.record if phase == "record" else place.tune
    settings = [*dropout, "--save-steps", "2"]
    if phase == "tune":
        settings += ["--phi", "0.5", "--anchor", "base"]
    assert run(*settings, output="whole") == 0

    class Killed(BaseException):
        pass

    from hlora.run import progress

    def die(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise Killed

    monkeypatch.setattr(progress.Interruptible, "on_save", die)
    with pytest.raises(Killed):
        run(*settings, output="killed")
    monkeypatch.undo()
    assert run(*settings, output="killed") == 2  # neither --resume nor --overwrite
    assert run(*settings, "--resume", output="killed") == 0
    assert same(place.adapter("whole"), place.adapter("killed"))
    if phase == "record":
        whole, killed = (store.load(place.folder / n) for n in ("whole", "killed"))
        assert same(whole.importance.tensors(), killed.importance.tensors())


def test_other_settings_cannot_resume(place, capsys, monkeypatch):
    from hlora.run import progress

    def stop(self, args, state, control, **kwargs):
        raise KeyboardInterrupt("stopped")

    monkeypatch.setattr(progress.Interruptible, "on_save", stop)
    assert place.record("--save-steps", "2") == 130
    monkeypatch.undo()
    assert place.record("--save-steps", "2", "--resume", "--learning-rate", "0.1") == 2
    assert "--learning-rate" in capsys.readouterr().err
    assert place.record("--save-steps", "2", "--overwrite") == 0


def test_a_dry_run_trains_and_writes_nothing(place, capsys):
    assert place.record("--dry-run", output="dry") == 0
    shown = capsys.readouterr().out
    for word in ("rows", "tokens", "steps", "memory", "time", "nothing was trained"):
        assert word in shown
    place.record()
    assert place.tune("--dry-run", output="dry2") == 0
    assert not list(place.folder.glob("dry*"))


def test_no_empty_folder_is_left_and_none_of_others_is_taken(place, capsys):
    place.record()
    before = sorted(place.folder.rglob("*"))
    new = ["--record", str(place.folder / "c" / "nu2")]
    assert place.tune(*new, "--dry-run", output="a/b") == 0
    assert place.tune(*new, "--targets", "nothing", output="a/b") == 2
    assert place.tune(*new, "--training.optim=lomo", output="a/b") == 2  # by `attach`
    nowhere, gptj = str(place.folder / "a" / "b"), write_model(place.folder / "gptj", "gptj")
    text = ["--text", str(place.folder / "a.txt"), "--block-size", "32"]
    named = ["--model", str(gptj), "--adapter", str(place.folder / "nu")]
    assert cli.main(["eval", *named, *text, "--json", f"{nowhere}/s.json"]) == 2
    assert cli.main(["rewind", *named, *text, "--output", nowhere]) == 2
    assert cli.main(["merge", *named, "--output", nowhere]) == 2
    convert = ["convert", str(place.folder / "nu"), "--to", "nothing", "--output", nowhere]
    assert cli.main(convert) == 2
    with pytest.raises(hlora.InputError):
        phases.tune(TuneSettings(model=place.model, task="nothing", output=nowhere))
    assert "Traceback" not in capsys.readouterr().err
    assert sorted(p for p in place.folder.rglob("*") if gptj not in (p, *p.parents)) == before
    (place.folder / "mine").mkdir()
    assert place.tune("--dry-run", output="mine/b") == 0
    assert list((place.folder / "mine").iterdir()) == []


def test_training_arguments_of_the_trainer_s_own(place, capsys):
    assert place.record("--training.optim=sgd", "--training.lr_scheduler_type=cosine") == 0
    assert store.load(place.folder / "nu").info["summary"]["negative_share"] == 0.0
    assert place.tune("--training.optm", "sgd") == 2
    assert "optim" in capsys.readouterr().err
    assert place.tune("--training.learning_rate", "1") == 2
    assert "--learning-rate" in capsys.readouterr().err


def test_reporters_are_handed_r(place, monkeypatch):
    """--training.report_to: integrations come behind our callbacks."""
    import transformers.trainer

    from tests.test_penalty import Reporter

    made = []

    class Known(Reporter):
        def __init__(self):
            super().__init__()
            made.append(self)

    place.record()
    monkeypatch.setattr(
        transformers.trainer, "get_reporting_integration_callbacks", lambda _: [Known]
    )
    assert place.tune() == 0
    assert made
    assert all("R" in logs for logs in made[0].seen if "loss" in logs)


def test_gradient_checkpointing_and_bf16(place):
    assert place.record("--training.gradient_checkpointing=true", "--dtype", "bf16") == 0
    norms = store.load(place.folder / "nu").importance.norms()
    assert all(v > 0 for v in norms.values())


def test_without_importance_it_is_plain_lora_from_the_base_model(place, capsys):
    argv = ["tune", "--model", place.model, "--task", str(place.folder / "q.jsonl"), "--output",
            str(place.folder / "plain"), "--batch-size", "4", "--max-steps", "6", "--dtype",
            "fp32"]  # fmt: skip
    assert cli.main(argv) == 0
    assert "plain LoRA" in capsys.readouterr().out
    info = json.loads((place.folder / "plain" / "tune.json").read_text())
    assert info["held"] == []
    assert not any("R" in e for e in info["log"])
    place.record()
    assert place.tune("--phi", "0", "--anchor", "base") == 0
    assert same(place.adapter("plain"), place.adapter("mu"))
    for given in (["--phi", "0.1"], ["--anchor", "base"], ["--preset", "paper"], ["--normalize"],
                  ["--layer-weights", "uniform"]):  # fmt: skip
        assert cli.main([*argv, "--overwrite", *given]) == 2
        assert given[0] in capsys.readouterr().err


def test_the_phases_are_functions_that_print_nothing(place, capsys):
    common = {"model": place.model, "dtype": "fp32", "batch_size": 4}
    nu, mu = str(place.folder / "nu"), str(place.folder / "mu")
    text, task = [str(place.folder / "a.txt")], str(place.folder / "q.jsonl")
    logging_before = list(logging.getLogger("hlora").handlers)
    for kind, preset in (("fisher", "default"), (None, "official")):
        steps = 0 if kind else 4
        recorded = phases.record(
            RecordSettings(
                text=text, output=nu, block_size=32, kind=kind, preset=preset, overwrite=True,
                max_steps=steps, **common,
            )
        )  # fmt: skip
    assert (recorded.kind, recorded.summary["steps"]) == ("dense", 4)
    assert recorded.bytes == sum(f["bytes"] for f in store.read_info(nu)["files"].values())
    tuned = phases.tune(TuneSettings(importance=nu, task=task, output=mu, max_steps=4, **common))
    assert tuned.steps == 4
    found = evaluate(
        EvalSettings(model=place.model, adapter=mu, text=text, task=[task], block_size=32)
    )
    assert found["adapter"]["task"]["q"].n == 24
    assert found["adapter"]["text"]["a"].loss != found["base"]["text"]["a"].loss
    assert capsys.readouterr().out == ""
    assert logging.getLogger("hlora").handlers == logging_before


BAD = [
    (["record", "--model", "M", "--text", "no.txt", "--output", "o"], "no.txt"),
    (["record", "--model", "M", "--text", "EMPTY", "--output", "o"], "empty"),
    (["record", "--model", "M", "--text", "A", "--output", "o", "--block-size", "99999"],
     "block of 99999"),
    (["record", "--model", "./nowhere", "--text", "A", "--output", "o"], "./nowhere"),
    (["record", "--model", "M", "--text", "A", "--output", "o", "--targets", "qproj"],
     "q_proj"),
    (["record", "--model", "M", "--text", "A", "--output", "o", "--xi", "-1"], "xi must"),
    (["record", "--model", "M", "--text", "A", "--output", "A"], "is a file"),
    (["record", "--model", "M", "--text", "A", "A", "--output", "o"], "same name"),
    (["record", "--model", "M", "--kind", "factored", "--output", "o"], "--text"),
    (["record", "--model", "M", "--max-steps", "9", "--output", "o"], "--kind factored"),
    (["record", "--model", "M", "--kind", "fisher", "--text", "A", "--xi", "1", "--output", "o"],
     "--xi"),
    (["record", "--model", "M", "--text", "A", "--output", "o", "--device", "cuda:9"],
     "'cuda:9'"),
    (["tune", "--model", "M", "--importance", "nowhere", "--task", "Q", "--output", "o"],
     "nowhere"),
    (["tune", "--model", "M", "--importance", "NU", "--task", "Q", "--output", "o", "--phi", "-1"],
     "phi"),
    (["tune", "--model", "M", "--importance", "NU", "--task", "Q", "--output", "o", "--phi", "nan"],
     "--phi"),
    (["record", "--model", "M", "--text", "A", "--output", "o", "--learning-rate", "-1"],
     "--learning-rate"),
    (["record", "--model", "M", "--text", "A", "--output", "o", "--block-size", "32",
      "--training.fsdp=full_shard"], "fsdp"),
    (["record", "--model", "M", "--text", "A", "--output", "o", "--block-size", "32",
      "--training.deepspeed=x.json"], "deepspeed"),
    (["record", "--model", "M", "--text", "A", "--output", "o", "--kind", "factored",
      "--block-size", "32", "--training.report_to=nothing"], "nothing"),
    *((["record", "--model", "M", "--text", "A", "--output", "o", "--kind", "factored",
        "--block-size", "32", "--dry-run", f"--training.{field}"], named)
      for field, named in [
          ("adam_beta1=2", "beta"), ("dataloader_num_workers=-1", "num_workers"),
          ("data_seed=99999999999999999999999", "Overflow"), ("optim=galore_adamw", "galore"),
          ("use_liger_kernel=true", "liger"), ("optim_args=x", "Trainer refuses"),
          ('lr_scheduler_kwargs={"x": 1}', "'x'"), ("log_level=x", "'x'"),
          ("eval_on_start=true", "hlora eval"), ("push_to_hub=true", "--push-to-hub"),
      ]),
    (["record", "--model", "M", "--text", "A", "--output", "o", "--block-size", "1"],
     "--block-size"),
    (["tune", "--model", "M", "--task", "Q", "--output", "o", "--replay", "A", "--replay-share",
      "0.9999999"], "--replay-share"),
    (["record", "--model", "nobody/nothing", "--text", "A", "--output", "o"], "nobody/nothing"),
    (["tune", "--model", "M", "--importance", "NU", "--task", "quiz", "--output", "o"],
     "'quiz'"),
    (["tune", "--model", "M", "--importance", "NU", "--task", "LABEL", "--output", "o"],
     "label '7'"),
    (["tune", "--model", "GPTJ", "--importance", "NU", "--task", "Q", "--output", "o"],
     "model"),
    (["tune", "--model", "M", "--importance", "NU", "--task", "Q", "--output", "NU"],
     "--importance"),
    (["record", "--model", "M", "--text", "SHORT", "--output", "o"], "or a smaller --block-size."),
    *((["tune", "--model", "M", "--task", "Q", "--output", "o", flag, "SHORT"],
       "one block of 128: give more text.") for flag in ("--kl", "--replay", "--corda")),
    (["eval", "--model", "M"], "--text, --task"),
    (["eval", "--model", "M", "--adapter", "nowhere", "--text", "A"], "nowhere"),
    (["inspect", "nowhere"], "nowhere"),
    (["inspect", "NU", "--plot", "a.doc"], ".svg"),
    (["inspekt"], "inspect"),
    (["demo", "--output", "A"], "is a file"),
]  # fmt: skip


@pytest.fixture(scope="module")
def shelf(tmp_path_factory, tiny):
    """What the bad commands name."""
    folder = tmp_path_factory.mktemp("shelf")
    place = Place(folder, tiny)
    place.record()
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("a few words")
    return {
        "M": place.model, "A": str(folder / "a.txt"), "Q": str(folder / "q.jsonl"),
        "NU": str(folder / "nu"), "EMPTY": str(folder / "empty.txt"),
        "SHORT": str(folder / "short.txt"),
        "LABEL": str(write_rows(folder / "l.jsonl", [{**questions(1)[0], "answer": 7}])),
        "GPTJ": str(write_model(folder / "gptj", "gptj")),
    }  # fmt: skip


@pytest.mark.parametrize(("argv", "message"), BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_input_is_one_sentence_and_code_2(argv, message, shelf, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main([shelf.get(a, a) for a in argv]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("hlora: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def wrong_adapters(folder):
    """By what is said of each, one that a base model of width 16 cannot take."""
    wide = new_adapter(load(str(write_model(folder / "wide", width=32)))[0], PLAIN)
    gptj = new_adapter(load(str(write_model(folder / "gptj", "gptj")))[0], PLAIN)
    part = new_adapter(load(str(write_model(folder / "same")))[0], PLAIN)
    for name, model in (("8 × 32", wide), ("another model's", gptj), ("not whole", part)):
        model.save_pretrained(folder / name)
        yield name
    config = folder / "not whole" / "adapter_config.json"
    config.write_text(config.read_text().replace("v_proj", "k_proj"))


def test_an_adapter_is_refused_before_the_base_is_scored(place, monkeypatch, capsys):
    def score(*args):
        raise AssertionError

    monkeypatch.setattr(scoring, "score", score)
    for name in [*wrong_adapters(place.folder)]:
        adapter, text = str(place.folder / name), str(place.folder / "a.txt")
        capsys.readouterr()
        assert cli.main(["eval", "--model", place.model, "--adapter", adapter, "--text", text]) == 2
        said = capsys.readouterr().err
        assert name in said.replace(adapter, "")
        assert said.count("\n") == 1


def test_a_result_is_not_overwritten_unless_asked(place, capsys):
    place.record()
    before = (place.folder / "nu" / "importance.json").read_bytes()
    assert place.record("--seed", "1") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (place.folder / "nu" / "importance.json").read_bytes() == before
    assert place.record("--seed", "1", "--overwrite") == 0
    assert (place.folder / "nu" / "importance.json").read_bytes() != before


def test_a_full_disk_is_one_sentence(place, capsys, monkeypatch):
    import errno

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(store, "save_file", full)
    assert place.record() == 1
    err = capsys.readouterr().err
    assert "disk is full" in err
    assert err.count("\n") == 1


def test_help_answers_in_under_a_second_of_processor_time():
    """Without torch: importing it alone takes longer."""
    code = (
        "import sys; from hlora.cli.main import main; main(['--help']); main(['record', '--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "\n"], capture_output=True, text=True, check=False
    )
    assert "usage: hlora COMMAND" in done.stdout
    start = "import sys; from hlora.cli.main import main; "
    code = start + "main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_libraries_say_nothing_of_their_own(place):
    """Nor while they are imported."""
    argv = ["record", "--model", place.model, "--sequences", "4", "--block-size", "16"]
    argv += ["--output", str(place.folder / "nu"), "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-m", "hlora", *argv], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert "nothing was trained" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_keep_a_checkpoint(place, number):
    """A real signal to a real process, half-way."""
    argv = [
        sys.executable, "-m", "hlora", "record", "--model", place.model, "--kind", "factored",
        "--text", str(place.folder / "a.txt"), "--output", str(place.folder / "nu"),
        "--block-size", "32", "--batch-size", "2", "--max-steps", "100000",
    ]  # fmt: skip
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    settings = place.folder / "nu" / "checkpoints" / "settings.json"
    until = time.monotonic() + 120
    try:
        while not settings.exists() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.2)
        time.sleep(3)
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "Stopped at step" in err
    assert "--resume" in err
    assert "Traceback" not in err
    assert list((place.folder / "nu" / "checkpoints").glob("checkpoint-*"))
    assert not (place.folder / "nu" / "importance.json").exists()


@pytest.mark.parametrize("phase", ["record", "tune"])
def test_a_seed_gives_the_same_bits_however_the_model_was_loaded(place, phase, monkeypatch):
    """Reading a GGUF file draws random numbers, reading safetensors does not."""
    from hlora.run import models, phases

    place.record()
    run = place.record if phase == "record" else place.tune
    more = [] if phase == "record" else ["--anchor", "base"]
    assert run(*more, output="one") == 0

    load = models.load

    def drawing(*args, **kwargs):
        loaded = load(*args, **kwargs)
        torch.rand(7)
        return loaded

    monkeypatch.setattr(phases, "load", drawing)
    assert run(*more, output="two") == 0
    assert same(place.adapter("one"), place.adapter("two"))


def test_the_importance_decides_the_adapter(place, capsys):
    place.record("--lora-rank", "4", "--targets", "q_proj", "v_proj", "o_proj")
    assert place.tune("--lora-rank", "3") == 2
    assert "--lora-rank 3 does not fit" in capsys.readouterr().err
    assert place.tune("--targets", "all-linear") == 2
    assert "--targets" in capsys.readouterr().err
    assert place.record("--lora-alpha", "1", "--importance", str(place.folder / "nu"),
                        output="both") == 2  # fmt: skip
    assert "--lora-alpha 1.0" in capsys.readouterr().err
    assert place.tune("--dry-run") == 0
    assert "r 4 on 6 matrices" in capsys.readouterr().out
    assert place.tune("--lora-rank", "4") == 0
    noted = json.loads((place.folder / "mu" / phases.TUNED).read_text())["settings"]
    assert noted["lora_rank"] == 4
    assert sorted(noted["targets"]) == ["o_proj", "q_proj", "v_proj"]
    free = ["--lora-rank", "16", "--targets", "q_proj", "v_proj", "o_proj", "--anchor", "base"]
    assert place.tune(*free, output="base") == 0


def test_targets_that_were_recorded_may_be_named_again(place):
    assert place.record("--targets", "all-linear") == 0
    assert place.tune("--targets", "all-linear") == 0
