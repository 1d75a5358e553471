"""What is remembered of the general task: the contract of a kind. One file a kind.

How it is gathered, checked, sized, converted, described and stored is its own affair. A kind is
registered in `hlora.core.kinds`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hlora.core.lowrank import LowRank, Weighed
from hlora.core.pairs import Group, Pair, unstack
from hlora.core.presets import RecordRule
from hlora.errors import InputError, one_of

Groups = Sequence[Group]
Changes = Sequence[LowRank]
Tensors = Sequence[Tensor]
Shapes = Iterable[tuple[int, int, int]]
Pulled = tuple[list[Weighed], Tensor | None]


class Importance(ABC):
    """Ω of every layer (target matrix), and everything that depends on its form.

    Attributes:
        kind: its name in `hlora.core.kinds`.
        trained: gathered along the training path (it has a `trace`); otherwise by passes over text
            at fixed weights (it has a `gather`).
        storages: the forms that it can be written in.
        conversions: what `converted` takes.
        natural: R is in nats per token as it is: neither Eq. 15's layer weights nor a normalization
            apply.
        own_text: gathered from text that the model writes, half of it where text is given.
        of_factors: of the entries of A and B: training must start at those that were looked at.
        watched: (N, T) tokens of such text that was not gathered from, to measure forgetting on;
            None where there are none.
        written: (N, T) tokens of such text to look at while training, or None.
    """

    kind: ClassVar[str]
    trained: ClassVar[bool] = True
    storages: ClassVar[tuple[str, ...]] = ("fp32",)
    conversions: ClassVar[tuple[str, ...]] = ()
    natural: ClassVar[bool] = False
    own_text: ClassVar[bool] = False
    of_factors: ClassVar[bool] = False
    watched: Tensor | None = None
    written: Tensor | None = None

    # ---------------------------------------------------------------- gathered

    @classmethod
    def check_settings(cls, rule: RecordRule, storage: str) -> None:
        """Raise InputError for settings that this kind cannot be gathered or stored with."""
        one_of(f"storage of {cls.kind} importance", storage, cls.storages)

    @classmethod
    def trace(cls, groups: list[Group], earlier: Importance | None) -> Trace:
        """If `trained`: what gathers it, on top of an earlier task's importance if given."""
        raise NotImplementedError

    @classmethod
    def rows_needed(cls, options: dict[str, Any]) -> int:
        """How many rows of text `gather` takes; 0 for all."""
        return 0

    @classmethod
    def gather(
        cls, model: nn.Module, pairs: list[Pair], rows: Tensor, **options: Any
    ) -> tuple[Importance, dict[str, Any]]:
        """If not `trained`: it and a summary, from passes over (N, T) tokens at fixed weights.

        Args:
            options: those of `passes.backward_passes`, and the kind's own.
        """
        raise NotImplementedError

    # ---------------------------------------------------------------- checked, sized, converted

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Importance:
        """From what `tensors` gave. Raises ValueError where they do not fit together."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """By names that begin with the layer's, for the store."""

    @abstractmethod
    def check(self) -> None:
        """Raise ValueError, naming the layer, for values that no recording can have made."""

    @classmethod
    @abstractmethod
    def bytes(cls, shapes: Shapes, storage: str = "fp32", sequences: int = 0) -> int:
        """Size for matrices of the shapes (m, n, r), in the domain phase and on disk."""

    def stored_as(self, storage: str) -> Importance:
        """In one of `storages`."""
        return self

    def converted(self, to: str) -> Importance:
        """In another form, one of `conversions`.

        Raises:
            InputError: it cannot be made from this kind.
        """
        raise InputError(
            f"{self.kind.capitalize()} importance cannot be converted to {to!r}; it can become "
            f"{', '.join((*self.conversions, 'ones'))}."
        )

    @staticmethod
    def describe(summary: dict[str, Any]) -> list[str]:
        """How it was gathered, in a line or two for people."""
        if "negative_share" not in summary:
            return [f"Importance of {summary['layers']} layers, gathered without training."]
        negative = summary["negative_share"]
        return [
            f"Recorded {summary['steps']} steps on {summary['layers']} layers.",
            "negative ω: "
            + ("clamped after each step" if negative is None else f"{negative:.1%} (set to zero)")
            + f", Σω: {summary['path_integral']:.4g}",
        ]

    # ---------------------------------------------------------------- used

    @property
    @abstractmethod
    def names(self) -> set[str]:
        """The layers."""

    @abstractmethod
    def arrange(self, groups: Iterable[Group]) -> None:
        """Move to the groups' devices, stacked in their order."""

    @abstractmethod
    def norms(self) -> dict[str, float]:
        """‖Ω_l‖₂ by layer, for Eq. 15."""

    @abstractmethod
    def totals(self) -> dict[str, float]:
        """Σ_i Ω_i by layer; of the diagonal, where Ω is a full matrix."""

    def elements(self, groups: Iterable[Group]) -> int:
        """How many Ω_i there are, for their mean."""
        return sum(len(g.names) * g.m * g.n for g in groups)

    @abstractmethod
    def pull(self, group: Group, change: LowRank, left: Tensor, right: Tensor) -> Weighed:
        """A change of a group weighed by Ω: R_l (Eq. 14) and half its gradient."""

    def pulls(self, groups: Groups, changes: Changes, lefts: Tensors, rights: Tensors) -> Pulled:
        """`pull` of all groups, and the predicted forgetting where the kind is `natural`.

        A kind that couples layers overrides this one.
        """
        pulled = [self.pull(*of) for of in zip(groups, changes, lefts, rights, strict=True)]
        return pulled, None

    def forgetting(self, groups: Groups, changes: Changes) -> Tensor:
        """If `natural`: the predicted KL divergence from the base model, nats per token."""
        raise NotImplementedError

    def coupling(self, groups: Groups, changes: Changes) -> Tensor:
        """If `natural`: Q (L, L), so that αᵀQα is the forgetting of the changes α_l D_l."""
        raise NotImplementedError


Running = dict[tuple[str, ...], tuple[Tensor, ...]]
"""Stacks (L, ...) by the names of a group."""


class Trace(ABC):
    """Gathers ω along the training path and consolidates it into Ω (Eq. 12, 13).

    Attributes:
        parts: what follows a layer's name in a checkpoint, for each stack of a group.
    """

    parts: ClassVar[tuple[str, ...]] = ("",)

    def __init__(self) -> None:
        self.omega: Running = {}
        self.Omega: Running = {}

    @abstractmethod
    def add(self, group: Group, gradient: LowRank, step: LowRank, *, clamp: bool) -> None:
        """One optimizer step (Eq. 12); `clamp` sets negative ω to zero after it."""

    def total(self, group: Group) -> Tensor:
        """Σ_i ω_i over the group, a float64 scalar: an estimate of the loss drop (Eq. 3)."""
        return self.omega[group.names][0].sum(dtype=torch.float64)

    @abstractmethod
    def consolidate(self, group: Group, delta: LowRank, xi: Tensor, *, last: bool) -> Tensor:
        """Add max(ω, 0)/(Δ² + ξ) to Ω and reset ω (Eq. 13).

        Args:
            last: ω is not needed any more.

        Returns:
            The number of negative ω.
        """

    @abstractmethod
    def importance(self) -> Importance:
        """Ω as float32, for the store."""

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint: ω and Ω by `omega.NAME` and `Omega.NAME`."""
        found: dict[str, Tensor] = {}
        for running, keys in self._running():
            for names, stacks in running.items():
                found |= unstack(names, stacks, keys)
        return found

    def load_state(self, groups: Iterable[Group], state: dict[str, Tensor]) -> None:
        """From a checkpoint."""
        for group in groups:
            for running, keys in self._running():
                if keys[0].format(group.names[0]) in state:
                    running[group.names] = tuple(group.stack(state, key) for key in keys)

    def _running(self) -> list[tuple[Running, list[str]]]:
        both = (("omega", self.omega), ("Omega", self.Omega))
        return [(of, [f"{which}.{{}}{part}" for part in self.parts]) for which, of in both]
