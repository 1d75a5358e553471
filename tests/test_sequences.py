"""Importance gathered at the base from whole sequences, against autograd and dense matrices."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import OPTConfig, OPTForCausalLM

import hlora
from hlora.core.importance import bounded, projected
from hlora.core.importance.blend import SMOOTH, Blend
from hlora.core.importance.kronecker import Kronecker
from hlora.core.importance.projected import project
from hlora.core.importance.sketch import Sketch, pulling
from hlora.core.lowrank import LowRank
from hlora.core.pairs import group
from hlora.errors import DivergedError, UnsupportedModelError
from hlora.hf.peft import find_pairs
from tests.conftest import lora_model, perturb
from tests.reference import sequence_gradients

KINDS = [Kronecker, Sketch, Blend]


def gathered(kind, rank=3, count=6, **lora):
    """An importance of the tiny LLaMA in float64, arranged, with a change to look at."""
    model = lora_model(dtype=torch.float64, **lora)
    pairs = find_pairs(model)
    rows = torch.randint(3, 60, (count, 9))
    importance, _ = kind.gather(model, pairs, rows, rank=rank, batch_size=4)
    groups = group(pairs)
    importance.arrange(groups)
    perturb(model)
    factors = [g.factors() for g in groups]
    changes = [LowRank(g.s * B, A) for g, (B, A) in zip(groups, factors, strict=True)]
    return importance, groups, changes, *zip(*factors, strict=True)


def dense_value(importance, groups, matrices, meter=False):
    """R from (L, m, n) matrices, by what is stored; or the forgetting."""
    if isinstance(importance, Blend) and meter:
        return dense_value(importance.sketch, groups, matrices, meter)
    if isinstance(importance, Blend):
        return dense_value(importance.sketch, groups, matrices) + SMOOTH * dense_value(
            importance.smooth, groups, matrices
        )
    T, total, smooth = 8, 0, 0
    for g, D in zip(groups, matrices, strict=True):
        V = importance.stack(g, "V")
        if isinstance(importance, Sketch):
            cores = importance.stack(g, "cores")
            part = slice(pulling(cores.shape[1]), None) if meter else slice(pulling(cores.shape[1]))
            g_n = cores[:, part] @ V[:, None, :, : cores.shape[3]].mT
            total = total + (g_n * D[:, None]).sum((0, 2, 3))
            continue
        U = importance.stack(g, "U")
        G = U @ importance.stack(g, "left") @ U.mT + torch.diag_embed(importance.stack(g, "rows"))
        C = V @ importance.stack(g, "right") @ V.mT
        C = C + torch.diag_embed(importance.stack(g, "columns"))
        trace = importance.stack(g, "left").diagonal(dim1=1, dim2=2).sum(1)
        trace = trace + importance.stack(g, "rows").sum(1)
        smooth = smooth + (torch.einsum("lab,lbc,lcd,lad->l", G, D, C, D) / trace).sum() / (2 * T)
    return (total**2).mean() / (2 * T) if isinstance(importance, Sketch) else smooth


@pytest.mark.parametrize("architecture", ["llama", "gptj", "gpt2"])
def test_projected_gradients_are_those_of_autograd_sequence_by_sequence(architecture):
    model = lora_model(architecture, dtype=torch.float64)
    perturb(model)
    model.eval()
    rows = torch.randint(3, 60, (5, 9))
    pairs = find_pairs(model)
    found = project(model, pairs, rows, rank=3, labels="corpus", batch_size=2)
    gradients = sequence_gradients(model, pairs, rows)
    for name, of in found.items():
        g = gradients[name]
        assert g.abs().max() > 0
        rowwise, columnwise = (g @ g.mT).mean(0), (g.mT @ g).mean(0)
        torch.testing.assert_close(of.U.mT @ of.U, torch.eye(3, dtype=g.dtype))
        for kept, exact in (
            (of.cores, g @ of.V),
            (of.left, of.U.mT @ rowwise @ of.U),
            (of.right, of.V.mT @ columnwise @ of.V),
            (of.rows, rowwise.diagonal()),
            (of.columns, columnwise.diagonal()),
        ):
            # Llama's norms are computed in float32, whatever the model's dtype.
            torch.testing.assert_close(kept, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


def test_what_one_sequence_may_add_is_bounded(monkeypatch):
    """At a limit that a sequence is beyond at every matrix; the reference is dense."""
    monkeypatch.setattr(bounded, "LIMIT", 1.0)
    model = lora_model(dtype=torch.float64)
    perturb(model)
    model.eval()
    pairs = find_pairs(model)
    rows = torch.randint(3, 60, (18, 9))
    found = project(model, pairs, rows, rank=3, labels="corpus", batch_size=5)
    for name, g in sequence_gradients(model, pairs, rows).items():
        of, sizes = found[name], g.square().sum((1, 2))
        third = sizes.sort(descending=True).values[2]  # two of 18 may be cut down
        shares = (third / sizes).clamp(max=1)
        assert (shares < 1).sum() == 2
        torch.testing.assert_close(of.shares, shares, rtol=1e-5, atol=0)
        g = g * shares.sqrt()[:, None, None]
        for kept, exact in (
            (of.cores, g @ of.V),
            (of.left, of.U.mT @ (g @ g.mT).mean(0) @ of.U),
            (of.right, of.V.mT @ (g.mT @ g).mean(0) @ of.V),
            (of.rows, g.square().sum(2).mean(0)),
            (of.columns, g.square().sum(1).mean(0)),
        ):
            torch.testing.assert_close(kept, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", [1, 9])  # one of those that find the bases, and none of them
def test_a_runaway_sequence_does_not_outweigh_the_others(place, kind, monkeypatch):
    """A gradient at one matrix a thousand times as long, as at the switch of an attention sink."""
    model = lora_model()
    pairs = find_pairs(model)
    rows = torch.randint(3, 60, (16, 9))
    usual, plain = kind.gather(model, pairs, rows, batch_size=16)
    assert (plain["bounded"], plain["bounded_at"]) == (0, 0)
    plain["layers"] = len(pairs)
    assert "scaled down" not in " ".join(kind.describe(plain))
    runaway = pairs[1].name

    def with_runaway(model, pairs, rows, take, **more):
        def longer(name, delta, x):
            long = torch.ones(len(delta), 1, 1)
            if name == runaway and place < len(delta):
                long[place] = 1e3
            take(name, delta * long, x)

        passes(model, pairs, rows, longer, **more)

    passes = projected.backward_passes
    monkeypatch.setattr(projected, "backward_passes", with_runaway)
    found, summary = kind.gather(model, pairs, rows, batch_size=16)
    assert (summary["bounded"], summary["bounded_at"]) == (1, 1)
    said = " ".join(kind.describe(summary | {"layers": len(pairs)}))
    assert "1 of them, with a gradient far larger than the others', is scaled down at 1 of" in said
    for name, total in found.totals().items():
        if name == runaway:
            assert usual.totals()[name] < total < 3 * usual.totals()[name]
        else:
            assert total == pytest.approx(usual.totals()[name], rel=1e-4)


@pytest.mark.parametrize("flat", [True, False])
def test_a_layer_may_see_all_tokens_in_one_row(flat):
    """As OPT's and Qwen2-MoE's do; one that sees some of them is refused."""
    config = OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=16,
    )  # fmt: skip
    lora = LoraConfig(r=2, target_modules=["fc1", "fc2", "q_proj"])
    model = get_peft_model(OPTForCausalLM(config), lora).double()
    pairs = find_pairs(model)
    rows = torch.randint(3, 60, (4, 9))
    if not flat:
        layer = next(p for p in pairs if "fc1" in p.name).layer
        layer.register_forward_pre_hook(lambda module, inputs: (inputs[0][:7],))
        layer.register_forward_hook(lambda *of: of[2].mean(0).expand(36, -1))
        with pytest.raises(UnsupportedModelError, match="without the sequences"):
            project(model, pairs, rows)
        return
    model.eval()
    found = project(model, pairs, rows, rank=3, labels="corpus")
    for name, g in sequence_gradients(model, pairs, rows).items():
        exact = g @ found[name].V
        torch.testing.assert_close(
            found[name].cores, exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max())
        )


def test_the_bases_hold_the_largest_directions(monkeypatch):
    """All sequences find them here; the best basis of the rank keeps hardly more."""
    monkeypatch.setattr(projected, "PILOT", 1)
    model = lora_model(dtype=torch.float64)
    pairs = find_pairs(model)
    rows = torch.randint(3, 60, (32, 9))
    part = project(model, pairs, rows, rank=4, labels="corpus")
    whole = project(model, pairs, rows, rank=64, labels="corpus")
    for name, of in whole.items():
        best = torch.linalg.eigvalsh(of.left)[-4:].sum()
        assert 0.8 * best < part[name].left.trace() <= best * (1 + 1e-9)


def test_the_factors_have_the_diagonals_of_the_sequences():
    """Where a few directions alone have more, since U is not quite of eigenvectors, it stays so."""
    model = lora_model(dtype=torch.float64)
    pairs = find_pairs(model)
    found = project(model, pairs, torch.randint(3, 60, (6, 9)), rank=3)
    importance = Kronecker.of(found, 8)
    for g in group(pairs):
        for basis, inner, rest in (("U", "left", "rows"), ("V", "right", "columns")):
            W, d = importance.stack(g, basis), importance.stack(g, rest)
            few = (W @ importance.stack(g, inner) @ W.mT).diagonal(dim1=1, dim2=2)
            exact = torch.stack([getattr(found[n], rest) for n in g.names])
            torch.testing.assert_close(few + d, few.maximum(exact), rtol=1e-5, atol=1e-9)
            assert (d > 0).double().mean() > 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_values_and_gradients_are_those_of_dense_matrices(kind, targets):
    importance, groups, changes, Bs, As = gathered(kind, target_modules=targets)
    matrices = [(D.P @ D.Q).requires_grad_() for D in changes]
    expected = dense_value(importance, groups, matrices)
    G = torch.autograd.grad(expected, matrices)
    pulled, forgetting = importance.pulls(groups, changes, Bs, As)
    torch.testing.assert_close(sum(values.sum() for values, _, _ in pulled), expected.detach())
    assert expected > 0
    torch.testing.assert_close(forgetting, importance.forgetting(groups, changes))
    meter = dense_value(importance, groups, matrices, meter=True).detach()
    torch.testing.assert_close(forgetting, meter)
    for (_, GA, BG), g, B, A in zip(pulled, G, Bs, As, strict=True):
        torch.testing.assert_close(2 * GA, g @ A.mT)
        torch.testing.assert_close(2 * BG, B.mT @ g)


@pytest.mark.parametrize("kind", [Sketch, Blend])
def test_the_meter_s_sequences_do_not_pull(kind):
    """Without those that pull it says the same, and without its own the pull is the same."""
    importance, groups, changes, Bs, As = gathered(kind)
    pulled, forgetting = importance.pulls(groups, changes, Bs, As)
    tensors = importance.tensors()
    for part, same in ((slice(0, 3), "forgetting"), (slice(3, 6), "pull")):
        changed = {k: t.clone() for k, t in tensors.items()}
        for name, t in changed.items():
            if name.endswith(".cores"):
                t[part] = 0
        other = kind.from_tensors(changed)
        other.arrange(groups)
        again, lost = other.pulls(groups, changes, Bs, As)
        equal = [torch.equal(a, b) for a, b in zip(pulled[0], again[0], strict=True)]
        assert torch.equal(lost, forgetting) == (same == "forgetting")
        assert all(equal) if same == "pull" else not any(equal)


@pytest.mark.parametrize("kind", KINDS)
def test_one_group_alone_is_pulled_as_without_the_others(kind):
    """`pull` looks at its own group; the sketch then lacks the others' share."""
    importance, groups, changes, Bs, As = gathered(kind)
    values, _, _ = importance.pull(groups[0], changes[0], Bs[0], As[0])
    dense = [D.P @ D.Q * (i == 0) for i, D in enumerate(changes)]
    torch.testing.assert_close(values.sum(), dense_value(importance, groups, dense))


@pytest.mark.parametrize("kind", [Kronecker, Sketch])
def test_norms_and_totals_are_those_of_the_dense_curvature(kind):
    importance, groups, *_ = gathered(kind)
    for g in groups:
        for i, name in enumerate(g.names):
            V = importance.stack(g, "V")[i]
            if kind is Sketch:
                cores = importance.stack(g, "cores")[i]
                flat = (cores @ V[:, : cores.shape[2]].mT).flatten(1)
                dense = flat.mT @ flat / len(flat)
                approximately = {"rtol": 0.05, "atol": 0}  # int8 columns are not quite orthonormal
            else:
                U = importance.stack(g, "U")[i]
                G = U @ importance.stack(g, "left")[i] @ U.mT
                G = G + importance.stack(g, "rows")[i].diag()
                C = V @ importance.stack(g, "right")[i] @ V.mT
                C = C + importance.stack(g, "columns")[i].diag()
                dense = torch.kron(G, C) / importance.totals()[name]
                approximately = {"rtol": 0.05, "atol": 0}
            assert importance.norms()[name] == pytest.approx(float(dense.norm()), rel=0.05)
            torch.testing.assert_close(
                torch.tensor(importance.totals()[name]).double(), dense.trace(), **approximately
            )


def test_the_meter_predicts_the_divergence_of_the_whole_model(monkeypatch):
    """Small steps of a tiny model, where the second order is all there is."""
    monkeypatch.setattr(projected, "COLUMNS", 24)
    model = lora_model(dtype=torch.float64, target_modules="all-linear")
    pairs = find_pairs(model)
    rows = torch.randint(3, 60, (600, 9))
    importance, _ = Sketch.gather(model, pairs, rows, rank=24, batch_size=100)
    groups = group(pairs)
    importance.arrange(groups)
    fresh = torch.randint(3, 60, (600, 9))
    model.eval()
    with torch.no_grad():
        before = model(input_ids=fresh).logits[:, :-1].log_softmax(-1)
        for p in pairs:
            p.B.copy_(0.03 * torch.randn_like(p.B))
        after = model(input_ids=fresh).logits[:, :-1].log_softmax(-1)
    measured = float((before.exp() * (before - after)).sum(-1).mean())
    changes = [LowRank(g.s * g.factors()[0], g.factors()[1]) for g in groups]
    predicted = float(importance.forgetting(groups, changes))
    # 600 sequences of chi-squared terms: a relative standard error of 6 %.
    assert predicted == pytest.approx(measured, rel=0.25)


@pytest.mark.parametrize("kind", KINDS)
def test_the_size_is_that_of_the_tensors(kind):
    model = lora_model()
    pairs = find_pairs(model)
    importance, _ = kind.gather(model, pairs, torch.randint(3, 60, (5, 9)))
    size = sum(t.numel() * t.element_size() for t in importance.tensors().values())
    assert size == kind.bytes([p.shape for p in pairs], sequences=5) + 8  # T itself


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_back_is_what_was_gathered(kind):
    importance, groups, changes, Bs, As = gathered(kind)
    again = kind.from_tensors(importance.tensors())
    again.arrange(groups)
    for a, b in zip(
        *(i.pulls(groups, changes, Bs, As)[0] for i in (importance, again)), strict=True
    ):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_missing_and_infinite_parts_are_refused(kind):
    tensors = gathered(kind)[0].tensors()
    part = kind.parts[-1]
    name = next(k for k in tensors if k.endswith("." + part))
    with pytest.raises(ValueError, match=part):
        kind.from_tensors({k: t for k, t in tensors.items() if k != name})
    broken = {**tensors, name: torch.full_like(tensors[name], torch.inf)}
    with pytest.raises(ValueError, match=part):
        kind.from_tensors(broken).check()


def test_one_sequence_is_too_few():
    model = lora_model()
    with pytest.raises(hlora.InputError, match="two sequences"):
        Blend.gather(model, find_pairs(model), torch.randint(3, 60, (1, 9)))


@pytest.mark.parametrize(
    ("dtype", "said"),
    [
        (torch.float16, "too large for fp16: try --dtype fp32"),
        (torch.bfloat16, "its model.layers.0.self_attn.q_proj.weight is not, so take another copy"),
        (torch.float32, "its model.layers.0.self_attn.q_proj.weight is not, so take another copy"),
    ],
)
def test_predictions_that_are_not_finite_are_told_from_what_is(dtype, said):
    model = lora_model(dtype=dtype)
    with torch.no_grad():
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        layer.base_layer.weight[0, 0] = float("inf")
    with pytest.raises(DivergedError, match=said):
        Blend.gather(model, find_pairs(model), torch.randint(3, 60, (4, 9)))


def test_a_layer_that_runs_twice_is_refused():
    model = lora_model()
    pairs = find_pairs(model)
    layers = model.base_model.model.model.layers
    layers[1] = layers[0]
    with pytest.raises(UnsupportedModelError, match="more than once"):
        project(model, [p for p in pairs if ".layers.0." in p.name], torch.randint(3, 60, (4, 9)))
