"""Regularizers as callbacks: `hlora.attach(trainer, hlora.Penalty("nu", phi=0.01))`."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hlora.core import store
from hlora.core.adapter_file import read_tensors
from hlora.core.budget import LOOKS, Budgeted, check_budget
from hlora.core.looks import ROWS, Looks, in_turn
from hlora.core.pairs import Group, Pair, check_held, digest, group, resized, unstack
from hlora.core.presets import PENALTY_PRESETS, PenaltyRule, choose
from hlora.core.quadratic import Anchor, Quadratic
from hlora.core.regularizer import Regularizer
from hlora.core.sharded import is_sharded
from hlora.core.statefile import pack, read
from hlora.errors import (
    InputError,
    StoreError,
    UnsupportedModelError,
    in_short,
    one_line,
    one_of,
    whole,
)
from hlora.files import write_whole
from hlora.hf.callbacks import Attached
from hlora.hf.distributed import refuse_shards
from hlora.hf.divergence import predicts_text, refuse_no_text
from hlora.hf.gauge import Gauge
from hlora.hf.hub import located
from hlora.hf.limits import check_rows
from hlora.hf.peft import UNHELD, base_of, find_pairs, init_of, starts_at_base, take_over
from hlora.hf.record import warn_of_unreached

logger = logging.getLogger(__name__)

ANCHORS = ("nu", "base", "merged")
LOOK_EVERY = 16
"""Steps from one look to the next."""
NATURAL_PHI = 1.0
"""φ where R is in nats per token: one of general text counts as much as one of the domain."""
WEAK = 1e-3
"""Below this share of the task's gradient a penalty does nothing."""


class Regularization(Attached):
    """A regularizer under a Trainer: started, logged, and saved with its φ in checkpoints.

    Trainer's own `loss` stays the task's. At each logging step `R` (Eq. 15), `penalty` (Σ φ R) and
    `total_loss`, each a mean over the steps since the last one, and `penalty_grad_ratio` (the norm
    of the added gradient over the task's) join the logs, summed over all regularizers.

    Args:
        regularizer: see `hlora.core.regularizer`.
        name: tells several in one run apart.
    """

    joined = False  # by `attach`
    needs_state = False  # without which a run cannot be resumed

    def __init__(self, regularizer: Regularizer | None = None, name: str = "penalty") -> None:
        self.regularizer = regularizer or Regularizer()
        self.name = name
        self._groups: list[Group] = []
        self._asked = self.regularizer.phi

    @property
    def phi(self) -> float | Tensor:
        """φ, read at every step: it may change while training."""
        return self.regularizer.phi

    @phi.setter
    def phi(self, value: float | Tensor) -> None:
        self.note_phi(value)
        self.regularizer.phi = value
        if self.steps is None:  # later on it is changed on the way
            self._asked = value

    # ---------------------------------------------------------------- in any training loop

    def start(self, model: nn.Module, optimizer: Any, *, fresh: bool = True) -> None:
        """Begin to regularize. `on_train_begin` calls this; a loop of your own may call it.

        Args:
            model: a PEFT model with one active LoRA adapter.
            optimizer: a torch optimizer, also inside accelerate's wrapper.
            fresh: training starts here; otherwise it is resumed and no weight is touched.
        """
        self.finish()
        self._groups = self.prepare(model, fresh=fresh)
        check_held(optimizer, self._groups)
        pairs = [p for g in self._groups for p in g.pairs]
        self.follow(optimizer, model, pairs).add(self.regularizer, self._groups)

    def prepare(self, model: nn.Module, *, fresh: bool) -> list[Group]:
        """The groups to regularize; a subclass makes its regularizer here."""
        pairs = find_pairs(model, self.unheld)
        self.regularizer.check(model)
        return group(pairs)

    def finish(self) -> None:
        """Stop regularizing, and keep nothing of the model: it may be deleted."""
        if self.steps is not None:
            self.steps.drop(self.regularizer)
        self.steps, self._groups = None, []
        self.regularizer.let_go()

    @torch.no_grad()
    def value(self) -> Tensor:
        """R at the present weights; 0 where it depends on data.

        Raises:
            InputError: nothing is regularized now.
        """
        if self.steps is None:
            raise InputError(
                "R is that of a model in training: ask for it between start(model, optimizer), "
                "which a Trainer calls, and finish()."
            )
        return self._value()

    def _value(self) -> Tensor:
        pull = self.regularizer.before_step(self._groups)
        return torch.zeros(()) if pull is None else pull.R

    # ---------------------------------------------------------------- under a Trainer

    def check(self, model: nn.Module, args: Any) -> None:
        find_pairs(model, self.unheld)
        self.regularizer.check(model)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):  # type: ignore[no-untyped-def]
        fresh = self.begin(args, state)
        if self.regularizer.acts_on_data and not self.joined:
            raise InputError(
                f"{type(self.regularizer).__name__} acts on the data, so it must join the "
                "loss: use hlora.attach(trainer, ...) in place of add_callback."
            )
        self.start(model, optimizer, fresh=fresh)
        if fresh:
            return
        path = self.resumed_from(args, state) / self.state_file
        if path.exists() or self.needs_state:
            self._load_state(path)
        else:
            logger.warning("%s is missing: the penalty continues with φ %g.", path, float(self.phi))

    def on_step_begin(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self.steps is not None:
            self.steps.forward = []
            every = max(int(state.logging_steps or 1), 1)
            self.steps.measure = (state.global_step + 1) % every == 0

    def on_step_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        of = self.regularizer
        if self.steps is None or not of.acts_on_data or of.off or self.steps.losses:
            return
        raise UnsupportedModelError(
            f"{type(of).__name__} acts on the data, and this trainer computes its loss elsewhere "
            "than in compute_loss, where it could join: use a regularizer of the weights alone, "
            "such as hlora.Penalty."
        )

    def on_log(self, args, state, control, logs=None, **kwargs):  # type: ignore[no-untyped-def]
        if self.steps is None or logs is None or "loss" not in logs:
            return
        entry = self.steps.report()
        if entry is None:  # another regularizer of this run has told it
            return
        if isinstance(self.phi, Tensor):
            entry["phi"] = float(self.phi)
        entry["total_loss"] = logs["loss"] + entry["penalty"]
        logs.update(entry)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(entry)

    def on_save(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self.steps is None:
            return
        weights = digest(self._groups)  # every process
        if state.is_world_process_zero:
            notes = {
                "phi": float(self.phi), "weights": weights, "of": self.identity(),
                "asked": self.asked(),
            }  # fmt: skip
            content = pack(self.state_tensors(), notes)
            write_whole(self.written_to(args, state) / self.state_file, content)

    def on_train_end(self, args, state, control, **kwargs):  # type: ignore[no-untyped-def]
        if self.steps is None:
            return
        self.check_reached(args, state)
        ratio, phi = self.steps.largest_ratio, float(self.phi)
        if not self.regularizer.off:
            self.regularizer.at_end(self._groups)
        self.finish()
        if ratio is not None and ratio < WEAK and phi > 0 and not self.steered:
            logger.warning(
                "The penalty did next to nothing: its gradient was at most %.1e of the task's. "
                "Raise phi (now %g)%s.", ratio, phi, self.remedy(),
            )  # fmt: skip

    def identity(self) -> str:
        """What tells it from others in a checkpoint: its class, by default."""
        return type(self.regularizer).__qualname__

    @property
    def state_file(self) -> str:
        return f"hlora_{self.name}.safetensors"

    def _load_state(self, path: Path) -> None:
        tensors, notes = read(path, "penalty")
        if notes.get("of", self.identity()) != self.identity():
            raise StoreError(
                f"{path} is the state of another regularizer than the one that is attached in its "
                "place: attach the same ones in the same order as in the run that is resumed."
            )
        self.check_bound(notes, self._groups, path)
        self._check_asked(notes.get("asked"), path)
        self.load_tensors(tensors)
        if isinstance(self.phi, Tensor):  # whoever steers it holds it
            self.phi.fill_(notes["phi"])
        else:
            self.phi = float(notes["phi"])

    def _check_asked(self, before: dict[str, float | None] | None, path: Path) -> None:
        """Refuse to go on with another strength than the caller asks for now.

        Older checkpoints do not tell.
        """
        now = self.asked()
        for name, was in (before or {}).items():
            if name in now and now[name] != was:
                here, there = (
                    f"no {name}" if v is None else f"{name} {v:g}" for v in (now[name], was)
                )
                raise InputError(
                    f"Cannot resume {path.parent}: it was written with {there}, and {here} is "
                    "given now. Give the same again (phi may change once training runs), or start "
                    "again."
                )

    # ---------------------------------------------------------------- for subclasses

    @property
    def steered(self) -> bool:
        """Whether φ is not the caller's to set."""
        return False

    def asked(self) -> dict[str, float | None]:
        """What a caller asks for, and has to ask for again at a resume; a φ that others hold as a
        tensor is theirs."""
        return {} if isinstance(self._asked, Tensor) else {"phi": float(self._asked)}

    def note_phi(self, value: float | Tensor) -> None:
        """Called with a φ before it counts; may refuse it."""

    def state_tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps beside φ."""
        return self.regularizer.state()

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """From a checkpoint."""
        self.regularizer.load_state(tensors)

    def remedy(self) -> str:
        """What else helps a penalty that is too weak."""
        return ""


class Penalty(Regularization):
    """Adds φ · Σ_l w_l Σ_i Ω_i (θ_i − θ_i^ν)² to what a Trainer minimizes (Eq. 14-16).

    The penalty does not depend on the batch, so its gradient is added once per optimizer step, in
    closed form, after accumulation and clipping: the same for SFT and DPO and on every rank.
    Several add up, each with its own anchor; training starts at the last one's.

    Args:
        importance: an importance folder, or its name on the hub, `owner/name[@revision]`.
        phi: φ of Eq. 16; 0.01 on normalized importance unless the preset says otherwise, and 1 on
            importance in nats per token. The attribute may be set while training, but for a budget.
        forget_at_most: in place of φ, a budget: nats per token of KL divergence from the base model
            on text that it wrote when the importance was gathered. φ is steered to it while
            training, by what the importance predicts and sixteen measurements, and what is above it
            at the end is taken back by scaling the adapter.
        preset: `default`, `paper` (Eq. 14-16 to the letter) or `official` (the authors' code).
        anchor: `nu` starts from the recorded adapter and holds θ to it; `base` starts from the
            base model and holds θ to that, the recorded adapter serving for its importance only;
            `merged` does the same for a base model whose weights have become others since, by
            merging the recorded adapter or later ones. By default where the importance was
            gathered.
        unheld: `refuse` whatever is trained beside the LoRA matrices (DoRA's magnitudes, biases,
            embeddings, other modules), or `warn` and leave it free: no importance covers it.
        look_every: once in so many optimizer steps also take the gradient of the KL divergence from
            the base model itself, on four rows that it wrote when the importance was gathered, and
            correct by it what the importance pulls. A look is two forward passes and a backward
            pass on these rows; 0 never looks. By default 16, and more often in a run of less than
            64 steps, where that can be done: the importance keeps such rows, the anchor is the base
            model, which predicts text and is not sharded, and the adapter starts there.
        watch: (N, T) tokens of general text, two rows or more, on which a budget measures
            forgetting too; what it finds most of counts. By default what the importance keeps.
        rule: fields of `hlora.core.presets.PenaltyRule` in place of the preset's:
            normalize, layer_weights, softmax_scale, apart.

    Attributes:
        predicted: after training on a budget, the forgetting on that text before anything was taken
            back; as the importance predicts it, where it was gathered without that text.
        left, share: the same after, and what the adapter was scaled by.
        leads: training starts at its θ^ν; `attach` leaves it to the last of several.
        sees: it looks by default; `attach` leaves it to the first of several that can.

    Raises:
        InputError, StoreError: an unusable setting or importance folder.
        MismatchError: when training starts, for a model that the importance does not belong to.
    """

    def __init__(
        self,
        importance: str | Path,
        *,
        phi: float | None = None,
        forget_at_most: float | None = None,
        preset: str | None = None,
        anchor: str | None = None,
        unheld: str = "refuse",
        look_every: int | None = None,
        watch: Tensor | None = None,
        **rule: Any,
    ) -> None:
        super().__init__()
        one_of("unheld", unheld, UNHELD)
        self.unheld = unheld
        one_of("anchor", anchor or "nu", ANCHORS)
        self.rule: PenaltyRule = choose(PENALTY_PRESETS, preset, phi=phi, **rule)
        self.stored = store.load(located(importance))
        held = self.stored.importance
        if held.natural:
            given = [name for name, value in rule.items() if value is not None]
            if given or preset not in (None, "default"):
                raise InputError(
                    f"{given[0] if given else 'a preset'} does not apply to {held.kind} "
                    "importance, which is in nats per token as it is."
                )
            self.rule = replace(self.rule, phi=NATURAL_PHI if phi is None else phi)
        at_base = held.natural and not any(B.any() for B, _ in self.stored.factors.values())
        self.anchor = anchor or ("base" if at_base else "nu")
        if held.of_factors and self.anchor != "nu":
            raise InputError(
                f"{held.kind.capitalize()} importance is of the entries of A and B, so training "
                f"must start at those that it was gathered at: leave out anchor {self.anchor!r}."
            )
        self.forget_at_most, self.watch = forget_at_most, watch
        self._planned: int | None = None
        self._first: tuple[weakref.ref[nn.Module], Anchor] | None = None
        self.leads = self.sees = True
        if forget_at_most is not None:
            check_budget(forget_at_most)
            if phi is not None:
                raise InputError("Give phi or forget_at_most, which steers phi: not both.")
            if not at_base or self.anchor == "nu":
                raise InputError(
                    f"forget_at_most needs importance gathered at the base model, which predicts "
                    f"forgetting: record with --kind blend, not {held.kind}."
                )
        elif watch is not None:
            raise InputError("watch is the text that forget_at_most measures on: give both.")
        if watch is not None:
            check_rows("watch", watch, 2)
        self.regularizer.phi = self._asked = self.rule.phi
        self.look_every = look_every
        if look_every is not None:
            whole("look_every", look_every, 0)
        if not look_every:
            return
        if held.written is None:
            raise InputError(
                "look_every needs text that the base model wrote, and the importance in "
                f"{self.stored.folder} keeps none: gather it with --kind blend."
            )
        if self.anchor == "nu":
            raise InputError(
                "look_every looks at the base model, and training is held to the recorded adapter "
                "(anchor 'nu'): leave one of the two out."
            )

    @property
    def predicted(self) -> float | None:
        return getattr(self.regularizer, "predicted", None)

    @property
    def left(self) -> float:
        return getattr(self.regularizer, "left", 0.0)

    @property
    def share(self) -> float:
        return getattr(self.regularizer, "share", 1.0)

    def _value(self) -> Tensor:
        """Asking takes no look, so training goes on as it would have."""
        of = self.regularizer
        return of.pull(self._groups).R if isinstance(of, Quadratic) else super()._value()

    @property
    def steered(self) -> bool:
        return self.forget_at_most is not None

    def asked(self) -> dict[str, float | None]:
        phi = {} if self.steered else super().asked()
        return {"forget_at_most": self.forget_at_most, **phi}

    def note_phi(self, value: float | Tensor) -> None:
        if self.steered:
            raise InputError(
                "forget_at_most steers phi, so it cannot be set: leave it alone, or give "
                "hlora.Penalty phi in place of forget_at_most."
            )
        if not isinstance(value, Tensor):
            self.rule = replace(self.rule, phi=value)  # refuses what is no φ

    def prepare(self, model: nn.Module, *, fresh: bool) -> list[Group]:
        groups = self._checked(model)
        warn_of_unreached(self.stored.importance)
        anchor = self._find_anchor(model, groups, fresh=fresh)
        phi, of = self.phi, (self.stored.importance, groups, anchor, self.rule)
        if self.forget_at_most is not None:
            if self._planned is None:
                raise InputError(
                    "forget_at_most needs the number of steps, which a Trainer tells: attach it to "
                    "one, or give phi."
                )
            texts = [t for t in (self.stored.importance.watched, self.watch) if t is not None]
            gauges = [Gauge(model, rows) for rows in texts]
            self.regularizer = Budgeted(self.forget_at_most, self._planned, gauges, *of)
        else:
            self.regularizer = Quadratic(*of)
            self.regularizer.phi = phi
        if every := self._looks_every(model, groups):
            self.regularizer.looks = self._looks(model, groups, every)
        return groups

    def _looks(self, model: nn.Module, groups: list[Group], every: int) -> Looks | None:
        """Where nobody asked for looks, a model that cannot be looked at goes without."""
        rows = self.stored.importance.written
        assert rows is not None
        asked = self.look_every is not None or self.forget_at_most is not None
        try:
            gauge = Gauge(model, rows)
            if not asked:
                gauge.pull(torch.arange(1), groups)
        except Exception as error:
            if asked:
                raise
            logger.warning(
                "Training goes without looks at the predictions, as with look_every=0: the model "
                "could not be run on the text that the importance keeps (%s).", one_line(error),
            )  # fmt: skip
            return None
        return Looks(gauge.pull, len(rows), every)

    def _looks_every(self, model: nn.Module, groups: list[Group]) -> int:
        """Steps from one look to the next; 0 never looks."""
        factors = [p.B for g in groups for p in g.pairs]
        if self.look_every:
            refuse_shards("look_every", factors)
        if self.look_every is not None:
            return self.look_every
        of_base = self.anchor != "nu" and not self.needs_state
        able = self.stored.importance.written is not None and of_base and predicts_text(model)
        if not (able and self.sees) or any(map(is_sharded, factors)):
            return 0
        return LOOK_EVERY if self._planned is None else min(LOOK_EVERY, max(1, self._planned // 4))

    def beside(self, model: nn.Module, steps: int) -> list[tuple[str, int, Callable[[], Any]]]:
        """What a run of so many steps does beside its batches: a word, how often, and once."""
        self._planned = steps
        groups = self.prepare(model, fresh=False)
        of, found = self.regularizer, list[tuple[str, int, Callable[[], Any]]]()
        if of.off or not isinstance(of, Quadratic):
            return found
        if looks := of.looks:
            once = partial(looks.pull, in_turn(1, ROWS, looks.rows), groups)
            found.append(("looks", steps // looks.every, once))
        if isinstance(of, Budgeted) and of.gauges:
            found.append(("measuring", min(LOOKS, steps), of.measure))
        return found

    def check(self, model: nn.Module, args: Any) -> None:
        if self.look_every:
            refuse_shards("look_every")
        self._checked(model)
        if self.leads:
            self.start_of(model)

    def _checked(self, model: nn.Module) -> list[Group]:
        """The groups of a model that this importance can hold."""
        pairs = find_pairs(model, self.unheld)
        self.check_pairs(model, pairs)
        self.needs_state = self.anchor != "nu" and not starts_at_base(model)
        asked = "forget_at_most" if self.forget_at_most is not None else "look_every"
        if self.forget_at_most is None and not self.look_every:
            return group(pairs)
        refuse_no_text(model, asked)
        if self.needs_state:
            raise InputError(
                f"{asked} needs an adapter that starts at the base model: this one's "
                "initialization moved it."
            )
        return group(pairs)

    def check_pairs(self, model: nn.Module, pairs: list[Pair]) -> None:
        """Raise MismatchError for a model or LoRA pairs that this importance does not fit."""
        ranks, merged = self.anchor == "nu", self.anchor == "merged"
        self.stored.check(base_of(model, pairs), pairs, ranks=ranks, merged=merged)

    def start_of(self, model: nn.Module) -> str:
        """What the adapter is: `new` or `recorded`, and training starts at θ^ν; or `elsewhere`."""
        if self.anchor != "nu":
            return "elsewhere"
        return self._start_of(model, group(find_pairs(model, self.unheld)))

    def _start_of(self, model: nn.Module, groups: list[Group]) -> str:
        if not any(g.factors()[0].any() for g in groups):
            return "new"
        if all(self._is_recorded(g) for g in groups):
            return "recorded"
        if (init := init_of(model)) is not None:
            raise UnsupportedModelError(
                f"LoraConfig(init_lora_weights={init!r}) begins at B ≠ 0, where a new adapter "
                "cannot be told from a trained one, so it is not moved to θ^ν. Start from that: "
                f"PeftModel.from_pretrained(model, {str(self.stored.folder)!r}, is_trainable=True)."
            )
        return "elsewhere"

    def _is_recorded(self, g: Group) -> bool:
        """Whether a group is at θ^ν. A row of A does not matter where its column of B is zero."""
        (B, A), (B_nu, A_nu) = g.factors(), self._recorded(g)
        acts = B_nu.any(dim=1).unsqueeze(2)
        return torch.equal(B, B_nu) and torch.equal(A * acts, A_nu * acts)

    def _recorded(self, g: Group) -> tuple[Tensor, Tensor]:
        """B (L, m, r) and A (L, r, n) of θ^ν in the rank and scaling that a group has here."""
        factors, noted = self.stored.factors, self.stored.info["pairs"]
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for p in g.pairs:
            B, A = g.layout.split(*(f[None] for f in factors[p.kept_as or p.name]))
            of = zip(p.names, B, A, strict=True)
            found |= {n: resized(b, a, noted[n], g.r, p.s) for n, b, a in of}
        return g.stack_both(found)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):  # type: ignore[no-untyped-def]
        self._planned = state.max_steps
        super().on_train_begin(args, state, control, model=model, optimizer=optimizer)
        if isinstance(self.regularizer, Budgeted):
            self.regularizer.taken = state.global_step

    def _find_anchor(self, model: nn.Module, groups: list[Group], *, fresh: bool) -> Anchor:
        """B and A of the anchor by group; for `nu` a new adapter becomes the recorded one."""
        if self.anchor != "nu":
            here = {g.names: g.factors() for g in groups}
            if not self.needs_state:
                return {names: (torch.zeros_like(B), A) for names, (B, A) in here.items()}
            # The initialization changed θ₀, so the first start and not B = 0 is the base model.
            if self._first is None or self._first[0]() is not model:
                self._first = weakref.ref(model), here
            return self._first[1]
        start = self._start_of(model, groups) if fresh and self.leads else None
        folder, noted = self.stored.folder, self.stored.info["pairs"]
        if start == "new" and (left := take_over(model, read_tensors(folder), noted)):
            logger.warning(
                "The adapter in %s also holds %s, which this one has not: training does not start "
                "just where the general phase ended.", folder, in_short(left),
            )  # fmt: skip
        if start == "elsewhere":
            logger.warning(
                "The adapter is neither new nor the one in %s: training starts where it is and is "
                "pulled towards θ^ν. Start from a new adapter, or from that folder.",
                folder,
            )
        return {g.names: self._recorded(g) for g in groups}

    def identity(self) -> str:
        """The content of the importance, wherever it lies, and the anchor."""
        return f"{self.stored.info['files'][store.TENSORS]['sha256']} {self.anchor}"

    def state_tensors(self) -> dict[str, Tensor]:
        """θ^ν is in its folder; a base that the initialization moved is nowhere else."""
        if self.anchor == "nu":
            return {}
        assert isinstance(self.regularizer, Quadratic)
        found = self.regularizer.state()
        for names, both in self.regularizer.anchor.items():
            found |= unstack(names, both, ("B.{}", "A.{}"))
        return found

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        self.regularizer.load_state(tensors)
        if not self.needs_state:
            return
        assert isinstance(self.regularizer, Quadratic)
        for g in self._groups:
            both = (g.stack(tensors, "B.{}"), g.stack(tensors, "A.{}"))
            self.regularizer.anchor[g.names] = both

    def remedy(self) -> str:
        return "" if self.rule.normalize else ", or normalize the importance (normalize=True)"
