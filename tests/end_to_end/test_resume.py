"""Commands that were killed, moved or damaged between two starts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hlora import files
from hlora.cli import main as cli
from hlora.core import store
from hlora.core.recorder import Recorder
from hlora.run import phases, progress
from tests.end_to_end.test_commands import Place, same
from tests.tiny import questions, write_rows, write_text


class Killed(BaseException):
    pass


@pytest.fixture
def place(tmp_path, tiny):
    return Place(tmp_path, tiny)


def killed(run, monkeypatch, *argv, step=4, **named):
    """As by `kill -9`, right after the checkpoint of a step."""

    def die(self, args, state, control, **kwargs):
        if state.global_step == step:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(progress.Interruptible, "on_save", die)
        with pytest.raises(Killed):
            run("--save-steps", "2", *argv, **named)


def importance(place, name):
    return store.load(place.folder / name).importance.tensors()


@pytest.mark.parametrize(
    "harm",
    [
        lambda p: (p / "trainer_state.json").write_text(""),
        lambda p: (p / "trainer_state.json").write_text('{"epoch": 0.1'),
        lambda p: (p / "optimizer.pt").unlink(),
        lambda p: (p / "README.md").write_bytes(b"\x82"),
        lambda p: (p / "hlora_record.safetensors").unlink(),
        lambda p: (p / "adapter_model.safetensors").write_bytes(b"x"),
        lambda p: (p / files.MANIFEST).unlink(),
        lambda p: (p / files.MANIFEST).write_text("[1"),
        lambda p: (p / files.MANIFEST).write_text("[1]"),
    ],
)  # fmt: skip
def test_the_newest_whole_checkpoint_is_resumed_and_named(place, harm, monkeypatch, capsys):
    place.record("--save-steps", "2", output="whole")
    killed(place.record, monkeypatch)
    harm(place.folder / "nu" / "checkpoints" / "checkpoint-4")
    assert place.record("--save-steps", "2", "--resume") == 0
    err = capsys.readouterr().err
    assert "checkpoint-4" in err
    assert f"{place.folder / 'nu' / 'checkpoints' / 'checkpoint-2'}" in err
    assert same(importance(place, "whole"), importance(place, "nu"))


@pytest.mark.parametrize("length", [["--max-steps", "6"], ["--max-steps", "0", "--epochs", "0.2"]])
def test_a_run_stopped_at_its_end_trains_no_more(place, length, monkeypatch):
    constant = ["--training.lr_scheduler_type", "constant", *length]
    place.record(*constant, output="whole")
    last = store.read_info(place.folder / "whole")["summary"]["steps"]
    killed(place.record, monkeypatch, *constant, "--save-steps", str(last), step=last)
    assert place.record(*constant, "--save-steps", str(last), "--resume") == 0
    assert store.read_info(place.folder / "nu")["summary"]["steps"] == last
    assert same(importance(place, "whole"), importance(place, "nu"))
    assert same(place.adapter("whole"), place.adapter("nu"))


def test_an_epoch_that_ended_with_its_checkpoint_is_consolidated(place, monkeypatch):
    """The official preset adds up over epochs."""
    rows = ["--text-blocks", "8", "--max-steps", "0", "--epochs", "3", "--preset", "official"]
    rows += ["--kind", "dense"]
    place.record(*rows, output="whole")
    killed(place.record, monkeypatch, *rows, step=4)  # two steps an epoch
    assert place.record(*rows, "--save-steps", "2", "--resume") == 0
    assert same(importance(place, "whole"), importance(place, "nu"))


def test_what_is_read_must_be_the_same_wherever_it_lies(place, monkeypatch, capsys):
    place.record()
    place.tune("--save-steps", "2", output="whole")
    killed(place.tune, monkeypatch)

    def resumed():
        code = place.tune("--save-steps", "2", "--resume")
        return code, capsys.readouterr().err

    rows = place.folder / "q.jsonl"
    before = rows.read_text()
    write_rows(rows, [{**q, "prompt": "x" + q["prompt"]} for q in questions()])
    code, err = resumed()
    assert code == 2
    assert "the data" in err
    rows.write_text(before)
    shutil.move(place.folder / "nu", place.folder / "nu-old")
    place.record("--seed", "7")
    code, err = resumed()
    assert code == 2
    assert "the importance is not what" in err
    shutil.rmtree(place.folder / "nu")
    shutil.move(place.folder / "nu-old", place.folder / "nu")
    shutil.move(place.folder / "mu", place.folder / "moved")
    assert place.tune("--save-steps", "2", "--resume", output="moved/") == 0
    assert same(place.adapter("whole"), place.adapter("moved"))


def test_other_text_is_refused(place, monkeypatch, capsys):
    killed(place.record, monkeypatch)
    write_text(place.folder / "a.txt", "quite another text than before")
    assert place.record("--save-steps", "2", "--resume") == 2
    assert "the data" in capsys.readouterr().err


def first(before, then):
    return lambda *args: (before(), then(*args))[1]


@pytest.mark.parametrize("phase", ["record", "tune"])
def test_a_kill_anywhere_in_publishing_is_made_good(place, phase, monkeypatch):
    place.record()
    run = place.record if phase == "record" else place.tune
    settings = ["--save-steps", "2"]
    assert run(*settings, output="whole") == 0
    whole = {p.name for p in (place.folder / "whole").iterdir()}
    for deadly in range(1, 12):
        count = 0

        def counted(real, deadly=deadly):
            def call(path, *args, **kwargs):
                nonlocal count
                count += 1
                if count >= deadly:
                    raise Killed
                return real(path, *args, **kwargs)

            return call

        with monkeypatch.context() as patched:

            def from_now_on(*args, patched=patched, counted=counted, **kwargs):
                for where, name in ((os, "replace"), (Path, "rmdir"), (shutil, "rmtree")):
                    patched.setattr(where, name, counted(getattr(where, name)))

            # The last calls before a result is written.
            patched.setattr(progress.Progress, "on_train_end", from_now_on)
            patched.setattr(Recorder, "collect", first(from_now_on, Recorder.collect))
            try:
                survived = run(*settings, output="killed") == 0
            except Killed:
                survived = False
        if survived:
            break
        assert run(*settings, "--resume", output="killed") == 0
        assert {p.name for p in (place.folder / "killed").iterdir()} == whole
        assert same(place.adapter("whole"), place.adapter("killed"))
        shutil.rmtree(place.folder / "killed")
    assert deadly > 4


def test_a_kill_while_cleaning_up_is_made_good(place, monkeypatch):
    """The notes beside the checkpoints were gone already, the checkpoints not."""
    with monkeypatch.context() as patched:
        patched.setattr(phases, "clean_up", lambda settings: None)
        assert place.record("--save-steps", "2") == 0
    work = place.folder / "nu" / "checkpoints"
    (work / "settings.json").unlink()
    assert list(work.glob("checkpoint-*"))
    assert place.record("--save-steps", "2", "--resume") == 0
    assert not work.exists()


def files_in(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("phase", ["record", "tune"])
@pytest.mark.parametrize(
    "more", [["--dry-run"], ["--targets", "nothing"], ["--training.optim=adamw_apex_fused"]]
)
def test_only_a_run_that_begins_takes_what_it_overwrites(place, phase, more, monkeypatch):
    place.record()
    run = place.record if phase == "record" else place.tune
    killed(run, monkeypatch, output="cut")
    before = files_in(place.folder / "cut")
    assert any("checkpoint-4" in str(p) for p in before)
    assert run("--overwrite", *more, output="cut") == (0 if more == ["--dry-run"] else 2)
    assert files_in(place.folder / "cut") == before
    assert run("--save-steps", "2", "--resume", output="cut") == 0
    run("--save-steps", "2", output="whole")
    assert same(place.adapter("whole"), place.adapter("cut"))


def test_a_plan_of_a_finished_run_cleans_nothing_up(place, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(phases, "clean_up", lambda settings: None)
        assert place.record("--save-steps", "2") == 0
    before = files_in(place.folder / "nu")
    assert place.record("--save-steps", "2", "--resume", "--dry-run") == 0
    assert files_in(place.folder / "nu") == before


def test_a_gathering_takes_the_checkpoints_that_it_overwrites(place, tiny, monkeypatch):
    killed(place.record, monkeypatch)
    argv = ["record", "--model", str(tiny), "--sequences", "4", "--block-size", "16", "--output"]
    argv += [str(place.folder / "nu"), "--overwrite"]
    assert cli.main([*argv, "--dry-run"]) == 0
    assert (place.folder / "nu" / "checkpoints" / "checkpoint-4").exists()
    assert cli.main(argv) == 0
    assert store.read_info(place.folder / "nu")["kind"] == "blend"
    assert not (place.folder / "nu" / "checkpoints").exists()


def test_a_finished_run_that_is_resumed_is_read(place, capsys):
    assert place.record() == 0
    before = (place.folder / "nu" / store.MARKER).read_bytes()
    assert place.record("--resume") == 0
    assert (place.folder / "nu" / store.MARKER).read_bytes() == before
    assert place.record("--resume", "--seed", "9") == 2
    assert "already holds a result" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"log": 3}, {"log": [{"loss": "x"}]}, {"seconds": None}, {"steps": []},
        {"forgetting": {"budget": 1}}, {"log": [3]},
    ],
)  # fmt: skip
def test_a_damaged_note_of_a_finished_run_is_one_error(place, capsys, change):
    place.record()
    assert place.tune() == 0
    path = place.folder / "mu" / "tune.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    capsys.readouterr()
    assert place.tune("--resume") == 2
    assert "tune.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"settings": 3},
        {"content": None},
        {"content": {}},
        {"text_rows": "x"},
        {"settings": {"max_steps": "x"}},
    ],
)
def test_damaged_notes_of_an_unfinished_run_are_one_error(place, monkeypatch, capsys, change):
    killed(place.record, monkeypatch)
    path = place.folder / "nu" / "checkpoints" / "settings.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    capsys.readouterr()
    status, said = place.record("--save-steps", "2", "--resume"), capsys.readouterr().err
    assert (status, "Traceback" in said) == ((0 if "text_rows" in change else 2), False)


def test_a_second_command_on_one_folder_is_refused(place, capsys):
    (place.folder / "nu").mkdir()
    code = (
        "import sys; from pathlib import Path; from hlora.files import lock; "
        f"lock(Path({str(place.folder / 'nu')!r})); print('held', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    assert place.record() == 2
    assert "Another process is writing" in capsys.readouterr().err
    other.kill()
    other.wait()
    assert place.record() == 0


def test_a_diverging_run_ends_with_1_and_the_likely_cause(place, capsys):
    assert place.record("--learning-rate", "1e38") == 1
    err = capsys.readouterr().err
    assert "learning rate of 1e+38" in err
    assert "Traceback" not in err
    assert not (place.folder / "nu" / store.MARKER).exists()


def test_max_bad_steps_is_heeded(place, capsys):
    assert place.record("--learning-rate", "1e38", "--max-steps", "40", "--max-bad-steps", "3") == 1
    assert "the last 3 steps" in capsys.readouterr().err
    [checkpoint] = (place.folder / "nu" / "checkpoints").glob("checkpoint-*")
    assert files.fault(checkpoint) is None
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 4


CONSTANT = ["--training.lr_scheduler_type", "constant", "--save-steps", "2"]


@pytest.mark.parametrize("phase", ["record", "tune"])
@pytest.mark.parametrize("finished", [True, False])
def test_a_lengthened_run_is_the_long_run(place, phase, finished, monkeypatch, capsys):
    """Bit for bit, where the learning rate does not depend on the length."""
    place.record("--text-blocks", "16")
    run = place.record if phase == "record" else place.tune
    more = [*CONSTANT, "--lora-dropout", "0.2", "--seed", "2"]
    more += ["--text-blocks", "16"] if phase == "record" else ["--anchor", "base"]
    assert run(*more, "--max-steps", "8", output="whole") == 0
    if finished:
        assert run(*more, "--max-steps", "4", "--keep-checkpoint", output="on") == 0
        [kept] = (place.folder / "on" / "checkpoints").glob("checkpoint-*")
        assert kept.name == "checkpoint-4"
    else:
        killed(run, monkeypatch, *more, "--max-steps", "5", step=4, output="on")
    assert run(*more, "--max-steps", "8", output="on") == 2  # without --resume
    capsys.readouterr()
    assert run(*more, "--max-steps", "8", "--resume", output="on") == 0
    assert "extended to --max-steps 8" in capsys.readouterr().err
    assert same(place.adapter("whole"), place.adapter("on"))
    assert not (place.folder / "on" / "checkpoints").exists()
    if phase == "record":
        assert same(importance(place, "whole"), importance(place, "on"))
    else:
        logs = [json.loads((place.folder / n / "tune.json").read_text()) for n in ("whole", "on")]
        assert [n["steps"] for n in logs] == [8, 8]
        assert [e["loss"] for e in logs[0]["log"]] == [e["loss"] for e in logs[1]["log"]]


def test_a_run_that_is_lengthened_by_a_step_takes_it(place):
    """A schedule that falls to zero ends at a rate of zero."""
    place.record()
    more = ["--training.lr_scheduler_type", "linear", "--save-steps", "2"]
    assert place.tune(*more, "--max-steps", "4", "--keep-checkpoint", output="on") == 0
    before = place.adapter("on")
    assert place.tune(*more, "--max-steps", "5", "--resume", output="on") == 0
    assert not same(before, place.adapter("on"))


def test_a_lengthened_recording_goes_over_its_text_again(place, monkeypatch):
    assert place.record(*CONSTANT, "--max-steps", "2", "--keep-checkpoint") == 0
    for steps in ("3", "5"):
        assert place.record(*CONSTANT, "--max-steps", steps, "--keep-checkpoint", "--resume") == 0
    noted = store.read_info(place.folder / "nu")
    assert noted["text"] == {"a": 8, "b": 8}
    assert noted["summary"]["steps"] == 5


def test_a_finished_run_without_its_checkpoint_cannot_be_lengthened(place, capsys):
    assert place.record(*CONSTANT) == 0
    before = (place.folder / "nu" / store.MARKER).read_bytes()
    assert place.record(*CONSTANT, "--resume", "--max-steps", "9") == 2
    assert "--keep-checkpoint" in capsys.readouterr().err
    assert place.record(*CONSTANT, "--resume", "--max-steps", "2") == 2
    assert "already holds a result" in capsys.readouterr().err
    assert (place.folder / "nu" / store.MARKER).read_bytes() == before


def test_a_killed_lengthening_is_resumed(place, monkeypatch, capsys):
    place.record()
    place.tune(*CONSTANT, "--max-steps", "8", output="whole")
    assert place.tune(*CONSTANT, "--max-steps", "2", "--keep-checkpoint") == 0
    killed(place.tune, monkeypatch, *CONSTANT, "--max-steps", "8", "--resume", step=6)
    assert json.loads((place.folder / "mu" / "tune.json").read_text())["steps"] == 2
    assert place.tune(*CONSTANT, "--max-steps", "8") == 2
    assert place.tune(*CONSTANT, "--max-steps", "8", "--resume") == 0
    assert same(place.adapter("whole"), place.adapter("mu"))
