"""A kind of importance is one file and one line: a toy goes through every command."""

import json

import pytest
import torch

import hlora
from hlora.cli import main as cli
from hlora.core import store
from hlora.core.kinds import KINDS, kind_named
from tests.tiny import questions, write_rows, write_text


@pytest.fixture
def _toy(monkeypatch):
    monkeypatch.setitem(KINDS, "toy", "tests.toy_kind:Toy")


@pytest.mark.usefixtures("_toy")
def test_a_toy_kind_with_negative_entries_goes_through_every_command(tiny, tmp_path, capsys):
    write_text(tmp_path / "a.txt")
    write_rows(tmp_path / "task.jsonl", questions())
    common = ["--model", str(tiny), "--max-steps", "3", "--batch-size", "4", "--dtype", "fp32"]
    record = ["record", *common, "--text", str(tmp_path / "a.txt"), "--block-size", "32"]
    record += ["--kind", "toy", "--output", str(tmp_path / "nu")]
    assert cli.main([*record, "--dry-run"]) == 0
    assert "importance  16 B" in capsys.readouterr().out  # four matrices, a float each
    assert cli.main(record) == 0
    assert "A toy of 4 layers" in capsys.readouterr().out
    stored = store.load(tmp_path / "nu")
    assert stored.info["kind"] == "toy"
    assert all(float(v) < 0 for v in stored.importance.tensors().values())

    assert cli.main(["inspect", str(tmp_path / "nu")]) == 0
    assert "A toy of 4 layers" in capsys.readouterr().out
    convert = ["convert", str(tmp_path / "nu"), "--output", str(tmp_path / "twice"), "--to"]
    assert cli.main([*convert, "int8"]) == 2
    assert "doubled" in capsys.readouterr().err
    assert cli.main([*convert, "doubled"]) == 0
    for name, value in store.load(tmp_path / "twice").importance.tensors().items():
        assert torch.equal(value, 2 * stored.importance.tensors()[name])

    tune = ["tune", *common, "--importance", str(tmp_path / "twice"), "--task"]
    tune += [str(tmp_path / "task.jsonl"), "--logging-steps", "1", "--output", str(tmp_path / "mu")]
    assert cli.main([*tune, "--dry-run"]) == 0
    assert cli.main(tune) == 0
    log = json.loads((tmp_path / "mu" / "tune.json").read_text())["log"]
    assert log[-1]["R"] <= 0  # what it was asked to do


@pytest.mark.usefixtures("_toy")
def test_a_kind_says_itself_what_is_damaged(tmp_path, tiny):
    with pytest.raises(ValueError, match="no number"):
        kind_named("toy").from_tensors({"a": torch.tensor([float("nan")])}).check()


def test_an_unknown_kind_is_named_with_the_nearest():
    with pytest.raises(hlora.InputError, match="factored"):
        kind_named("factord")


@pytest.mark.parametrize(
    "kind", ["dense", "factored", "fisher", "entries", "laplace"]
)  # others: test_sequences
def test_each_kind_sizes_itself_as_its_tensors_are(kind):
    shapes = {"a": (5, 7, 2), "b": (3, 9, 2)}
    of = kind_named(kind)
    if kind == "factored":
        tensors = {}
        for name, (m, n, _) in shapes.items():
            tensors |= {f"{name}.rows": torch.rand(m), f"{name}.columns": torch.rand(n)}
    elif of.of_factors:
        tensors = {}
        for name, (m, n, r) in shapes.items():
            tensors |= {f"{name}.B": torch.rand(m, r), f"{name}.A": torch.rand(r, n)}
    else:
        tensors = {name: torch.rand(s[:2]) for name, s in shapes.items()}
    importance = of.from_tensors(tensors)
    importance.check()
    for storage in of.storages:
        held = importance.stored_as(storage).tensors().values()
        assert sum(t.numel() * t.element_size() for t in held) == of.bytes(shapes.values(), storage)
    with pytest.raises(hlora.InputError, match=of.kind.capitalize()):
        importance.converted("parchment")
