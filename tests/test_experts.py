"""Experts of a mixture that are kept as one parameter: each is a matrix that is held of its own."""

import math

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import hlora
from hlora.cli import main as cli
from hlora.core import store
from hlora.core.adapter_file import read_tensors
from hlora.core.importance.projected import project
from hlora.core.kinds import kind_named
from hlora.core.layers import layer_grid, layer_weights
from hlora.core.pairs import group
from hlora.hf.peft import Experts, add_reference, find_pairs, merge_adapter, unheld_names
from tests import reference as ref
from tests.conftest import VOCAB, make_trainer, token_rows
from tests.tiny import tokenizer, write_rows, write_text

SIZES = {
    "vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
EACH = {
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen3Moe": {
        "num_experts": 4,
        "moe_intermediate_size": 8,
        "head_dim": 4,
        "num_experts_per_tok": 1,
    },
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "GptOss": {"num_local_experts": 4, "head_dim": 4, "num_experts_per_tok": 1},
}
E, R = 4, 2
STACKS = ["gate_up_proj", "down_proj"]
TARGETS = {"target_modules": ["q_proj"], "target_parameters": [f"mlp.experts.{s}" for s in STACKS]}
AT_BASE = ["fisher", "kronecker", "sketch", "blend"]


def base(which="Mixtral", **sizes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{which}Config")(**{**SIZES, **EACH[which], **sizes})
    config._experts_implementation = "eager"  # the others take no float64
    return getattr(transformers, f"{which}ForCausalLM")(config)


def is_fused():
    return any(p.ndim == 3 for p in base().parameters())


pytestmark = [
    pytest.mark.skipif(
        not is_fused(), reason="this transformers has a Linear module for each expert's matrix"
    ),
    pytest.mark.filterwarnings("ignore:.*_pattern keys"),  # PEFT of keys that it wrote itself
]


def mixture(which="Mixtral", dtype=None, **config):
    model = base(which)
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**{"r": R, "lora_alpha": 4, **TARGETS, **config}))
    return model.to(dtype) if dtype else model


def moved(model, size=0.1):
    torch.manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.add_(size * torch.randn_like(p))
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def apart(pair, tensors):
    """B and A of each matrix by name, from those of the parameters: indices in place of views."""
    B, A = tensors
    if not pair.experts:
        return {pair.name: (B, A)}
    r = len(A) // E
    return {n: (B[:, e::E], A[e * r : (e + 1) * r]) for e, n in enumerate(pair.experts)}


def by_name(pairs, of):
    return {n: both for p in pairs for n, both in apart(p, of(p)).items()}


def factors(pairs):
    return by_name(pairs, lambda p: (p.B.detach().clone(), p.A.detach().clone()))


def gradients(pairs):
    return by_name(pairs, lambda p: (p.B.grad.clone(), p.A.grad.clone()))


def loss_of(model, seed=0):
    ids = torch.tensor([r["input_ids"] for r in token_rows(4, seed=seed)])
    return model(input_ids=ids, labels=ids).loss


# ---------------------------------------------------------------- the layout


@pytest.mark.parametrize("which", EACH)
def test_theta_of_each_expert_is_the_one_that_the_model_runs_with(which):
    model = moved(mixture(which, torch.float64))
    pairs = find_pairs(model)
    assert unheld_names(model, pairs) == []
    assert [n for p in pairs for n in p.names][1:9] == [
        f"model.layers.0.mlp.experts.{e}.{s}" for s in reversed(STACKS) for e in range(E)
    ]
    changes = {n: 2 * B @ A for n, (B, A) in factors(pairs).items()}  # s = 4/2
    plain = base(which).double()
    weights = dict(plain.named_parameters())
    with torch.no_grad():
        for p in pairs:
            D = torch.stack([changes[n] for n in p.names])
            of = weights.get(p.name, weights.get(f"{p.name}.weight"))
            of += (D.mT if p.transposed else D).reshape(of.shape)
    torch.testing.assert_close(loss_of(model), loss_of(plain))
    assert {p.transposed for p in pairs if p.experts} == {which == "GptOss"}


def test_a_group_writes_what_it_reads():
    model = moved(mixture(dtype=torch.float64))
    pairs = find_pairs(model)
    before = factors(pairs)
    for g in group(pairs):
        B, A = g.factors()
        for l, n in enumerate(g.names):
            assert torch.equal(B[l], before[n][0])
            assert torch.equal(A[l], before[n][1])
        g.set_factors(2 * B, A + 1)
        g.add_gradients(B, A)
        g.add_gradients(B, A)
    for n, (B, A) in factors(pairs).items():
        assert torch.equal(B, 2 * before[n][0])
        assert torch.equal(A, before[n][1] + 1)
    for n, (gB, gA) in gradients(pairs).items():
        assert torch.equal(gB, 2 * before[n][0])
        assert torch.equal(gA, 2 * before[n][1])


def test_join_is_the_reverse_of_split():
    B, A = torch.randn(3, 5, 2 * E), torch.randn(3, 2 * E, 7)
    each = Experts(E).split(B, A)
    assert [tuple(t.shape) for t in each] == [(3 * E, 5, 2), (3 * E, 2, 7)]
    assert all(map(torch.equal, Experts(E).join(*each), (B, A)))


# ---------------------------------------------------------------- Eq. 9-16


@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_recording_is_that_of_the_equations(kind, tmp_path):
    """With a token for two experts of a row only, many steps leave some expert without any."""
    model = mixture("Qwen3Moe", torch.float64)
    pairs = find_pairs(model)
    lr, xi = 0.05, 1e-3
    optimizer = torch.optim.SGD(trained(model), lr=lr)
    record = hlora.Record(tmp_path / "nu", kind=kind, preset=None, xi=xi, xi_relative=False)
    record.start(model, optimizer)
    start, omega = factors(pairs), {}
    for seed in range(5):
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        then, g = factors(pairs), gradients(pairs)
        optimizer.step()
        for n, (B, A) in factors(pairs).items():
            B0, A0 = then[n]
            gradient = ref.equivalent_gradient(B0, A0, *g[n], lr)
            omega[n] = ref.path_integral_step(omega.get(n, 0.0), gradient, B0, A0, B, A, 2.0)
    found = record.collect().tensors()
    end = factors(pairs)
    for n, of in omega.items():
        delta = 2 * (end[n][0] @ end[n][1] - start[n][0] @ start[n][1])
        if kind == "dense":
            want = ref.consolidated(of, delta, xi)
            torch.testing.assert_close(found[n].double(), want, rtol=1e-4, atol=1e-9)
        else:
            rows, columns = of.sum(1).clamp(min=0), of.sum(0).clamp(min=0)
            total = (rows.sum() * columns.sum()).sqrt().clamp(min=1e-300)
            rank_one = rows[:, None] * columns / total
            want = (rank_one / (delta**2 + xi)).sum(1)
            torch.testing.assert_close(found[f"{n}.rows"].double(), want, rtol=1e-4, atol=1e-9)


def test_a_penalty_is_that_of_the_equations_with_a_softmax_over_the_experts(tmp_path):
    folder = recorded(tmp_path, kind="dense")
    stored = store.load(folder)
    model = mixture(dtype=torch.float64)
    pairs = find_pairs(model)
    penalty = hlora.Penalty(folder, preset="paper", phi=0.7)
    penalty.start(model, torch.optim.SGD(trained(model)))
    anchor = factors(pairs)
    moved(model)
    here = {n: [f.requires_grad_() for f in both] for n, both in factors(pairs).items()}
    Omega = {n: t.double() for n, t in stored.importance.tensors().items()}
    norms = {n: float(t.norm()) for n, t in Omega.items()}
    total = sum(math.exp(v) for v in norms.values())
    names = list(norms)
    R = ref.penalty(
        [Omega[n] for n in names],
        [2 * (here[n][0] @ here[n][1] - anchor[n][0] @ anchor[n][1]) for n in names],
        [math.exp(norms[n]) / total for n in names],
    )
    (0.7 * R).backward()
    torch.testing.assert_close(penalty.value(), R.detach(), rtol=1e-6, atol=0)
    penalty.steps.regularize(None)
    for n, both in gradients(pairs).items():
        for got, f in zip(both, here[n], strict=True):
            torch.testing.assert_close(got, f.grad, rtol=1e-5, atol=1e-12)


def test_of_the_authors_softmax_each_target_has_its_experts(tmp_path):
    """`apart` goes by the last part of the name, which is the parameter, as for a Linear."""
    pairs = find_pairs(mixture())
    weights = layer_weights({n: 1.0 for p in pairs for n in p.names}, apart=True)
    assert weights["model.layers.0.mlp.experts.3.down_proj"] == 1 / (2 * E)
    assert weights["model.layers.0.self_attn.q_proj"] == 1 / 2


# ---------------------------------------------------------------- gathered at the base


def row_gradients(which, rows):
    """∂ log p(row)/∂θ of each matrix by name, (N, m, n), from the base model itself."""
    plain, names = base(which).double(), find_pairs(mixture(which))
    weights = dict(plain.named_parameters())
    found = {n: [] for p in names for n in p.names}
    for row in rows:
        plain.zero_grad()
        logits = plain(input_ids=row[None]).logits[0, :-1]
        nn.functional.cross_entropy(logits, row[1:], reduction="sum").backward()
        for p in names:
            of = (weights[p.name] if p.name in weights else weights[f"{p.name}.weight"]).grad
            for e, n in enumerate(p.names):
                g = of[e] if p.experts else of
                found[n].append((g.mT if p.transposed else g).clone())
    return {n: torch.stack(of) for n, of in found.items()}


@pytest.mark.parametrize("which", ["Qwen3Moe", "GptOss"])
def test_gradients_of_sequences_at_the_base(which):
    rows = torch.randint(3, VOCAB, (6, 9))
    g = row_gradients(which, rows)
    model = mixture(which, torch.float64)
    pairs = find_pairs(model)
    assert any(not of.any() for n in g for of in g[n])  # an expert that a sequence never reached
    fisher, _ = kind_named("fisher").gather(model, pairs, rows, labels="corpus")
    for n, F in fisher.tensors().items():
        torch.testing.assert_close(F.double(), g[n].square().mean(0), rtol=1e-4, atol=1e-9)
    near = {"rtol": 1e-5, "atol": 1e-6}  # routers round to float32
    for n, of in project(model, pairs, rows, labels="corpus").items():
        torch.testing.assert_close(of.cores, g[n] @ of.V[:, :4], **near)
        torch.testing.assert_close(of.left, of.U.mT @ (g[n] @ g[n].mT).mean(0) @ of.U, **near)
        torch.testing.assert_close(of.right, of.V.mT @ (g[n].mT @ g[n]).mean(0) @ of.V, **near)
        torch.testing.assert_close(of.rows, g[n].square().sum(2).mean(0), **near)
        torch.testing.assert_close(of.columns, g[n].square().sum(1).mean(0), **near)


def test_the_published_fisher_of_experts():
    rows = torch.randint(3, VOCAB, (3, 9))
    g = row_gradients("GptOss", rows)
    model = mixture("GptOss", torch.float64)
    pairs = find_pairs(model)
    fisher, _ = kind_named("fisher").gather(model, pairs, rows, method="original")
    for n, F in fisher.tensors().items():  # of the mean over 8 tokens, not their sum
        torch.testing.assert_close(F.double(), (g[n] / 8).square().mean(0), rtol=1e-4, atol=1e-9)


# ---------------------------------------------------------------- under a Trainer


def recorded(tmp_path, model=None, **settings):
    trainer = make_trainer(model or mixture(), tmp_path / "a")
    hlora.attach(trainer, hlora.Record(tmp_path / "nu", quiet=True, **settings))
    trainer.train()
    return tmp_path / "nu"


@pytest.mark.parametrize("config", [{}, {"r": 3, "lora_alpha": 7}])
@pytest.mark.parametrize("kind", ["dense", "factored"])
def test_a_domain_starts_where_the_general_phase_ended_and_is_held(kind, config, tmp_path):
    first = mixture()
    folder = recorded(tmp_path, first, kind=kind)
    end = {n: 2 * B @ A for n, (B, A) in factors(find_pairs(first)).items()}
    ids = torch.tensor([r["input_ids"] for r in token_rows(2)])
    logits = first.eval()(input_ids=ids).logits

    def trained_with(phi):
        model = mixture(**config)
        trainer = make_trainer(model, tmp_path / "b", rows=token_rows(seed=7))
        penalty, starts = hlora.Penalty(folder, phi=phi), []

        class See(hlora.Regularizer):
            def before_step(self, groups):
                if not starts:
                    starts.append(model(input_ids=ids).logits.detach())

        hlora.attach(trainer, penalty, See())
        trainer.train()
        torch.testing.assert_close(starts[0], logits)
        s = config.get("lora_alpha", 4) / config.get("r", R)
        return {n: s * B @ A for n, (B, A) in factors(find_pairs(model)).items()}

    free, held = trained_with(0.0), trained_with(1e3)
    for n in (
        "model.layers.1.mlp.experts.2.gate_up_proj",
        "model.layers.0.mlp.experts.1.down_proj",
    ):
        assert (held[n] - end[n]).norm() < 0.7 * (free[n] - end[n]).norm()
    assert store.load(folder).info["pairs"].keys() == end.keys()


def test_all_linear_holds_the_router_too_and_takes_a_larger_rank(tmp_path):
    """PEFT rewrites it to the experts' and the routers' parameters, with a rank of their own."""
    model = mixture(target_modules="all-linear", target_parameters=None)
    names = {n for p in find_pairs(model) for n in p.names}
    assert {"model.layers.0.mlp.gate", "model.layers.1.mlp.experts.0.down_proj"} <= names
    folder = recorded(tmp_path, model)
    new = mixture(target_modules="all-linear", target_parameters=None, r=4, lora_alpha=8)
    penalty, before = hlora.Penalty(folder), factors(find_pairs(new))
    penalty.start(new, torch.optim.SGD(trained(new)))
    for n, (_, A) in factors(find_pairs(new)).items():
        r = len(A) // 2
        assert torch.equal(A[r:], before[n][1][r:])  # zero would never learn
    ids = torch.tensor([r["input_ids"] for r in token_rows(2)])
    torch.testing.assert_close(new(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


def test_an_expert_without_a_token_is_named_and_has_no_importance(tmp_path, caplog):
    model = mixture()
    router = model.base_model.model.model.layers[1].mlp.gate
    router.register_forward_hook(lambda m, i, out: _without_the_first(out))
    folder = recorded(tmp_path, model)
    norms = store.load(folder).importance.norms()
    assert norms["model.layers.1.mlp.experts.0.down_proj"] == 0
    assert norms["model.layers.1.mlp.experts.1.down_proj"] > 0
    assert "never reached model.layers.1.mlp.experts.0:" in caplog.text


def _without_the_first(out):
    logits, scores, chosen = out
    return logits, scores, chosen.clamp(min=1)


def test_merged_it_is_the_same_model():
    model = moved(mixture(dtype=torch.float64))
    loss = loss_of(model)
    torch.testing.assert_close(loss_of(merge_adapter(model)), loss)


def test_a_reference_has_the_recorded_experts(tmp_path):
    first = mixture()
    folder = recorded(tmp_path, first)
    stored = store.load(folder)
    model = mixture()
    add_reference(model, "ref", read_tensors(folder), stored.info["pairs"])
    ids = torch.tensor([r["input_ids"] for r in token_rows(2)])
    model.set_adapter("ref")
    torch.testing.assert_close(model(input_ids=ids).logits, first.eval()(input_ids=ids).logits)


def test_a_resumed_recording_is_the_same(tmp_path):
    recorded(tmp_path, kind="dense")
    for steps in (3, 6):
        trainer = make_trainer(
            mixture(), tmp_path / "c", max_steps=6, save_strategy="steps", save_steps=3
        )
        hlora.attach(trainer, hlora.Record(tmp_path / "again", kind="dense", quiet=True))
        if steps == 3:
            trainer.add_callback(StopAt(3))
        trainer.train(resume_from_checkpoint=steps == 6)
        if steps == 3:
            (tmp_path / "again").rename(tmp_path / "half")
    one, two = (store.load(tmp_path / f).importance.tensors() for f in ("nu", "again"))
    for n, t in one.items():
        torch.testing.assert_close(two[n], t)


class StopAt(transformers.TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_a_heatmap_has_one_row_for_the_experts():
    norms = {"model.layers.0.mlp.experts.0.up": 3.0, "model.layers.0.mlp.experts.1.up": 4.0}
    assert layer_grid(norms) == (["up"], [0], [[5.0]])


# ---------------------------------------------------------------- commands


@pytest.fixture
def folder(tmp_path):
    words = tokenizer()
    model = base(vocab_size=len(words))
    model.config._experts_implementation = None
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("kind", ["factored", "blend"])
@pytest.mark.parametrize("targets", [["all-linear"], ["q_proj", *STACKS]])
def test_the_commands_hold_experts(kind, targets, tmp_path, folder, capsys):
    def run(*words):
        code = cli.main([*map(str, words)])
        said = capsys.readouterr()
        assert code == 0, said.err
        assert "nothing protects" not in said.err
        return said.out + said.err

    common = ["--model", folder, "--device", "cpu"]
    steps = ["--batch-size", 2, "--max-steps", 2, "--save-steps", 0]
    text = write_text(tmp_path / "a.txt")
    rows = [{"prompt": "the cat", "completion": " sat"}] * 8
    task = write_rows(tmp_path / "task.jsonl", rows)
    nu, mu = tmp_path / "nu", tmp_path / "mu"
    record = ["record", *common, "--targets", *targets, "--text", text, "--kind", kind]
    record += [*(steps if kind == "factored" else ["--block-size", 32]), "--output", nu]
    matrices = 2 + 2 * 2 * E if targets[0] == "q_proj" else 2 * (4 + 1 + 2 * E)
    if kind == "factored":
        assert f"on {matrices} matrices" in run(*record, "--dry-run")
    assert f" {matrices} matrices" in run(*record)
    assert "experts" in run("inspect", nu)
    tune = ["tune", *common, *steps, "--importance", nu, "--task", task]
    run(*tune, "--targets", *targets, "--output", mu)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    pairs = find_pairs(PeftModel.from_pretrained(model, mu, is_trainable=True))
    assert sum(len(p.names) for p in pairs) == matrices
    larger = ["--lora-rank", 16, "--output", tmp_path / "larger"]
    if kind == "factored":
        run(*tune, *larger)
        run("convert", nu, "--to", "ones", "--output", tmp_path / "ones")
    else:
        rewind = ["rewind", *common, "--adapter", mu, "--importance", nu, "--task", task]
        run(*rewind, "--text", text, "--forget-at-most", 1, "--output", tmp_path / "rewound")
    run("merge", "--model", folder, "--adapter", mu, "--output", tmp_path / "merged")


def test_dropout_is_refused_for_experts(tmp_path, folder, capsys):
    record = ["record", "--model", folder, "--device", "cpu", "--targets", "all-linear", "--text"]
    record += [write_text(tmp_path / "a.txt"), "--kind", "factored", "--lora-dropout", 0.1]
    assert cli.main([*map(str, record), "--output", str(tmp_path / "nu")]) != 0
    assert "lora_dropout" in capsys.readouterr().err
