"""Phase μ: train on the domain, held to what mattered for the general task (Eq. 14-16).

    trainer.add_callback(hlora.Penalty("nu", phi=0.01))

The penalty does not depend on the batch, so its gradient is added once per optimizer step, in
closed form, after accumulation and clipping: the same for SFT and DPO and on every rank.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from hlora.core import store
from hlora.core.layers import effective_number, layer_weights
from hlora.core.lowrank import LowRank
from hlora.core.pairs import Group, group
from hlora.core.presets import PENALTY_PRESETS, PenaltyRule, choose
from hlora.core.steps import pending_scale, watchers
from hlora.errors import InputError, StoreError
from hlora.files import write_whole
from hlora.hf.checkpoints import checkpoint_folder
from hlora.hf.distributed import refuse_sharded
from hlora.hf.peft import find_pairs, starts_at_base

logger = logging.getLogger(__name__)

STATE = "hlora_penalty.safetensors"
ANCHORS = ("nu", "base")
WEAK = 1e-3
"""Below this share of the task's gradient the penalty does nothing."""
CONCENTRATED = 0.9
"""Above this share of Eq. 15's weight one layer is the only one held."""


class Penalty(TrainerCallback):
    """Adds φ · Σ_l w_l Σ_i Ω_i (θ_i − θ_i^ν)² to what a Trainer minimizes.

    Trainer's own `loss` stays the task's. At each logging step `R`, `penalty` (φ·R) and
    `total_loss`, each a mean over the steps since the last one, and `penalty_grad_ratio` (the
    norm of the penalty's gradient over the task's) join the logs and `state.log_history`.

    Args:
        importance: an importance folder.
        phi: φ of Eq. 16; 0.01 on normalized importance unless the preset says otherwise.
        preset: `default`, `paper` (Eq. 14-16 to the letter) or `official` (the authors' code).
        anchor: `nu` starts from the recorded adapter and holds θ to it; `base` starts from the
            base model and holds θ to that, the recorded adapter serving for its importance only.
        rule: fields of `hlora.core.presets.PenaltyRule` in place of the preset's:
            normalize, layer_weights, softmax_scale, apart.

    Raises:
        InputError, StoreError: an unusable setting or importance folder.
        MismatchError: when training starts, for a model that the importance does not belong to.
    """

    def __init__(
        self,
        importance: str | Path,
        *,
        phi: float | None = None,
        preset: str | None = None,
        anchor: str = "nu",
        **rule: Any,
    ) -> None:
        if anchor not in ANCHORS:
            raise InputError(f"anchor must be one of {', '.join(ANCHORS)}, not {anchor!r}.")
        self.rule: PenaltyRule = choose(PENALTY_PRESETS, preset, phi=phi, **rule)
        self.anchor = anchor
        self.stored = store.load(importance)
        self._groups: list[Group] = []
        self._measure = False
        self._ratios: list[float] = []

    # ------------------------------------------------------------------ in any training loop

    def start(self, model: nn.Module, optimizer: Any, *, fresh: bool = True) -> None:
        """Begin to penalize. `on_train_begin` calls this; a loop of your own may call it.

        Args:
            model: a PEFT model with one active LoRA adapter.
            optimizer: a torch optimizer, also inside accelerate's wrapper.
            fresh: training starts here; otherwise it is resumed and no weight is touched.
        """
        pairs = find_pairs(model)
        self.stored.check(model, pairs, ranks=self.anchor == "nu")
        self._groups = group(pairs)
        self.stored.importance.arrange(self._groups)
        self._coefficients = self._layer_coefficients()
        self._pull = {  # of G Aᵀ and BᵀG: the derivatives by B and A of φ Σ_l c_l Σ_i Ω_i D_i²
            g.names: 2 * self.rule.phi * self._coefficients[g.names].reshape(-1, 1, 1) * g.s
            for g in self._groups
        }
        self._anchor = self._find_anchor(model, fresh=fresh)
        device = self._groups[0].device
        self._R = torch.zeros((), dtype=torch.float64, device=device)
        self._norms = torch.zeros(2, dtype=torch.float64, device=device)
        self._steps = 0
        self._watchers = watchers(optimizer)
        self._watchers.add.append(self._add_gradient)

    def finish(self) -> None:
        """Stop penalizing."""
        self._watchers.forget(self._add_gradient)
        self._groups = []

    def _layer_coefficients(self) -> dict[tuple[str, ...], Tensor]:
        """What multiplies each R_l: Eq. 15's weight, and the normalization of Ω."""
        rule = self.rule
        norms, totals = self.stored.importance.norms(), self.stored.importance.totals()
        weights = layer_weights(
            norms, rule.layer_weights, scale=rule.softmax_scale, apart=rule.apart
        )
        top = max(weights, key=weights.__getitem__)
        share = weights[top] / sum(weights.values())
        if len(weights) > 1 and share > CONCENTRATED:
            logger.warning(
                "%s holds %.0f %% of the layer weights (effective number of layers %.1f of %d), so "
                "the others are free to forget: use layer_weights='normalized', or record with a "
                "larger xi.",
                top, 100 * share, effective_number(weights), len(weights),
            )  # fmt: skip
        scale = 1.0
        if rule.normalize:
            elements = sum(g.m * g.n * len(g.pairs) for g in self._groups)
            mean = sum(weights[n] * totals[n] for n in weights) / elements
            if not mean > 0:
                raise StoreError(
                    f"The importance in {self.stored.folder} is zero everywhere: ν did not train. "
                    "Record again."
                )
            scale = 1.0 / mean
        return {
            g.names: torch.tensor(
                [scale * weights[n] for n in g.names], dtype=g.dtype, device=g.device
            )
            for g in self._groups
        }

    def _find_anchor(
        self, model: nn.Module, *, fresh: bool
    ) -> dict[tuple[str, ...], tuple[Tensor, Tensor]]:
        """B and A of the anchor by group; for `nu` an untrained adapter takes ν's weights."""
        anchor = {}
        moved = False
        for g in self._groups:
            B, A = g.factors()
            if self.anchor == "base":
                # Where the initialization changed θ₀, the start and not B = 0 is the base model.
                anchor[g.names] = (torch.zeros_like(B), A) if starts_at_base(model) else (B, A)
                continue
            nu = {n: self.stored.factors[n] for n in g.names}
            B_nu = g.stack({n: f[0] for n, f in nu.items()})
            A_nu = g.stack({n: f[1] for n, f in nu.items()})
            anchor[g.names] = (B_nu, A_nu)
            if fresh:
                if not B.any():
                    g.set_factors(B_nu, A_nu)
                else:
                    moved |= not (torch.equal(B, B_nu) and torch.equal(A, A_nu))
        if moved:
            logger.warning(
                "The adapter is neither new nor the one in %s: training starts where it is and is "
                "pulled towards θ^ν. Start from a new adapter, or from that folder.",
                self.stored.folder,
            )
        return anchor

    def change(self, g: Group, B: Tensor, A: Tensor) -> LowRank:
        """D = θ − θ^ν of a group as thin matrices, θ made of B (L, m, r) and A (L, r, n)."""
        return LowRank.moved(*self._anchor[g.names], B, A, g.s)

    @torch.no_grad()
    def value(self) -> Tensor:
        """R at the present weights (Eq. 15), layer weights and normalization included."""
        R = torch.zeros_like(self._R)
        for g in self._groups:
            R += self._pulled(g)[0].to(R.device)
        return R

    def _pulled(self, g: Group) -> tuple[Tensor, Tensor, Tensor]:
        """The group's share of R, and φ ∂R/∂B and φ ∂R/∂A."""
        B, A = g.factors()
        R, GA, BG = self.stored.importance.pull(g, self.change(g, B, A), B, A)
        pull = self._pull[g.names]
        return self._coefficients[g.names] @ R, pull * GA, pull * BG

    @torch.no_grad()
    def _add_gradient(self, optimizer: Optimizer) -> None:
        if self.rule.phi == 0:
            return  # plain LoRA, bit for bit
        scale = pending_scale(optimizer)
        if self._measure:
            self._norms.zero_()
        for g in self._groups:
            R, dB, dA = self._pulled(g)
            self._R += R.to(self._R.device)
            if scale is not None:
                dB, dA = dB * scale.to(dB), dA * scale.to(dA)
            if self._measure:
                self._norms += torch.stack(
                    [
                        sum(t.double().square().sum() for t in both)  # type: ignore[misc]
                        for both in (g.gradients(), (dB, dA))
                    ]
                ).to(self._norms.device)
            g.add_gradients(dB, dA)
        self._steps += 1

    # ------------------------------------------------------------------ under a Trainer

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):  # type: ignore[no-untyped-def]
        refuse_sharded(args)
        fresh = state.global_step == 0
        self.start(model, optimizer, fresh=fresh)
        if not fresh and self.anchor == "base" and not starts_at_base(model):
            self._load_anchor(checkpoint_folder(args, state) / STATE)

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        every = max(int(state.logging_steps or 1), 1)
        self._measure = (state.global_step + 1) % every == 0

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if not self._groups or logs is None or "loss" not in logs:
            return
        R = float(self._R) / max(self._steps, 1)
        entry = {
            "R": R,
            "penalty": self.rule.phi * R,
            "total_loss": logs["loss"] + self.rule.phi * R,
        }
        if self._measure and self._steps:
            task, ours = self._norms.sqrt().tolist()
            if task > 0:
                entry["penalty_grad_ratio"] = ours / task
                self._ratios.append(ours / task)
        self._R.zero_()
        self._steps = 0
        logs.update(entry)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(entry)

    def on_save(self, args, state, control, model=None, **kwargs):  # type: ignore[no-untyped-def]
        if self._groups and self.anchor == "base" and state.is_world_process_zero:
            tensors: dict[str, Tensor] = {}
            for names, (B, A) in self._anchor.items():
                for name, b, a in zip(names, B, A, strict=True):
                    tensors |= {
                        f"B.{name}": b.cpu().contiguous(),
                        f"A.{name}": a.cpu().contiguous(),
                    }
            write_whole(checkpoint_folder(args, state) / STATE, save(tensors))

    def on_train_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if not self._groups:
            return
        self.finish()
        if self.rule.phi > 0 and self._ratios and max(self._ratios) < WEAK:
            logger.warning(
                "The penalty did next to nothing: its gradient was at most %.1e of the task's. "
                "Raise phi (now %g)%s.",
                max(self._ratios),
                self.rule.phi,
                "" if self.rule.normalize else ", or normalize the importance (normalize=True)",
            )

    def _load_anchor(self, path: Path) -> None:
        try:
            tensors = load_file(path)
        except Exception:
            raise StoreError(
                f"Cannot resume: {path} is missing or damaged, and with it the base model that the "
                "penalty is anchored at. Start again."
            ) from None
        for g in self._groups:
            self._anchor[g.names] = (
                g.stack({n: tensors[f"B.{n}"] for n in g.names}),
                g.stack({n: tensors[f"A.{n}"] for n in g.names}),
            )
