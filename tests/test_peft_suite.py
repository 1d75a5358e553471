"""The penalty in the loop of PEFT's method comparison: a stand-in with the suite's own seams.

Not its code, and neither its data nor its model: utils.py makes the optimizer, run.py trains in a
plain loop with clipping and a scheduler, and tells what it did to the predictions on other rows.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import peft_suite
from hlora.cli import main as cli

UTILS = """
import torch
from transformers import get_cosine_schedule_with_warmup

def get_optimizer_and_scheduler(model, *, optimizer_type, max_steps, lr_scheduler_arg, **kwargs):
    optimizer = getattr(torch.optim, optimizer_type)(model.parameters(), **kwargs)
    return optimizer, get_cosine_schedule_with_warmup(optimizer, 1, max_steps)
"""
RUN = """
import json, sys
import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, set_seed
from utils import get_optimizer_and_scheduler

def predictions(model, rows):
    with torch.inference_mode():
        return model(input_ids=rows).logits.log_softmax(-1)

if __name__ == "__main__":
    verbose, folder = sys.argv[1:]
    assert verbose == "-v"
    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained("../model")
    model = get_peft_model(base, PeftConfig.from_pretrained(folder))
    optimizer, scheduler = get_optimizer_and_scheduler(
        model, optimizer_type="AdamW", max_steps=30, lr_scheduler_arg="cosine", lr=1e-2,
        weight_decay=0.1,
    )
    general, domain = torch.randint(3, 250, (8, 24)), torch.full((4, 24), 7)
    before = predictions(model, general)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(input_ids=domain, labels=domain).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
    lost = (before.exp() * (before - predictions(model, general))).sum(-1).mean()
    json.dump({"loss": loss.item(), "forgetting": lost.item()}, open("result.json", "w"))
"""


@pytest.fixture
def suite(tmp_path):
    from peft import LoraConfig

    from tests.tiny import write_model

    write_model(tmp_path / "model")
    (tmp_path / "suite").mkdir()
    (tmp_path / "suite" / "utils.py").write_text(UTILS)
    (tmp_path / "suite" / "run.py").write_text(RUN)
    LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM").save_pretrained(tmp_path / "suite/exp")
    argv = ["record", "--model", str(tmp_path / "model"), "--kind", "blend", "--sequences", "8"]
    argv += ["--block-size", "24", "--device", "cpu", "--output", str(tmp_path / "base")]
    assert cli.main(argv) == 0
    return tmp_path / "suite"


def run(suite, phi):
    argv = [sys.executable, "-m", "benchmarks.peft_suite", str(suite), str(suite.parent / "base")]
    done = subprocess.run(
        [*argv, str(phi), "-v", "exp"], cwd=Path(__file__).parents[1], text=True,
        capture_output=True, check=False, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"φ {phi:g}, R " in done.stdout
    return json.loads((suite / "result.json").read_text())


def test_it_holds_in_a_loop_that_knows_nothing_of_it(suite):
    free, held = run(suite, 0), run(suite, 30_000)
    assert 0 < held["forgetting"] < 0.5 * free["forgetting"]
    assert held["loss"] > free["loss"]


@pytest.fixture
def refused(suite, monkeypatch):
    """What it ends with, here and not in a process of its own: the libraries are read once."""

    def said(phi=1):
        monkeypatch.chdir(suite)
        monkeypatch.setattr(sys, "path", list(sys.path))
        sys.modules.pop("utils", None)  # of the time before
        argv = ["peft_suite", str(suite), str(suite.parent / "base"), str(phi), "-v", "exp"]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as ended:
            peft_suite.main()
        assert str(ended.value).startswith("error: ")
        return str(ended.value)

    yield said
    sys.modules.pop("utils", None)


def test_another_suite_is_refused(suite, refused):
    (suite / "utils.py").write_text("make_optimizer = None\n")
    assert "get_optimizer_and_scheduler" in refused()
    (suite / "utils.py").unlink()
    assert "has no utils.py" in refused()


def test_an_experiment_that_cannot_be_held_is_refused(suite, refused):
    config = json.loads((suite / "exp/adapter_config.json").read_text())
    (suite / "exp/adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    assert "use_dora" in refused()
    assert "phi" in refused(-1)
