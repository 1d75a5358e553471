"""Rows × columns: exact sums, the k × k penalty, and no (m, n) memory."""

import copy

import pytest
import torch

import hlora
from hlora.core import ops, store
from hlora.core.importance.factored import Factored
from hlora.core.lowrank import LowRank
from hlora.core.ops import reference as tiled
from hlora.core.pairs import group
from hlora.hf.peft import find_pairs
from tests.conftest import lora_model, make_trainer, token_rows
from tests.test_ops import SHAPES, error, eye, rand
from tests.test_penalty import distance
from tests.test_record import Spy, expected_omega


@pytest.mark.parametrize(("L", "m", "n", "r"), SHAPES)
def test_the_sums_of_a_product_are_exact(L, m, n, r):
    one, two = LowRank(rand(L, m, r), rand(L, r, n)), LowRank(rand(L, m, 2 * r), rand(L, 2 * r, n))
    dense = (one.P @ one.Q) * (two.P @ two.Q)
    rows, columns = one.marginals(two)
    assert error(rows, dense.sum(2)) < 1e-12
    assert error(columns, dense.sum(1)) < 1e-12


@pytest.mark.parametrize(("L", "m", "n", "r"), SHAPES)
def test_the_penalty_is_autograd_s_on_the_dense_rank_one_matrix(L, m, n, r):
    B, A = rand(L, m, r).requires_grad_(), rand(L, r, n).requires_grad_()
    D, u, v = rand(L, m, n), rand(L, m).abs(), rand(L, n).abs()
    change = LowRank(torch.cat([B.detach(), D], dim=2), torch.cat([A.detach(), eye(L, n)], dim=1))
    expected = (u[:, :, None] * v[:, None, :] * (B @ A + D) ** 2).sum(dim=(1, 2))
    eB, eA = torch.autograd.grad(expected.sum(), (B, A))
    values, dB, dA = change.weigh_rank_one(u, v, B.detach(), A.detach())
    assert error(values, expected.detach()) < 1e-12
    assert error(2 * dB, eB) < 1e-12
    assert error(2 * dA, eA) < 1e-12


@pytest.mark.parametrize("tile", [1 << 20, 16])
@pytest.mark.parametrize(("L", "m", "n", "r"), SHAPES)
def test_consolidation_has_the_sums_of_the_dense_one(L, m, n, r, tile, monkeypatch):
    monkeypatch.setattr(tiled, "TILE", tile)
    rows = rand(L, m).abs()
    columns = rand(L, n).abs()
    columns *= (rows.sum(1) / columns.sum(1))[:, None]
    delta = LowRank(rand(L, m, r), rand(L, r, n))
    omega = rows[:, :, None] * columns[:, None, :] / rows.sum(1)[:, None, None]
    expected = omega / ((delta.P @ delta.Q) ** 2 + 1e-3)
    xi = torch.tensor(1e-3, dtype=torch.float64)
    new_rows, new_columns = ops.consolidate_rank_one(rows, columns, delta, xi)
    assert error(new_rows, expected.sum(2)) < 1e-12
    assert error(new_columns, expected.sum(1)) < 1e-12


def record(tmp_path, name="nu", model=None, training=None, **settings):
    model = model or lora_model(dtype=torch.float64)
    callback = hlora.Record(tmp_path / name, kind="factored", **settings)
    training = {"max_grad_norm": 0, **(training or {})}
    trainer = make_trainer(model, tmp_path / f"run-{name}", [callback], **training)
    spy = Spy(model)
    trainer.create_optimizer()
    spy.watch(trainer.optimizer)
    trainer.train()
    return callback, spy, model


def rank_one(rows, columns):
    return rows[:, None] * columns[None, :] / rows.sum()


@pytest.mark.parametrize("architecture", ["llama", "gptj"])
@pytest.mark.parametrize(
    "training",
    [{}, {"gradient_accumulation_steps": 2}, {"max_grad_norm": 0.01}],
    ids=["adamw", "accumulated", "clipped"],
)
def test_it_is_the_rank_one_matrix_with_the_dense_sums(tmp_path, architecture, training):
    model = lora_model(architecture, dtype=torch.float64)
    callback, spy, model = record(tmp_path, model=model, training=training)
    assert callback.summary["clipped_share"] == (1.0 if "max_grad_norm" in training else 0.0)
    stored = store.load(tmp_path / "nu").importance
    norms, totals = stored.norms(), stored.totals()
    for i, pair in enumerate(find_pairs(model)):
        omega = expected_omega(spy, i, pair.s)
        rows, columns = omega.sum(1).clamp(min=0), omega.sum(0).clamp(min=0)
        delta = (pair.s * pair.B @ pair.A).detach()
        total = (rows.sum() * columns.sum()).sqrt()
        filled = rows[:, None] * columns / total / (delta**2 + 1e-3)
        Omega = rank_one(filled.sum(1), filled.sum(0))
        tensors = stored.tensors()
        ours = rank_one(tensors[f"{pair.name}.rows"], tensors[f"{pair.name}.columns"])
        torch.testing.assert_close(ours.double(), Omega, rtol=1e-5, atol=1e-9)
        assert norms[pair.name] == pytest.approx(float(Omega.norm()), rel=1e-5)
        assert totals[pair.name] == pytest.approx(float(filled.sum()), rel=1e-5)


def test_it_adds_up_over_two_tasks(tmp_path):
    """The second task's own sums are what is added: recorded alone, from the same start."""
    _, _, model = record(tmp_path, "one")
    again = copy.deepcopy(model)
    record(tmp_path, "two", model, previous=tmp_path / "one")
    record(tmp_path, "alone", again)
    one, two, alone = (
        store.load(tmp_path / n).importance.tensors() for n in ("one", "two", "alone")
    )
    for name in one:
        torch.testing.assert_close(two[name], one[name] + alone[name], rtol=1e-5, atol=1e-9)
        assert alone[name].max() > 0


def trace_of(omega):
    """A trace whose ω is that of one made-up step, and its group."""
    model = lora_model(dtype=torch.float64)
    [g] = groups = [g for g in group(find_pairs(model)) if g.m == 8]
    trace = Factored.trace(groups, None)
    zero = LowRank(torch.zeros(2, 8, 1).double(), torch.zeros(2, 1, 16).double())
    trace.omega[g.names] = (omega.sum(2), omega.sum(1))
    return trace, g, zero


def test_negative_sums_count_as_zero_and_are_counted():
    omega = rand(2, 8, 16).abs() + 0.5
    omega[:, :2] *= -1  # rows that sum to less than zero
    omega[:, :, 3] = -1.0  # and a column
    assert (omega.sum(1) < 0).any()
    trace, g, delta = trace_of(omega)
    negative = trace.consolidate(g, delta, torch.tensor(0.5).double(), last=True)
    assert int(negative) == int((omega.sum(2) < 0).sum()) * 16 > 0
    rows, columns = omega.sum(2).clamp(min=0), omega.sum(1).clamp(min=0)
    total = (rows.sum(1) * columns.sum(1)).sqrt()
    Omega = rows[:, :, None] * columns[:, None] / total[:, None, None] / 0.5
    found = trace.Omega[g.names]
    torch.testing.assert_close(found[0], Omega.sum(2))
    torch.testing.assert_close(found[1], Omega.sum(1))
    assert all((t >= 0).all() for t in found)


@pytest.mark.parametrize(("optim", "rate"), [("sgd", 0.02), ("adamw_torch", 1e-4)])
def test_the_projected_path_integral_is_the_loss_drop(tmp_path, optim, rate):
    """Eq. 3, as for dense importance: the total of the sums is that of the elements."""
    rows = token_rows(8)
    settings = {
        "rows": rows, "optim": optim, "learning_rate": rate, "max_steps": 60,
        "per_device_train_batch_size": 8, "max_grad_norm": 0, "lr_scheduler_type": "constant",
    }  # fmt: skip
    found = {}
    for kind in ("dense", "factored"):
        callback = hlora.Record(tmp_path / kind, kind=kind, estimator="projected")
        model = lora_model(dtype=torch.float64)
        make_trainer(model, tmp_path / "run", [callback], **settings).train()
        found[kind] = callback.summary["path_integral"]
    assert found["factored"] == pytest.approx(found["dense"], rel=1e-9)
    assert found["factored"] > 1e-4


def test_a_resumed_recording_ends_bit_for_bit(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3}

    def run(name, resume=None):
        callback = hlora.Record(tmp_path / name, kind="factored")
        trainer = make_trainer(lora_model(), tmp_path / "run", [callback], **settings)
        trainer.train(resume_from_checkpoint=resume)
        return store.load(tmp_path / name).importance.tensors()

    whole = run("a")
    resumed = run("b", str(tmp_path / "run" / "checkpoint-3"))
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_tuning_is_held_by_it(tmp_path):
    record(tmp_path, model=lora_model())
    factors = store.load(tmp_path / "nu").factors
    distances = []
    for phi in (0.0, 1000.0):
        model = lora_model()
        make_trainer(
            model, tmp_path / f"mu-{phi}", [hlora.Penalty(tmp_path / "nu", phi=phi)],
            rows=token_rows(seed=2), max_steps=20,
        ).train()  # fmt: skip
        distances.append(distance(model, factors))
    assert distances[1] < 0.5 * distances[0]


def test_no_matrix_of_the_model_s_size_is_kept(tmp_path):
    record(tmp_path, model=lora_model())
    size = (tmp_path / "nu" / store.TENSORS).stat().st_size
    assert size < (tmp_path / "nu" / "adapter_model.safetensors").stat().st_size
    groups = group(find_pairs(lora_model()))
    trace = Factored.trace(groups, None)
    for g in groups:
        assert trace.omega[g.names][0].shape == (len(g.pairs), g.m)
        assert trace.omega[g.names][1].shape == (len(g.pairs), g.n)


def test_what_it_cannot_do_is_refused(tmp_path, nu):
    with pytest.raises(hlora.InputError, match="clamp"):
        hlora.Record(tmp_path / "x", kind="factored", preset="official")
    with pytest.raises(hlora.InputError, match=r"dense.*factored"):
        hlora.Record(tmp_path / "x", kind="factored", previous=nu).check_folders()
    with pytest.raises(hlora.InputError, match="thin"):
        hlora.Record(tmp_path / "x", kind="thin")
    with pytest.raises(ValueError, match="missing"):
        Factored.from_tensors({"a.rows": torch.ones(2)})


def test_it_is_the_default_and_dense_where_the_paper_or_its_storage_is_asked_for(tmp_path, nu):
    new = tmp_path / "x"
    assert hlora.Record(new).kind == "factored"
    assert hlora.Record(new, preset="paper").kind == "dense"
    assert hlora.Record(new, preset="official").kind == "dense"
    assert hlora.Record(new, storage="int8").kind == "dense"
    on_top = hlora.Record(new, previous=nu)
    on_top.check_folders()
    assert on_top.kind == "dense"
    assert hlora.Record(new, preset="paper", kind="factored").kind == "factored"
