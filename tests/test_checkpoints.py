"""A Trainer that resumes: whole checkpoints only, with the state that belongs to them."""

import json
import math
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import hlora
from hlora import files
from hlora.core import store
from hlora.hf.checkpoints import newest_whole
from hlora.hf.record import RECORD_STATE
from tests.conftest import lora_model, make_trainer, token_rows

SAVED = {"save_strategy": "steps", "save_steps": 2}


def recording(folder, name, seed=0, attach=True, **settings):
    record = hlora.Record(folder / f"nu-{name}", quiet=True, kind="dense")
    rows = token_rows(seed=seed)
    trainer = make_trainer(
        lora_model(), folder / name, [] if attach else [record], rows=rows, **SAVED, **settings
    )
    if attach:
        hlora.attach(trainer, record)
    return trainer, record


def importance(folder, name):
    return load_file(folder / f"nu-{name}" / store.TENSORS)


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_the_state_is_that_of_the_folder_that_is_resumed(tmp_path):
    recording(tmp_path, "a")[0].train()
    recording(tmp_path, "b", seed=1)[0].train()
    shutil.rmtree(tmp_path / "nu-b")
    trainer, _ = recording(tmp_path, "b")
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4") + "/")
    assert same(importance(tmp_path, "a"), importance(tmp_path, "b"))
    assert trainer.args.resume_from_checkpoint is None


def test_another_run_s_state_is_refused(tmp_path):
    """A callback that was not attached cannot know the folder."""
    recording(tmp_path, "a")[0].train()
    recording(tmp_path, "b", seed=1)[0].train()
    shutil.rmtree(tmp_path / "nu-b")
    trainer, _ = recording(tmp_path, "b", attach=False)
    with pytest.raises(hlora.StoreError, match="another run"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))


def test_another_penalty_s_state_is_refused(tmp_path, nu):
    for name, seed in (("a", 0), ("b", 1)):
        trainer = make_trainer(lora_model(), tmp_path / name, rows=token_rows(seed=seed), **SAVED)
        hlora.attach(trainer, hlora.Penalty(nu))
        trainer.train()
    state = "hlora_penalty.safetensors"
    shutil.copy(tmp_path / "b" / "checkpoint-4" / state, tmp_path / "a" / "checkpoint-4" / state)
    files.seal(tmp_path / "a" / "checkpoint-4")
    trainer = make_trainer(lora_model(), tmp_path / "a", **SAVED)
    hlora.attach(trainer, hlora.Penalty(nu))
    with pytest.raises(hlora.StoreError, match="another run"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))


def test_true_takes_the_newest_whole_one(tmp_path, caplog):
    recording(tmp_path, "a")[0].train()
    whole = importance(tmp_path, "a")
    shutil.rmtree(tmp_path / "nu-a")
    (tmp_path / "a" / "checkpoint-6" / "trainer_state.json").write_text("")
    (tmp_path / "a" / "checkpoint-4" / "optimizer.pt").unlink()
    assert newest_whole(tmp_path / "a").name == "checkpoint-2"
    recording(tmp_path, "a")[0].train(resume_from_checkpoint=True)
    assert "optimizer.pt is missing" in caplog.text
    assert same(whole, importance(tmp_path, "a"))
    (tmp_path / "a" / "checkpoint-2" / RECORD_STATE).write_bytes(b"x")
    with pytest.raises(hlora.StoreError, match=f"{RECORD_STATE} is damaged"):
        recording(tmp_path, "c")[0].train(str(tmp_path / "a" / "checkpoint-2"))


def test_a_run_at_its_end_takes_no_further_step(tmp_path):
    recording(tmp_path, "a", lr_scheduler_type="constant")[0].train()
    whole = importance(tmp_path, "a")
    shutil.rmtree(tmp_path / "nu-a")
    trainer, record = recording(tmp_path, "a", lr_scheduler_type="constant")
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == record.summary["steps"] == 6
    assert trainer.args.max_steps == 6
    assert same(whole, importance(tmp_path, "a"))


class Harm:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
@pytest.mark.parametrize("content", [b"", b"x", pickle.dumps({"a": 1}), "harm"])
def test_a_signed_checkpoint_that_cannot_be_read_is_one_error(tmp_path, file, content):
    recording(tmp_path, "a")[0].train()
    shutil.rmtree(tmp_path / "nu-a")
    path = tmp_path / "a" / "checkpoint-4" / file
    if content == "harm":
        torch.save(Harm(tmp_path / "ran"), path)
    else:
        path.write_bytes(content)
    files.seal(path.parent)
    trainer, _ = recording(tmp_path, "a")
    with pytest.raises(hlora.StoreError, match="checkpoint-4 cannot be resumed"):
        trainer.train(resume_from_checkpoint=str(path.parent))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"global_step": "4"}, {"global_step": -1}, {"epoch": math.nan}, {"log_history": {}},
        {"log_history": [1]}, {"log_history": [{"loss": "x"}]}, {"stateful_callbacks": []},
        {"max_steps": None}, {"train_batch_size": {}}, {"best_model_checkpoint": {}},
        {"unknown": 1},
    ],
)  # fmt: skip
def test_a_trainer_state_of_other_types_is_one_error(tmp_path, change):
    recording(tmp_path, "a")[0].train()
    shutil.rmtree(tmp_path / "nu-a")
    path = tmp_path / "a" / "checkpoint-4" / "trainer_state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    files.seal(path.parent)
    trainer, _ = recording(tmp_path, "a")
    with pytest.raises(hlora.StoreError, match=r"checkpoint-4 cannot be resumed \(trainer_state"):
        trainer.train(resume_from_checkpoint=str(path.parent))


@pytest.mark.parametrize("content", ["[" * 100_000, '{"a": {"b": 1}, "optimizer.pt": 3}', "3"])
def test_a_manifest_that_is_none_is_no_whole_checkpoint(tmp_path, content):
    (tmp_path / files.MANIFEST).write_text(content)
    assert files.fault(tmp_path)


class Interrupted(TrainerCallback):
    """As a notebook's stop button: once."""

    done = False

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3 and not self.done:
            self.done = True
            raise KeyboardInterrupt


def test_an_interrupted_trainer_that_goes_on_is_one_that_was_not(tmp_path, nu):
    """The same Trainer, model and parts; R and ω are those of six steps."""
    found = []
    for name in ("whole", "cut"):
        record = hlora.Record(tmp_path / f"nu-{name}", quiet=True, kind="dense")
        trainer = make_trainer(lora_model(), tmp_path / name, **SAVED, logging_steps=1)
        hlora.attach(trainer, record, hlora.Penalty(nu, phi=0.5))
        if name == "cut":
            trainer.add_callback(Interrupted())
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        trainer.train(resume_from_checkpoint=name == "cut")
        assert record.summary["steps"] == 6
        found.append([e["R"] for e in trainer.state.log_history if "R" in e])
    assert found[0] == found[1]
    assert len(found[0]) == 6
    assert same(importance(tmp_path, "whole"), importance(tmp_path, "cut"))
