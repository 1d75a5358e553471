"""The merged model is the base with the adapter, as files of its own."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import hlora
from hlora.cli import main as cli
from hlora.run import merge as merging
from hlora.run.models import load, load_adapter, new_adapter
from hlora.run.settings import TrainSettings
from tests.conftest import perturb
from tests.tiny import questions, write_model, write_rows, write_text

PROMPT = torch.tensor([[1, 40, 50, 60]])


def said(model):
    model.generation_config = GenerationConfig()
    return model.eval().generate(PROMPT, max_new_tokens=24, do_sample=False, pad_token_id=0)


def adapter_on(base, folder, targets=("q_proj", "v_proj"), **changes):
    """A trained adapter, far from its start. Returns the model with it."""
    torch.manual_seed(0)
    model = load(str(base))[0]
    settings = TrainSettings(model="m", output="o", targets=list(targets), **changes)
    model = new_adapter(model, settings)
    perturb(model, size=0.5)
    model.save_pretrained(folder)
    return model


def merged(*words):
    return cli.main(["merge", *map(str, words)])


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
@pytest.mark.parametrize("rslora", [False, True])
def test_it_says_what_base_and_adapter_say(architecture, rslora, tmp_path, monkeypatch):
    base = write_model(tmp_path / "base", architecture)
    GenerationConfig(temperature=0.3, do_sample=True).save_pretrained(base)
    adapted = adapter_on(base, tmp_path / "a", rslora=rslora)
    monkeypatch.setattr(merging, "SHARD", "20KB")
    assert merged("--adapter", tmp_path / "a", "--output", tmp_path / "out") == 0
    out = tmp_path / "out"
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert not list(out.glob("adapter*"))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.equal(said(model), said(adapted))
    assert not torch.equal(said(model), said(load(str(base))[0]))
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, adapted(PROMPT).logits)
    words, before = (AutoTokenizer.from_pretrained(f) for f in (out, base))
    assert words("a cat")["input_ids"] == before("a cat")["input_ids"]
    assert words.special_tokens_map == before.special_tokens_map
    assert GenerationConfig.from_pretrained(out).temperature == 0.3
    config = (out / "config.json").read_text()
    assert str(tmp_path) not in config
    assert json.loads(config).get("use_cache", True)
    card = (out / "README.md").read_text()
    assert "adapter `a` added" in card
    assert 'library_name: "transformers"' in card


def test_the_type_of_the_files_is_kept_or_another_is_given(tiny, tmp_path):
    base = tmp_path / "base"
    model, words = load(str(tiny), dtype="bf16")
    model.save_pretrained(base)
    words.save_pretrained(base)
    adapter_on(base, tmp_path / "a")
    for name, given, dtype in (
        ("one", [], torch.bfloat16), ("two", ["--dtype", "fp32"], torch.float32),
    ):  # fmt: skip
        out = tmp_path / name
        assert merged("--adapter", tmp_path / "a", "--output", out, *given) == 0
        found = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        assert next(found.parameters()).dtype == dtype


def test_nothing_that_is_there_is_written_over(tiny, tmp_path, capsys):
    adapter_on(tiny, tmp_path / "a")
    copy = shutil.copytree(tiny, tmp_path / "copy")
    before = {p: p.read_bytes() for p in copy.iterdir()}
    for out in ("a", "copy"):
        assert merged("--adapter", tmp_path / "a", "--output", tmp_path / out) == 2
        assert "not empty" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in copy.iterdir()} == before


def test_nothing_is_written_into_the_base_that_the_adapter_names(tiny, tmp_path, capsys):
    base = shutil.copytree(tiny, tmp_path / "base")
    adapter_on(base, tmp_path / "a")
    assert merged("--adapter", tmp_path / "a", "--output", base / "out") == 2
    assert "lies inside the model's folder" in capsys.readouterr().err
    assert not (base / "out").exists()


def test_an_adapter_of_another_base_is_refused(tiny, tmp_path, capsys):
    rows = write_rows(tmp_path / "q.jsonl", questions())
    argv = ["tune", "--model", tiny, "--task", rows, "--max-steps", "1", "--output", tmp_path / "a"]
    assert cli.main(list(map(str, argv))) == 0
    other = write_model(tmp_path / "other", seed=5)
    to = ["--adapter", tmp_path / "a", "--output", tmp_path / "out", "--model"]
    of = ["--model", other, "--adapter", tmp_path / "a", "--text", tmp_path / "a.txt"]
    write_text(tmp_path / "a.txt")
    on = ["record", "--kind", "laplace", "--importance", tmp_path / "nu", *to[2:], other, *of[4:]]
    gather = ["record", "--sequences", "4", "--block-size", "16", "--model", tiny, "--output"]
    assert cli.main([*map(str, [*gather, tmp_path / "nu"])]) == 0
    for argv in (["merge", *to, other], ["rewind", *to, other, *of[4:]], ["eval", *of], on):
        assert cli.main([*map(str, argv)]) == 2
        assert "other weights" in capsys.readouterr().err
    assert merged(*to, write_model(tmp_path / "gptj", "gptj")) == 2
    assert "is gptj here and llama in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert merged(*to, tiny) == 0


def test_an_adapter_that_others_trained_says_nothing_of_its_base(tiny, tmp_path):
    adapter_on(tiny, tmp_path / "a")
    other, text = write_model(tmp_path / "other", seed=5), write_text(tmp_path / "a.txt")
    of = ["--model", other, "--adapter", tmp_path / "a"]
    for name, argv in (
        ("eval", ["--text", text, "--block-size", "16"]),
        ("rewind", ["--text", text, "--block-size", "16", "--output", tmp_path / "r"]),
        ("merge", ["--output", tmp_path / "m"]),
    ):
        assert cli.main([*map(str, [name, *of, *argv])]) == 0


def test_what_cannot_be_merged_is_refused(tiny, tmp_path, monkeypatch, capsys):
    adapter_on(tiny, tmp_path / "a")
    to = ["--adapter", tmp_path / "a", "--output", tmp_path / "out"]
    with monkeypatch.context() as patched:
        real = merging.load_as_published

        def quantized(*args):
            model, words = real(*args)
            model.config.quantization_config = {"quant_method": "bitsandbytes"}
            return model, words

        patched.setattr(merging, "load_as_published", quantized)
        assert merged(*to) == 2
        assert "--model" in capsys.readouterr().err
    config = tmp_path / "a" / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    assert merged(*to) == 2
    assert "names no base model" in capsys.readouterr().err
    assert merged("--adapter", tmp_path / "nowhere", "--output", tmp_path / "out") == 2


@pytest.mark.filterwarnings("ignore")  # PEFT has its own to say of this
def test_a_matrix_that_is_used_twice_is_refused(tiny, tmp_path):
    base = tmp_path / "base"
    model, words = load(str(tiny))
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(base)
    words.save_pretrained(base)
    adapter_on(base, tmp_path / "a", ["lm_head"])
    model = load_adapter(load(str(base))[0], tmp_path / "a")
    with pytest.raises(hlora.UnsupportedModelError, match="lm_head"):
        merging.merge_adapter(model)
