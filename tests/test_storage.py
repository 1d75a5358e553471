"""Dense importance in two bytes and in one."""

import pytest
import torch

import hlora
from hlora.cli import main as cli
from hlora.core import ops, store
from hlora.core.importance.dense import Dense
from hlora.core.logcodes import OCTAVES, LogCodes
from hlora.core.lowrank import LowRank
from hlora.hf.peft import base_of, find_pairs
from tests.conftest import lora_model, make_trainer, perturb
from tests.test_ops import SHAPES, error, rand
from tests.test_penalty import distance


def heavy_tailed(*shape):
    return torch.randn(*shape).abs().pow(4) * torch.exp(3 * torch.randn(*shape[:-1], 1))


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 64, 300), (9, 1)])
def test_codes_keep_every_element_within_a_share_of_its_value(shape):
    values = heavy_tailed(*shape)
    values[..., 0] = 0
    coded = LogCodes.encode(values)
    assert coded.codes.dtype == torch.uint8
    decoded = coded.to(torch.float32)
    assert torch.equal(decoded == 0, values == 0)
    kept = values >= values.amax(-1, keepdim=True) * 2.0**-OCTAVES
    kept &= values > 0
    share = (decoded - values).abs()[kept] / values[kept]
    assert float(share.max() if kept.any() else 0) < 2 ** (OCTAVES / 254 / 2) - 1 + 1e-4


def test_empty_and_constant_rows_survive():
    values = torch.tensor([[0.0, 0.0], [2.5, 2.5], [1e-30, 1.0]])
    decoded = LogCodes.encode(values).to(torch.float32)
    torch.testing.assert_close(decoded[:2], values[:2])
    assert decoded[2, 1] == pytest.approx(1.0, rel=1e-4)
    assert 0 < decoded[2, 0] <= 2.0 ** -(OCTAVES - 1)


@pytest.mark.parametrize(("L", "m", "n", "r"), SHAPES)
@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_the_penalty_reads_them_as_their_decoded_values(L, m, n, r, storage):
    Omega = heavy_tailed(L, m, n)
    small = Omega.bfloat16() if storage == "bf16" else LogCodes.encode(Omega)
    change = LowRank(rand(L, m, r), rand(L, r, n))
    sides = rand(L, m, 3), rand(L, 3, n)
    ours = ops.weigh(small, change, *sides)
    decoded = ops.weigh(small.to(torch.float64), change, *sides)
    for a, b in zip(ours, decoded, strict=True):
        assert error(a, b) < 1e-6  # codes are decoded in float32


def test_the_gradient_keeps_its_direction():
    """Cosine of the penalty's gradient against float32's, on a heavy-tailed Ω."""
    Omega, change = heavy_tailed(2, 60, 80), LowRank(rand(2, 60, 4).float(), rand(2, 4, 80).float())
    _, dP, _ = ops.weigh(Omega, change, change.P, change.Q)
    for small in (Omega.bfloat16(), LogCodes.encode(Omega)):
        _, other, _ = ops.weigh(small, change, change.P, change.Q)
        cosine = torch.nn.functional.cosine_similarity(dP.flatten(), other.flatten(), dim=0)
        assert float(cosine) > 0.9999


@pytest.mark.parametrize(("storage", "bytes_each"), [("bf16", 2), ("int8", 1)])
def test_recording_and_tuning_with_them(tmp_path, storage, bytes_each):
    for name, how in (("full", "fp32"), ("small", storage)):
        make_trainer(
            lora_model(),
            tmp_path / f"run-{name}",
            [hlora.Record(tmp_path / name, kind="dense", storage=how)],
        ).train()
    full, small = (store.load(tmp_path / n).importance for n in ("full", "small"))
    decoded = small.decoded()
    for name, values in full.tensors().items():
        torch.testing.assert_close(decoded[name], values, rtol=0.05, atol=1e-6)
        assert small.tensors()[name].element_size() == bytes_each
    assert small.norms() == pytest.approx(full.norms(), rel=0.02)
    model = lora_model()
    trainer = make_trainer(model, tmp_path / "mu", [hlora.Penalty(tmp_path / "small", phi=5.0)])
    trainer.train()
    assert all(e["R"] > 0 for e in trainer.state.log_history if "R" in e)


@pytest.mark.parametrize("to", ["fp32", "bf16", "int8", "factored"])
def test_convert(nu, tmp_path, to, capsys):
    assert cli.main(["convert", str(nu), "--to", to, "--output", str(tmp_path / "c")]) == 0
    assert "became" in capsys.readouterr().out
    before, after = store.load(nu), store.load(tmp_path / "c")
    pairs = find_pairs(model := lora_model())
    after.check(base_of(model, pairs), pairs)
    assert after.importance.totals() == pytest.approx(before.importance.totals(), rel=0.02)
    assert after.info["summary"] == before.info["summary"]
    if to == "factored":
        for name, Omega in before.importance.tensors().items():
            torch.testing.assert_close(after.importance.tensors()[f"{name}.rows"], Omega.sum(1))
        assert cli.main(
            ["convert", str(tmp_path / "c"), "--to", "bf16", "--output", str(tmp_path / "d")]
        ) == 2  # fmt: skip
        assert "--kind dense" in capsys.readouterr().err
    assert cli.main(["convert", str(nu), "--to", to, "--output", str(nu)]) == 2
    assert cli.main(["convert", str(nu), "--to", to, "--output", str(tmp_path / "c")]) == 2


def test_ones_is_plain_l2_to_the_anchor(nu, tmp_path):
    assert cli.main(["convert", str(nu), "--to", "ones", "--output", str(tmp_path / "l2")]) == 0
    model = lora_model()
    held = hlora.Penalty(tmp_path / "l2", layer_weights="uniform")
    held.start(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1))
    perturb(model)
    expected = distance(model, store.load(nu).factors) ** 2
    assert float(held.value()) == pytest.approx(expected, rel=1e-4)


def test_codes_without_their_scale_are_refused():
    with pytest.raises(ValueError, match="no scale"):
        Dense.from_tensors({"a": torch.zeros(2, 2, dtype=torch.uint8)})
    with pytest.raises(ValueError, match="no codes"):
        Dense.from_tensors({"a.scale": torch.zeros(2, 2)})
