"""Does a test fail when the method is broken? `make mutants`

Each mutant is one change of the sources that makes the method wrong. It is applied to a copy of the
project, and the fast tests named beside it must fail. A mutant that no test notices is MISSED, and
the command ends with an error.

    python -m tests.mutants [WORD ...]     only the mutants whose name has one of these words
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Mutant:
    """`old`, which stands once in `file`, becomes `new`; `tests` are pytest's arguments."""

    name: str
    file: str
    old: str
    new: str
    tests: str


BOUNDED, SEQUENCES, BUDGET, REWIND = (
    "tests/test_bounded.py", "tests/test_sequences.py", "tests/test_budget.py",
    "tests/test_rewind.py",
)  # fmt: skip
LOOKS = "tests/test_looks.py"
BAD_STEPS, CHECKPOINTS = "tests/test_badsteps.py", "tests/test_checkpoints.py"
ENCODING = "tests/test_data_encoding.py"
OPS, RECORD, FACTORED = "tests/test_ops.py", "tests/test_record.py", "tests/test_factored.py"
PENALTY, STORE, FISHER = "tests/test_penalty.py", "tests/test_store.py", "tests/test_fisher.py"
DOMAINS, EXPERTS = "tests/test_domains.py", "tests/test_experts.py"
STORAGE, REGULARIZER, PAIRS = (
    "tests/test_storage.py", "tests/test_regularizer.py", "tests/test_pairs.py"
)  # fmt: skip

OWN_TEXT, STOPPED = "tests/test_own_text.py", "tests/test_stopped.py"
MATCHED, RESULTS = "tests/test_matched.py", "tests/test_results.py"

C, I, H, S = "core/", "core/importance/", "hf/", "study/"

MUTANTS = [
    # Trainers
    Mutant("the reference is a new adapter", H + "peft.py",
           "    take_over(model, recorded, noted, name)", "    pass", "tests/test_trl.py"),
    Mutant("A2PO's copy of the model stays at the base model", H + "reference.py",
           "take_over(trainer.ref_model, recorded, noted)", "pass",
           "tests/test_trainers.py -k new_adapter"),
    Mutant("a term on the data never joins the loss", H + "regularize.py",
           "of.off or self.steps.losses", "of.off or True", "tests/test_trainers.py -k at_once"),
    Mutant("a budget is measured on a classifier", H + "regularize.py",
           "        refuse_no_text(model, asked)\n", "", "tests/test_trainers.py -k no_text"),
    Mutant("a new magnitude is not that of the start", H + "peft.py",
           "old.copy_(magnitudes[adapter].weight)", "pass", "tests/test_unheld.py"),
    Mutant("the recorded head is left behind", H + "regularize.py",
           "take_over(model, read_tensors(folder), noted)",
           "take_over(model, {k: v for k, v in read_tensors(folder).items() if 'lora_' in k}, "
           "noted)", "tests/test_unheld.py"),
    Mutant("what text never reached is not told", H + "record.py",
           "    parts = unreached(importance.norms())", "    parts = []", "tests/test_unheld.py"),
    # Experts kept as one parameter
    Mutant("columns of B by expert, not by column of each", H + "peft.py",
           "B.unflatten(2, (-1, self.count)).permute(0, 3, 1, 2)",
           "B.unflatten(2, (self.count, -1)).permute(0, 2, 1, 3)", EXPERTS + " -k reads"),
    Mutant("experts that are kept transposed are taken as they are", I + "passes.py",
           "each.mT if pair.transposed else each, strict", "each, strict",
           EXPERTS + " -k gradients_of_sequences"),
    # Eq. 10-12
    Mutant("Eq. 11 without η g^B g^A", C + "estimators.py", "B - eta * gB", "B", OPS),
    Mutant("Eq. 11 with the wrong sign of η", C + "estimators.py", "B - eta * gB", "B + eta * gB",
           OPS),
    Mutant("Eq. 10 from the new A to the new A", C + "lowrank.py",
           "torch.cat([A1, A1 - A0], dim=1)", "torch.cat([A1, A0 - A1], dim=1)", OPS),
    Mutant("Eq. 10 without s on the second half", C + "lowrank.py",
           "torch.cat([s * (B1 - B0), s * B0], dim=2)", "torch.cat([s * (B1 - B0), B0], dim=2)",
           OPS),
    Mutant("Eq. 12 adds in place of subtracting", C + "ops/reference.py", "value=-1.0)",
           "value=1.0)", OPS),
    Mutant("the row sums of the path integral have the wrong sign", I + "factored.py",
           "sums -= of_step", "sums += of_step", FACTORED + " -k rank_one"),
    Mutant("marginals without Q₁Q₂ᵀ of the columns", C + "lowrank.py",
           "columns = (((other.P.mT @ self.P) @ self.Q) * other.Q).sum(dim=1)",
           "columns = (((self.P.mT @ other.P) @ self.Q) * other.Q).sum(dim=1)", FACTORED),
    Mutant("the projection forgets the overlap", C + "estimators.py",
           "left = gB_A - B_inv @ (B.mT @ gB_A)", "left = gB_A", OPS),
    Mutant("the projection is not divided by s", C + "estimators.py",
           "torch.cat([left, B_inv], dim=2) / s", "torch.cat([left, B_inv], dim=2)", OPS),
    # Eq. 13
    Mutant("ω is not clamped at zero", C + "ops/reference.py", "tile.clamp_(min=0).div_",
           "tile.div_", OPS),
    Mutant("ξ is left out", C + "ops/reference.py", "div_(d.square_().add_(xi).to(omega.dtype))",
           "div_(d.square_().add_(1e-12).to(omega.dtype))", OPS),
    Mutant("Δ counts from zero, not from the start", C + "recorder.py",
           "LowRank.moved(*self._start.get(g.names, g.factors()), *g.factors(), g.s)",
           "LowRank.moved(*(0 * f for f in g.factors()), *g.factors(), g.s)",
           RECORD + " -k counts_from_the_start"),
    Mutant("a negative row sum counts", I + "factored.py", "rows.clamp(min=0), columns",
           "rows, columns", FACTORED + " -k negative"),
    Mutant("a negative column sum counts", I + "factored.py", "columns.clamp(min=0), delta",
           "columns, delta", FACTORED + " -k negative"),
    Mutant("the negative share of factored is always zero", I + "factored.py",
           "negative = (rows < 0).sum() * group.n", "negative = (rows < 0).sum() * 0",
           FACTORED + " -k negative"),
    Mutant("Ω of a second task counts three times (dense)", I + "dense.py",
           "self.Omega[group.names][0].add_(omega)",
           "self.Omega[group.names][0].add_(omega, alpha=3)",
           RECORD + " -k two_tasks"),
    Mutant("Ω of a second task counts three times (factored)", I + "factored.py",
           "before = self.Omega.get(group.names, _zeros(group))\n",
           "before = self.Omega.get(group.names, _zeros(group))\n"
           "        sums = [3 * t if before[0].any() else t for t in sums]\n",
           FACTORED + " -k two_tasks"),
    Mutant("Ω counts three times (factored)", I + "factored.py",
           "(before[0] + sums[0], before[1] + sums[1])",
           "(before[0] + 3 * sums[0], before[1] + 3 * sums[1])", FACTORED),
    Mutant("epochs are not consolidated one by one", H + "record.py",
           'self.rule.every == "epoch"', 'self.rule.every == "never"', RECORD + " -k official"),
    Mutant("ω is not clamped after each step", C + "recorder.py",
           'clamp=self.rule.clamp == "step"', "clamp=False", RECORD + " -k official"),
    Mutant("ξ relative to the sum, not the mean", C + "recorder.py",
           "xi * squares / self._elements()", "xi * squares", RECORD + " -k relative"),
    # The recorder around a step
    Mutant("every pair takes the first pair's η", C + "recorder.py",
           "[rates[id(p.B if group.trains_B else p.A)] for",
           "[next(iter(rates.values())) for", RECORD + " -k own_learning_rate"),
    Mutant("the scaler's factor stays on the recorded gradient", C + "recorder.py",
           "gB, gA = gB / scale.to(gB), gA / scale.to(gA)", "pass", RECORD + " -k fp16"),
    Mutant("infinite gradients reach ω", C + "steps.py",
           "if self._skipped(optimizer):", "if False:", RECORD + " -k fp16"),
    Mutant("the penalty adds before the recorder looks", C + "steps.py",
           """        for watcher in list(self.observers):
            watcher(optimizer)
        self.regularize(optimizer)""",
           """        self.regularize(optimizer)
        for watcher in list(self.observers):
            watcher(optimizer)""", PENALTY + " -k alone"),
    Mutant("clipped steps are not counted", C + "recorder.py", ">= 0.999 * self.max_grad_norm",
           "< 0", RECORD + " -k 'summary'"),
    Mutant("counts are not restored at a resume", C + "recorder.py", "count.fill_(notes[k])",
           "pass", RECORD + " -k resumed"),
    Mutant("the start is not restored at a resume", C + "recorder.py",
           "            self._start[g.names] = (g", "            self._lost = (g",
           RECORD + " -k resumed"),
    Mutant("Ω is not restored at a resume", I + "__init__.py",
           "if keys[0].format(group.names[0]) in state:", "if False:", FACTORED + " -k resumed"),
    # Eq. 14-16
    Mutant("the penalty's gradient is halved", C + "quadratic.py", "(2 * self.phi * c)",
           "(self.phi * c)", PENALTY + " -k autograd"),
    Mutant("the penalty's gradient lacks s", C + "quadratic.py", "reshape(-1, 1, 1) * g.s",
           "reshape(-1, 1, 1)", PENALTY + " -k autograd"),
    Mutant("dB and dA of the rank-one penalty lack u", C + "lowrank.py",
           "uP @ (Qv @ right.mT)", "self.P @ (Qv @ right.mT)", FACTORED),
    Mutant("the softmax is not scaled", C + "layers.py", "math.exp(scale * (v - top))",
           "math.exp(v - top)", PENALTY + " -k 'all_the_weight or official'"),
    Mutant("the softmax is uniform", C + "layers.py",
           "raw = [math.exp(scale * (v - top)) for v in values]", "raw = [1.0 for v in values]",
           PENALTY + " -k eq_15"),
    Mutant("apart is dropped", C + "layers.py", 'name.rsplit(".", 1)[-1] if apart else ""', '""',
           PENALTY + " -k sum_to_one"),
    Mutant("importance is not normalized", C + "quadratic.py", "scale = 1.0 / mean", "scale = 1.0",
           PENALTY + " -k autograd"),
    Mutant("φ is read once", C + "quadratic.py", "(2 * self.phi * c)", "(2 * self.rule.phi * c)",
           PENALTY + " -k phi_may_change"),
    Mutant("the scaler's factor is ignored by the penalty", C + "steps.py",
           "total = {n: (g, B * scale.to(B), A * scale.to(A)) for n, (g, B, A) in total.items()}",
           "pass",
           PENALTY + " -k scaler"),
    Mutant("the logged R is not divided by the steps", C + "steps.py",
           'float(self._R) / self._taken, "penalty"', 'float(self._R), "penalty"',
           REGULARIZER + " -k phi_may_change"),
    Mutant("the logged penalty lacks φ", C + "steps.py", "phi * R.detach().double()",
           "R.detach().double()",
           REGULARIZER + " -k phi_may_change"),
    Mutant("a penalty is added again at each start", H + "regularize.py",
           "        self.finish()\n        self._groups = self.prepare",
           "        self._groups = self.prepare", PENALTY + " -k trained_twice"),
    Mutant("a recording is added again at each start", H + "record.py",
           "        self.stop()\n        earlier =", "        earlier =", RECORD + " -k repeated"),
    Mutant("a new adapter does not take ν's weights", H + "regularize.py",
           'start == "new" and (left', "False and (left", PENALTY + " -k huge_phi"),
    Mutant("base is the start, B = 0 or not", H + "regularize.py",
           "if not self.needs_state:\n                return {",
           "if True:\n                return {",
           PENALTY + " -k mutated_base"),
    Mutant("φ is not restored at a resume", H + "regularize.py",
           'self.phi = float(notes["phi"])', "pass", PENALTY + " -k phi_may_change"),
    Mutant("what depends on data grows with accumulation", H + "attach.py",
           "(1 if divided else micro_batches)", "1", REGULARIZER + " -k accumulation"),
    Mutant("the logged loss takes the penalty in", H + "attach.py", "(added - added.detach())",
           "added", REGULARIZER + " -k logged_loss"),
    Mutant("the gradients of B and A are swapped", C + "quadratic.py",
           "gradients.append((weight * GA * g.trains_B, weight * BG * g.trains_A))",
           "gradients.append((weight * BG.mT, weight * GA.mT))", PENALTY + " -k autograd"),
    # Kinds, storage, store
    Mutant("the Fisher is a sum, not a mean", I + "fisher.py", "s / len(rows) for n, s",
           "s for n, s", FISHER + " -k squared_gradient"),
    Mutant("labels are the corpus' own, not sampled", I + "passes.py",
           'ids[:, 1:] if labels == "corpus" else', 'ids[:, 1:] if True else', FISHER + " -k seed"),
    Mutant("a token without weight is drawn", C + "sampling.py", "at, right=True)", "at)",
           "tests/test_sampling.py"),
    Mutant("the largest number drawn is beyond all weights", C + "sampling.py",
           "at = torch.minimum(", "torch.minimum(", "tests/test_sampling.py"),
    Mutant("squares of sums over sequences", C + "ops/reference.py",
           "(delta[:, :, rows].mT @ x).square_().sum(dim=0)",
           "(delta[:, :, rows].mT @ x).sum(dim=0).square_()", FISHER + " -k squared"),
    Mutant("8-bit codes are off by one", C + "logcodes.py", ".clamp(0, 254) + 1", ".clamp(0, 254)",
           STORAGE + " -k codes"),
    Mutant("another base model is accepted", C + "store.py",
           "differs = (a - b).abs() > 0.008", "differs = (a - b).abs() > 800.0", STORE),
    Mutant("another rank is accepted", C + "pairs.py",
           'if ranks and values["r"] < noted[name]["r"]:', "if False:", STORE),
    Mutant("a larger rank never learns", H + "peft.py", 'A[:, int(of["r"]) :] = new', "_ = new",
           DOMAINS),
    Mutant("the recorded scaling is taken for this one", C + "pairs.py",
           'B * (noted["s"] / s)', "B", DOMAINS),
    Mutant("the first of several importances leads", H + "attach.py",
           "penalty is starts[-1]", "penalty is starts[0]", DOMAINS),
    Mutant("what a merged model holds is not asked", H + "regularize.py",
           'self.anchor == "merged"\n', 'self.anchor != "nu"\n', DOMAINS),
    Mutant("a changed file is accepted", C + "store.py", 'if sha256(path) != noted["sha256"]:',
           "if False:", STORE),
    Mutant("negative importance is accepted", I + "dense.py", "(not codes and (values < 0).any())",
           "False", STORE),
    Mutant("a trained bias is accepted", H + "peft.py",
           'if getattr(config, "bias", "none") != "none":', "if False:", PAIRS),
    # Right, or refused
    Mutant("a step that is not finite is taken", C + "steps.py", "  if bad:", "  if False:",
           BAD_STEPS),
    Mutant("the weights of an earlier step are restored", C + "steps.py",
           "[*map(id, self._trained)] == [*map(id, trained)]",
           "len(self._trained) == len(trained)", BAD_STEPS + " -k restored"),
    Mutant("a damaged checkpoint is resumed", H + "checkpoints.py", "        if why is None:",
           "        if True:", CHECKPOINTS),
    Mutant("another run's state is mixed in", H + "callbacks.py",
           'notes["weights"] != digest(groups)', "False", CHECKPOINTS),
    Mutant("a finished run is trained one step more", H + "checkpoints.py",
           "if _at_its_end(path, args):", "if False:", CHECKPOINTS),
    Mutant("no number counts as the first choice", "run/evaluate.py",
           "if all(map(math.isfinite, lls)) else None", "if True else None",
           ENCODING + " -k no_number"),
    Mutant("an adapter that is not finite is read", C + "adapter_file.py",
           "if not isfinite(value).all():", "if False:", BAD_STEPS),
    Mutant("a tokenizer's own beginning is left out", "data/encode.py",
           'special and not text.startswith(start or "\\0")', "False", ENCODING),
    Mutant("documents are written behind the mark of a turn", "data/encode.py",
           "if i is not None and i not in marks", "if i is not None", OWN_TEXT),
    Mutant("a turn's mark is looked for in a chat's first token too", "data/encode.py",
           'in (3, 1), (1, 0):', 'in (3, 0), (1, 0):',
           OWN_TEXT),
    Mutant("own text keeps what no other text begins with", "run/own_text.py",
           "0 if leading(tokenizer) else 1", "0", OWN_TEXT),
    # At the base: sequences, budget, rewinding
    Mutant("the sketch takes layers apart", I + "sketch.py",
           "torch.stack([s.sum(0).to(seen[0].device) for s in seen]).sum(0)",
           "torch.stack([s[0].to(seen[0].device) for s in seen]).sum(0)", SEQUENCES),
    Mutant("the sketch's value is not halved", I + "sketch.py",
           "total = total / (2 * self._tokens", "total = total / (self._tokens", SEQUENCES),
    Mutant("the Kronecker product is not scaled to the exact trace", I + "kronecker.py",
           "(2 * self._tokens * trace)", "(2 * self._tokens)", SEQUENCES),
    Mutant("the rest of the diagonal is counted twice", I + "kronecker.py",
           "(of.rows - ((U @ of.left) * U).sum(1)).clamp(min=0)", "of.rows", SEQUENCES),
    Mutant("the gradient of a Kronecker product leaves C out", I + "kronecker.py",
           "GP @ (QC @ right.mT)", "GP @ (D.Q @ right.mT)", SEQUENCES),
    Mutant("sums over sequences are not means", I + "projected.py",
           "(m / len(rows) for m in moments)", "(m for m in moments)", SEQUENCES),
    Mutant("the factor of the rows is that of the columns", I + "projected.py",
           "dU.mT @ Kx @ dU", "dU.mT @ Kd @ dU", SEQUENCES),
    Mutant("a runaway sequence outweighs the others", I + "bounded.py",
           "sizes > limit, limit / sizes", "sizes > limit, torch.ones_like(sizes)", BOUNDED),
    Mutant("a bounded gradient is scaled as its square", I + "projected.py",
           "shares.sqrt()[:, None, None]", "shares[:, None, None]", SEQUENCES),
    Mutant("any number of sequences is bounded", I + "bounded.py",
           "LIMIT * reached.median()[None], beyond[:1]", "LIMIT * reached.median()[None]", BOUNDED),
    Mutant("sequences that reach no expert are its median", I + "bounded.py",
           "sizes[sizes > 0]", "sizes", BOUNDED),
    Mutant("a sequence held apart leaves without being added", I + "bounded.py",
           "total += part[rest].sum(0)", "total += part[self.apart :].sum(0)", BOUNDED),
    Mutant("the blend's meter has the smooth part", I + "blend.py",
           "return pulled, forgetting",
           "return pulled, sum(v.sum() for v, _, _ in pulled)", SEQUENCES),
    Mutant("φ is steered away from the budget", C + "budget.py", "self.level + GAIN",
           "-self.level - GAIN", BUDGET + " -k within_the_budget"),
    Mutant("φ swings around the budget", C + "budget.py", "GAIN, LEVEL_GAIN = 2.0, 0.1",
           "GAIN, LEVEL_GAIN = 0.0, 0.3", BUDGET + " -k settles"),
    Mutant("what is above the budget at the end stays", C + "budget.py",
           "if not enough < forgotten < math.inf:", "if True:", BUDGET + " -k taken_back"),
    Mutant("text that is watched does not count", C + "budget.py",
           "for gauge, part in both]).amax()", "for gauge, part in both])[0]",
           BUDGET + " -k watched_is_held"),
    Mutant("a line joins means over unlike seeds", S + "rows.py",
           " if s in shared or not shared}", "}", "tests/test_figures.py -k same_seeds"),
    Mutant("first runs of a new seed hide a contrast", S + "tables.py",
           " if of.read(s, share, ours, other)]", "]", MATCHED + " -k another_seed"),
    Mutant("a short run is not steered faster", C + "budget.py", "SETTLED = 10.0",
           "SETTLED = 0.0", BUDGET + " -k short_runs"),
    Mutant("what is measured corrects nothing", C + "budget.py",
           "to(self.phi) * self.log_kappa.exp()", "to(self.phi)", BUDGET + " -k corrected"),
    Mutant("the text that forgetting is measured on is not kept", I + "sequences.py",
           "{**self._tensors, **kept}", "self._tensors", BUDGET + " -k read_back"),
    Mutant("a resumed budget begins with its ramp", H + "regularize.py",
           "self.regularizer.taken = state.global_step", "pass", BUDGET + " -k resumed"),
    Mutant("a look adds to the quadratic", C + "looks.py",
           "[t - o / phi for", "[t for", LOOKS),
    Mutant("what is frozen counts for a look", C + "quadratic.py",
           "weight * BG * g.trains_A", "weight * BG", LOOKS),
    Mutant("what overflowed is kept", C + "looks.py",
           "torch.where(finite.to(n.device), o.lerp(n, SHARE), o)", "o.lerp(n, SHARE)", LOOKS),
    Mutant("a look thaws what is frozen", H + "peft.py",
           "                p.requires_grad_(trained)", "                pass", LOOKS),
    Mutant("the weight of a look is one", C + "looks.py",
           "(phi * B, phi * A)", "(B, A)", LOOKS),
    Mutant("a look outweighs the task", C + "steps.py",
           "correction = _within(pull.correction, task)", "correction = pull.correction", LOOKS),
    Mutant("a budget pulls without a limit", C + "budget.py",
           "most=MOST_PULL)", "most=math.inf)", BUDGET + " -k harder"),
    Mutant("a classifier is looked at", H + "regularize.py",
           "of_base and predicts_text(model)", "of_base", LOOKS),
    Mutant("a look takes the task's gradients away", H + "gauge.py",
           "                p.grad = grad", "                p.grad = None", LOOKS),
    Mutant("looks are not kept in a checkpoint", C + "quadratic.py",
           "{} if self.looks is None else self.looks.state()", "{}", LOOKS),
    Mutant("rewinding stops above the budget", "run/rewind.py",
           "    below = [p for p in seen if p.measured.nats <= budget]\n    return",
           "    below = seen\n    return", REWIND),
    Mutant("text that is to be kept is not looked at", "run/phases.py",
           "self.tokens if self.settings.keep_text else written", "written", OWN_TEXT),
    # What a stop leaves
    Mutant("a result is written by half", "run/progress.py",
           "    with stop.listening():\n        yield", "    yield", STOPPED),
    Mutant("a stop while it is measured loses what was trained", "run/progress.py",
           "self.asked or at_end", "self.asked", STOPPED),
    Mutant("a stop says nothing of what is kept", "run/training.py",
           "newest_whole(work) if ours else None", "None", STOPPED),
    Mutant("a stop after the last step is forgotten", "run/phases.py",
           "if self.stop and self.stop.asked:", "if False:", STOPPED),
    Mutant("a second stop breaks what is written", "run/progress.py",
           "Asked(patient=True)", "Asked()", STOPPED),
    Mutant("a worker hears a Ctrl-C that is its parent's", "run/progress.py",
           "if_ignored=not is_worker", "if_ignored=True", STOPPED),
    Mutant("half a checkpoint hinders a new run", "run/training.py",
           "settings.overwrite or newest_whole(work) is None", "settings.overwrite", STOPPED),
    Mutant("what is left of a moved base is taken for it", "run/scoring.py",
           "if moves_base(read_config(folder)):", "if False:", "tests/test_evaluate.py -k move"),
    # What a study says
    Mutant("a mean over some of the seeds is the best", S + "cells.py",
           "and not re.search(_OF_SOME, self.rows[i][column])", "", MATCHED),
    Mutant("a seed that tells nothing hides a figure", S + "tables.py",
           "if of.told(s, share, method)]", "]", MATCHED),
    Mutant("runs that are far apart are joined", S + "matched.py",
           "high <= GAP * low", "high <= 1e9 * low", MATCHED),
    Mutant("a bound is told as a value", S + "matched.py",
           "any(curve[s][-1].gain[0] >= share for", "any(False for", MATCHED),
    Mutant("KL is read from a straight line", S + "matched.py",
           'log = self.measure == "KL" and', "log = False and", MATCHED),
    Mutant("runs are joined by what they learned", S + "matched.py",
           "key=lambda p: -p.gone", "key=lambda p: -p.gain[0]", MATCHED),
    Mutant("runs are joined by the loss", S + "matched.py",
           "key=lambda p: -p.gone", "key=lambda p: -p.lost[0]", MATCHED),
    Mutant("seeds have no error", S + "matched.py",
           "_counts(np.random.default_rng(1), len(by_seed))",
           "np.full((DRAWS + 1, len(by_seed)), 1 / len(by_seed))", MATCHED),
    Mutant("comparisons are not corrected", S + "matched.py",
           "(len(ps) - rank) * ps[i]", "ps[i]", MATCHED),
    Mutant("the NLL of unlike tasks is averaged", S + "metrics.py",
           "best=min, pooled=False", "best=min", RESULTS + " -k pooled"),
    Mutant("what is set apart counts", S + "lines.py",
           " if k not in apart] for g", "] for g", RESULTS + " -k apart"),
    Mutant("a budget that was scaled looks as if it held", S + "budgets.py",
           '_shown(share, ".3f")', '_shown(1.0, ".3f")', RESULTS + " -k budget"),
]  # fmt: skip


def source(mutant: Mutant, root: Path = ROOT) -> Path:
    return root / "src" / "hlora" / mutant.file


def run(tests: str, mutant: Mutant | None = None) -> bool:
    """Whether these tests pass on a copy of the project, that has the mutant if there is one."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place)
        for folder in ("src", "tests", "studies"):
            shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("*.pyc"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        if mutant is not None:
            path = source(mutant, copy)
            path.write_text(path.read_text("utf-8").replace(mutant.old, mutant.new), "utf-8")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *shlex.split(tests)], cwd=copy, capture_output=True, text=True,
            env={**os.environ, "PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1"},
            check=False,
        )  # fmt: skip
    if done.returncode not in (0, 1):  # 2: not collected, 5: no test of that name
        raise SystemExit(f"{tests} did not run.\n{done.stdout[-2000:]}")
    return done.returncode == 0


def main() -> None:
    words = sys.argv[1:]
    chosen = [m for m in MUTANTS if not words or any(w in m.name for w in words)]
    if not chosen:
        raise SystemExit(f"No mutant's name has {' or '.join(words)}.")
    wrong = [m.name for m in chosen if source(m).read_text("utf-8").count(m.old) != 1]
    if wrong:
        raise SystemExit(f"The sources have changed under: {', '.join(wrong)}.")
    missed = 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        whole = list(dict.fromkeys(m.tests for m in chosen))
        failing = [t for t, passed in zip(whole, pool.map(run, whole), strict=True) if not passed]
        if failing:  # they would catch everything
            raise SystemExit(f"Without any mutant these fail: {'; '.join(failing)}.")
        passed = pool.map(run, [m.tests for m in chosen], chosen)
        for mutant, unnoticed in zip(chosen, passed, strict=True):
            missed += unnoticed
            print(f"{'MISSED' if unnoticed else 'caught'}  {mutant.name}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} mutants caught.")
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
