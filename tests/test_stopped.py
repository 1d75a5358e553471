"""What is kept of a command that is stopped, and that it says so."""

import os
import signal

import pytest

import hlora.cli.study
from hlora.cli import main as cli
from hlora.core.budget import Budgeted
from hlora.hf import hub
from hlora.hf.record import Record
from hlora.run import phases, progress, rewind, scoring
from tests.end_to_end.test_commands import Place, same


@pytest.fixture
def place(tmp_path, tiny):
    return Place(tmp_path, tiny)


@pytest.fixture
def held(place, capsys):
    """A tuning on a budget, which measures after it has trained."""
    argv = ["record", "--model", place.model, "--sequences", "8", "--block-size", "16"]
    assert cli.main([*argv, "--output", str(place.folder / "nu")]) == 0
    budget = ["--forget-at-most", "0.001", "--text", str(place.folder / "a.txt")]

    def tune(*more, output="mu"):
        code = place.tune(*budget, *more, "--learning-rate", "0.02", output=output)
        return code, capsys.readouterr().err

    return tune


def stop(*args, **kwargs):
    raise KeyboardInterrupt


def terminate(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    raise AssertionError("It was not heard.")


def signalled(then, times=1):
    def first(*args, **kwargs):
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
        return then(*args, **kwargs)

    return first


@pytest.mark.parametrize("when", ["measuring", "at the end of training"])
def test_what_was_trained_outlives_a_stop_while_it_is_measured(place, held, monkeypatch, when):
    """Without checkpoints too. What goes on is what would have been."""
    assert held("--save-steps", "0", output="whole")[0] == 0
    assert not (place.folder / "whole" / "checkpoints").exists()
    with monkeypatch.context() as patched:
        patched.setattr(phases, "within_budget", stop)
        if when != "measuring":
            patched.setattr(Budgeted, "keep", signalled(Budgeted.keep))
        code, said = held("--save-steps", "0")
    assert code == 130
    assert "Stopped. Step 6 is kept. Continue with: hlora tune ... --output" in said
    assert not (place.folder / "mu" / "tune.json").exists()
    monkeypatch.setattr(progress.Progress, "on_step_end", stop)  # no step is taken again
    assert held("--save-steps", "0", "--resume")[0] == 0
    assert same(place.adapter("whole"), place.adapter("mu"))
    assert not (place.folder / "mu" / "checkpoints").exists()


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("phase", ["tune", "record", "gather"])
def test_a_stop_while_the_result_is_written_comes_after_it(
    place, phase, times, monkeypatch, capsys
):
    """A second one too: what is half written is neither kept nor gone."""
    if phase == "gather":
        monkeypatch.setattr(phases, "save_importance", signalled(phases.save_importance, times))
        argv = ["record", "--model", place.model, "--sequences", "4", "--block-size", "16"]
        code = cli.main([*argv, "--output", str(place.folder / "nu")])
    elif phase == "record":
        monkeypatch.setattr(phases, "clean_up", stop)
        code = place.record("--save-steps", "0")
    else:
        place.record()
        monkeypatch.setattr(phases, "save_adapter", signalled(phases.save_adapter, times))
        code = place.tune("--save-steps", "0")
    output = place.folder / ("mu" if phase == "tune" else "nu")
    assert code == 130
    assert f"Stopped. The result is whole, in {output}." in capsys.readouterr().err
    assert (output / "adapter_config.json").exists()


@pytest.mark.parametrize("times", [1, 2])
def test_a_stop_while_a_rewound_adapter_is_written_comes_after_it(
    place, times, monkeypatch, capsys
):
    """The curve took many passes."""
    text = ["--text", str(place.folder / "a.txt"), "--block-size", "16", "--text-blocks", "4"]
    place.record()
    assert place.tune("--phi", "0") == 0
    monkeypatch.setattr(rewind, "save_adapter", signalled(rewind.save_adapter, times))
    argv = ["rewind", "--model", place.model, "--adapter", str(place.folder / "mu"), *text]
    output = place.folder / "rewound"
    assert cli.main([*argv, "--forget-at-most", "1e-5", "--output", str(output)]) == 130
    assert f"Stopped. The result is whole, in {output}." in capsys.readouterr().err
    assert (output / "rewind.json").exists()


@pytest.mark.parametrize("phase", ["tune", "record"])
def test_a_stop_after_the_last_step_is_one(place, phase, monkeypatch, capsys):
    """The result is written, and then it stops."""
    if phase == "tune":
        place.record()
    monkeypatch.setattr(progress.Progress, "on_train_end", signalled(lambda *a, **k: None))
    assert (place.record if phase == "record" else place.tune)("--save-steps", "0") == 130
    output = place.folder / ("mu" if phase == "tune" else "nu")
    assert f"Stopped. The result is whole, in {output}." in capsys.readouterr().err
    assert (output / "adapter_config.json").exists()


def test_what_a_worker_leaves_to_its_parent_it_ignores_while_it_listens(monkeypatch):
    """The parent then asks it to end."""
    monkeypatch.setattr("multiprocessing.parent_process", lambda: "there is one")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop = progress.Asked()
        with stop.listening():
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.asked
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.asked
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def at_once(self, args, state, control, **kwargs):
    """As the second Ctrl-C, which waits for no checkpoint."""
    if state.global_step == 5:
        raise KeyboardInterrupt


@pytest.mark.parametrize(("every", "said"), [("2", "Step 4 is kept. Continue"), ("0", "Nothing")])
def test_a_stop_at_once_says_which_step_is_kept(place, every, said, monkeypatch, capsys):
    monkeypatch.setattr(Record, "on_step_end", at_once)
    assert place.record("--save-steps", every) == 130
    assert f"Stopped. {said}" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(phases, "load", stop)
    assert place.record("--save-steps", every, "--resume") == 130
    kept = "The checkpoints in" if every == "2" else "Nothing of this run was kept"
    assert f"Stopped. {kept}" in capsys.readouterr().err
    assert place.record("--overwrite") == 130
    assert "Stopped. Nothing of this run was kept" in capsys.readouterr().err
    monkeypatch.undo()
    assert place.record("--save-steps", every, "--resume") == 0


def test_what_is_said_to_go_on_with_is_taken(place, monkeypatch, capsys):
    place.record()
    monkeypatch.setattr(Record, "on_step_end", at_once)
    again = ["--save-steps", "2", "--learning-rate", "0.003"]
    assert place.record(*again, "--overwrite") == 130
    assert "--overwrite --resume\n" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(progress.Progress, "on_step_end", fifth_only)
    assert place.record(*again, "--overwrite", "--resume") == 0
    monkeypatch.undo()
    monkeypatch.setattr(phases, "load", stop)
    capsys.readouterr()
    assert place.record(*again, "--resume") == 130
    assert f"The result in {place.folder / 'nu'} is as it was." in capsys.readouterr().err


def fifth_only(self, args, state, control, **kwargs):
    assert state.global_step > 4


def test_a_half_written_checkpoint_hinders_nothing(place, monkeypatch, capsys):
    monkeypatch.setattr(Record, "on_step_end", at_once)
    assert place.record("--save-steps", "4") == 130
    (place.folder / "nu/checkpoints/checkpoint-4/trainer_state.json").unlink()
    monkeypatch.undo()
    capsys.readouterr()
    assert place.record("--save-steps", "4") == 0  # without --resume or --overwrite


def test_a_stop_while_it_is_looked_what_is_kept(place, monkeypatch, capsys):
    monkeypatch.setattr(Record, "on_step_end", at_once)
    monkeypatch.setattr(phases, "kept", stop)
    assert place.record("--save-steps", "2") == 130
    said = f"Stopped. The checkpoints in {place.folder / 'nu'} are kept: --resume goes on."
    assert said in capsys.readouterr().err
    monkeypatch.undo()
    assert place.record("--save-steps", "2", "--resume") == 0


def test_a_stop_that_a_library_made_an_error_of_its_own(place, monkeypatch, capsys):
    def importing(settings):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except KeyboardInterrupt:
            raise ModuleNotFoundError("half imported") from None

    __import__("hlora.cli.record")
    monkeypatch.setattr("hlora.cli.record.run", importing)
    assert place.record() == 130
    assert capsys.readouterr().err == "hlora: Stopped.\n"


def test_a_demo_that_was_stopped_before_it_began(tmp_path, monkeypatch, capsys):
    __import__("hlora.cli.demo")
    monkeypatch.setattr("hlora.cli.demo.run", stop)
    for page, said in ((False, "without --overwrite goes on"), (True, "Nothing of this run")):
        (tmp_path / "report.html").write_text("") if page else None
        assert cli.main(["demo", "--output", str(tmp_path), "--overwrite"]) == 130
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("stop", [stop, terminate])
def test_what_keeps_nothing_says_so(place, stop, monkeypatch, capsys):
    before = signal.getsignal(signal.SIGTERM)
    text = ["--text", str(place.folder / "a.txt"), "--block-size", "16"]
    place.record()
    out = place.folder / "out"
    adapter = ["--model", place.model, "--adapter", str(place.folder / "nu")]
    for where, name, argv in (
        (phases.GeneralPhase, "_write_own", ["record", "--model", place.model, "--sequences", "4"]),
        (scoring, "score", ["eval", *adapter, *text, "--json", str(out / "s.json")]),
        (rewind, "divergence", ["rewind", *adapter, *text]),
    ):
        monkeypatch.setattr(where, name, stop)
        argv += [] if argv[0] == "eval" else ["--output", str(out)]
        assert cli.main(argv) == 130
        assert "Stopped. Nothing of this run was kept" in capsys.readouterr().err
        assert not out.exists()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_study_and_an_upload_say_what_they_keep(place, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(hlora.cli.study, "read_study", stop)
    assert cli.main(["study", "s.yaml"]) == 130
    assert "Finished runs are kept: the same command goes on" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", "hf_" + "s" * 30)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", stop)
    with pytest.raises(KeyboardInterrupt, match=rf"result is whole, in {tmp_path}\. Again\."):
        hub.push(tmp_path, "me/mu", advice=" Again.")
    for more, said in ([], "--resume tries again"), (["--overwrite"], "and without --overwrite"):
        assert place.record("--push-to-hub", "me/nu", *more) == 130
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "advised"),
    [
        (["record", "--text", "a"], "lower --batch-size and raise --gradient-accumulation"),
        (["eval", "--text", "a"], "lower --batch-size."),
        (["merge", "--adapter", "a"], "take a larger one."),
    ],
)
def test_what_is_advised_are_settings_of_the_command(argv, advised, place, monkeypatch, capsys):
    name, *rest = argv
    monkeypatch.setattr("hlora.run.inputs.check", lambda settings: None)
    rest += ["--model", "m"] + ([] if name == "eval" else ["--output", str(place.folder / "o")])

    def raising(error):
        def run(settings):
            raise error

        return run

    __import__(f"hlora.cli.{name}")
    for error in (
        RuntimeError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ):
        monkeypatch.setattr(f"hlora.cli.{name}.run", raising(error))
        assert cli.main([name, *rest]) == 1
        assert advised in capsys.readouterr().err
    monkeypatch.setattr(f"hlora.cli.{name}.run", raising(OSError(28, "No space left")))
    assert cli.main([name, *rest]) == 1
    assert ("--resume" in capsys.readouterr().err) == (name == "record")
