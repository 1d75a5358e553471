"""A base model quantized while it is loaded."""

import importlib.util
import json

import pytest
import torch

from hlora.cli import main as cli
from hlora.core import store
from hlora.core.evaluating import evaluating
from hlora.run.models import load
from tests.test_experts import base, is_fused
from tests.tiny import questions, tokenizer, write_model, write_rows, write_text

BITS = pytest.mark.parametrize("bits", [4, 8])
needs = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """As wide as the 4-bit kernels of a CPU ask for."""
    return write_model(tmp_path_factory.mktemp("wide"), width=128)


@needs
@BITS
@pytest.mark.filterwarnings("ignore")  # bitsandbytes has its own to say
def test_record_tune_eval_and_merge(bits, wide, tmp_path, capsys):
    write_text(tmp_path / "a.txt")
    write_rows(tmp_path / "q.jsonl", questions())
    flags = ["--model", str(wide), "--device", "cpu", "--batch-size", "4", "--dtype", "fp32"]
    flags += [f"--load-in-{bits}bit"]
    text, task = ["--text", str(tmp_path / "a.txt")], ["--task", str(tmp_path / "q.jsonl")]
    steps = ["--max-steps", "3", "--logging-steps", "1"]
    nu, mu = str(tmp_path / "nu"), str(tmp_path / "mu")
    short = ["--block-size", "32"]
    assert (
        cli.main(["record", *flags, "--kind", "factored", *text, *steps, *short, "--output", nu])
        == 0
    )
    tune = ["tune", *flags, *task, *steps, "--importance", nu, "--output"]
    assert cli.main([*tune, str(tmp_path / "dry"), "--dry-run"]) == 0
    assert cli.main([*tune, mu]) == 0
    noted = json.loads((tmp_path / "mu" / "tune.json").read_text())
    assert noted["log"][-1]["R"] > 0
    assert f"load in {bits}bit: `True`" in (tmp_path / "mu" / "README.md").read_text()
    assert cli.main(["eval", *flags, "--adapter", mu, *text, *task, *short]) == 0
    back = ["rewind", *flags, "--adapter", mu, *text, *short, "--output", str(tmp_path / "back")]
    assert cli.main(back) == 0
    into = ["merge", "--adapter", mu, "--model", str(wide), "--output", str(tmp_path / "out")]
    assert cli.main(into) == 0  # into the model that was quantized


@needs
@pytest.mark.skipif(not is_fused(), reason="this transformers keeps experts as Linear modules")
@BITS
@pytest.mark.filterwarnings("ignore")
def test_experts_that_are_one_parameter_stay_whole_and_are_told(bits, tmp_path, capsys):
    model = base("Mixtral", hidden_size=128, intermediate_size=128, vocab_size=len(tokenizer()))
    model.save_pretrained(tmp_path / "m")
    tokenizer().save_pretrained(tmp_path / "m")
    write_text(tmp_path / "a.txt")
    write_rows(tmp_path / "q.jsonl", questions())
    flags = ["--model", str(tmp_path / "m"), "--device", "cpu", "--dtype", "fp32"]
    flags += [f"--load-in-{bits}bit", "--targets", "all-linear", "--batch-size", "4"]
    text = ["--text", str(tmp_path / "a.txt"), "--block-size", "32", "--sequences", "8"]
    assert cli.main(["record", *flags, *text, "--output", str(tmp_path / "held")]) == 0
    told = capsys.readouterr().err
    assert "mlp.experts.gate_up_proj" in told
    assert "stay in float32" in told
    tune = ["tune", *flags, "--task", str(tmp_path / "q.jsonl"), "--max-steps", "3"]
    tune += ["--logging-steps", "1", "--importance", str(tmp_path / "held")]
    assert cli.main([*tune, "--output", str(tmp_path / "mu")]) == 0
    assert json.loads((tmp_path / "mu" / "tune.json").read_text())["log"][-1]["R"] > 0
    norms = store.load(tmp_path / "held").importance.norms()
    assert norms["model.layers.0.mlp.experts.0.down_proj"] > 0


@needs
@BITS
def test_the_weights_have_as_many_bits(bits, wide):
    model, _ = load(str(wide), bits=bits)
    weight = model.model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == {4: torch.uint8, 8: torch.int8}[bits]
    assert weight.numel() == 128 * 128 * bits // 8
    assert not any(p.requires_grad for p in model.parameters())


@BITS
def test_without_bitsandbytes_the_extra_is_named(bits, tiny, tmp_path, monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "bitsandbytes" else find(n, *a)
    )
    write_text(tmp_path / "a.txt")
    argv = ["eval", "--model", str(tiny), "--text", str(tmp_path / "a.txt"), f"--load-in-{bits}bit"]
    assert cli.main(argv) == 2
    assert "hlora[quant]" in capsys.readouterr().err


@needs
def test_what_is_quantized_already_is_refused(tiny, tmp_path, capsys):
    import shutil

    base = shutil.copytree(tiny, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    write_text(tmp_path / "a.txt")
    argv = ["eval", "--text", str(tmp_path / "a.txt"), "--load-in-4bit", "--model"]
    assert cli.main([*argv, str(base)]) == 2
    assert "already quantized" in capsys.readouterr().err
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert cli.main([*argv, str(tmp_path / "m.gguf")]) == 2
    assert ".gguf" in capsys.readouterr().err


@needs
@BITS
@pytest.mark.filterwarnings("ignore")
def test_looking_at_the_predictions_leaves_it_trainable(bits, wide):
    """On a CPU bitsandbytes packs 4-bit weights in evaluation, and nothing trains below them."""
    from peft import LoraConfig, get_peft_model

    model, _ = load(str(wide), bits=bits)
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    ids = torch.randint(3, 90, (2, 9))
    with torch.no_grad(), evaluating(model):
        model(input_ids=ids)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)
