"""A domain learned with another of PEFT's adapters than LoRA, as a peer."""

import json

import peft
import pytest
import torch

import hlora
from hlora.cli import main as cli
from hlora.cli.options import parse
from hlora.run.models import load, load_adapter
from hlora.run.phases import DomainPhase
from hlora.run.settings import TuneSettings
from tests.test_peers import settings

GIVEN = [
    {"peft_type": "OFT", "oft_block_size": 8},
    pytest.param(
        {"peft_type": "OSF", "effective_rank": 0.5},
        marks=pytest.mark.skipif(not hasattr(peft, "OSFConfig"), reason="this PEFT has no OSF"),
    ),
]


@pytest.mark.parametrize("given", GIVEN)
def test_what_was_trained_is_what_is_loaded(given, tiny, tmp_path):
    phase = DomainPhase(
        settings(tiny, tmp_path, peft=given, dtype="fp32", max_steps=6, learning_rate=0.02)
    )
    done = phase.run()
    assert done.steps == 6
    ids = torch.arange(3, 40)[None]
    base, _ = load(str(tiny))
    with torch.no_grad():
        before = base(input_ids=ids).logits
        trained = phase.model.eval()(input_ids=ids).logits
        loaded = load_adapter(base, tmp_path / "o", others=True)
        found = loaded(input_ids=ids).logits
        with loaded.disable_adapter():
            torch.testing.assert_close(loaded(input_ids=ids).logits, before)
    torch.testing.assert_close(found, trained, rtol=1e-4, atol=1e-5)
    assert (found - before).abs().max() > 1e-3
    with pytest.raises(hlora.HloraError):  # what holds, rewinds or merges takes LoRA alone
        load_adapter(load(str(tiny))[0], tmp_path / "o", trainable=True)


def test_at_rate_zero_it_is_the_base_model(tiny, tmp_path):
    given = {"peft_type": "OFT", "oft_block_size": 8}
    phase = DomainPhase(
        settings(tiny, tmp_path, peft=given, dtype="fp32", max_steps=2, learning_rate=0.0)
    )
    phase.run()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            phase.model(input_ids=ids).logits, load(str(tiny))[0](input_ids=ids).logits
        )


def test_the_command_takes_it_and_eval_scores_it(tiny, tmp_path, capsys):
    task, text = tmp_path / "task.jsonl", tmp_path / "a.txt"
    task.write_text('{"prompt": "the cat", "completion": " sat on a mat"}\n' * 12)
    text.write_text("the cat sat on a mat and saw the rat " * 40)
    out = tmp_path / "o"
    argv = ["tune", "--model", str(tiny), "--task", str(task), "--device", "cpu", "--max-steps"]
    argv += ["2", "--peft.peft_type=OFT", "--peft.oft_block_size", "8", "--output", str(out)]
    assert cli.main([*argv, "--dry-run"]) == 0
    assert "not LoRA" in capsys.readouterr().out
    assert cli.main(argv) == 0
    assert json.loads((out / "adapter_config.json").read_text())["oft_block_size"] == 8
    assert cli.main(["eval", "--model", str(tiny), "--adapter", str(out), "--text", str(text)]) == 0
    assert cli.main(["rewind", "--model", str(tiny), "--adapter", str(out), "--text", str(text),
                     "--output", str(tmp_path / "r")]) == 2  # fmt: skip


def test_values_are_read_as_what_they_stand_for():
    argv = ["--model", "m", "--task", "sciq", "--output", "o", "--peft.peft_type", "OFT"]
    argv += ["--peft.r=4", "--peft.coft=true", "--peft.eps", "1e-3", "--peft.layers=[0, 1]"]
    found = parse(TuneSettings, argv, "hlora tune").peft
    assert found == {"peft_type": "OFT", "r": 4, "coft": True, "eps": 1e-3, "layers": [0, 1]}


@pytest.mark.parametrize(
    ("given", "more", "said"),
    [
        ({"peft_type": "XLORA"}, {}, "XLORA"),
        ({"r": 4}, {}, "peft_type"),
        ({"peft_type": "OFT", "oft_rank": 4}, {}, "oft_rank"),
        ({"peft_type": "OFT"}, {"kl": ["task"]}, "--kl"),
        ({"peft_type": "OFT"}, {"record": "r"}, "--record"),
    ],
)
def test_what_it_cannot_be_is_refused(given, more, said, tiny, tmp_path):
    with pytest.raises(hlora.InputError, match=said):
        DomainPhase(settings(tiny, tmp_path, peft=given, **more))
