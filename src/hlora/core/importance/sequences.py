"""What the kinds gathered at the base share: gradients of whole sequences in a basis per matrix.

For one sequence of T predicted tokens and one matrix the gradient g of log p(y|x), y sampled from
the model, is kept as `projected` says. The KL divergence from the base model by a change D of all
matrices is then about ½ E[(Σ_l ⟨g_l, D_l⟩)²]/T nats per token.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from math import prod
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from hlora.core import linearcodes
from hlora.core.importance import Changes, Groups, Importance, Shapes
from hlora.core.importance.projected import COLUMNS, RANK, Projected, project
from hlora.core.lowrank import LowRank, Weighed
from hlora.core.pairs import Group, Pair
from hlora.errors import InputError

SEQUENCES = 128
"""Rows that a gathering takes unless told otherwise."""
TOKENS, WATCHED, WRITTEN = "tokens", "watched", "written"
"""The tensors that hold T, text to measure forgetting on, and text to look at while training."""
TEXTS = {WATCHED: 2, WRITTEN: 1}
"""How many rows they have at least: forgetting is measured on two halves."""

Self = TypeVar("Self", bound="Sequences")


class Sequences(Importance):
    """R in nats per token, from `Projected` gradients. Bases and cores are kept in int8."""

    trained = False
    natural = True
    own_text = True
    parts: ClassVar[tuple[str, ...]]
    """What is stored of each layer: see `sizes`."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors
        self._tokens = int(tensors[TOKENS])
        self.watched, self.written = (tensors.get(text) for text in TEXTS)

    @classmethod
    def from_tensors(cls: type[Self], tensors: dict[str, Tensor]) -> Self:
        wanted = {TOKENS, *(f"{n}.{p}" for n in _names(tensors) for p in cls.parts)}
        if wrong := (tensors.keys() - {*TEXTS}) ^ wanted:
            raise ValueError(f"{min(wrong)} is missing or unexpected")
        return cls(tensors)

    def watching(self, watched: Tensor, written: Tensor | None = None) -> Sequences:
        """The same, with text to measure forgetting on, and text to look at while training."""
        texts = zip(TEXTS, (watched, written), strict=True)
        kept = {name: rows.int() for name, rows in texts if rows is not None}
        return type(self)({**self._tensors, **kept})

    def tensors(self) -> dict[str, Tensor]:
        return self._tensors

    @property
    def names(self) -> set[str]:
        return _names(self._tensors)

    @classmethod
    def rows_needed(cls, options: dict[str, Any]) -> int:
        if options.get("labels") or options.get("method"):
            raise InputError(
                f"--fisher-labels and --fisher-method belong to --kind fisher, not {cls.kind}."
            )
        return options.get("sequences") or SEQUENCES

    @classmethod
    def gather(
        cls: type[Self], model: nn.Module, pairs: list[Pair], rows: Tensor, **options: Any
    ) -> tuple[Self, dict[str, Any]]:
        """At the model's present weights; the options are those of `project`.

        Raises:
            InputError: less than two rows.
        """
        if len(rows) < 2:
            raise InputError(
                f"{cls.kind.capitalize()} importance needs two sequences or more, not {len(rows)}: "
                "give more text, or a larger --sequences."
            )
        found = project(model, pairs, rows, **options)
        cut = torch.stack([(of.shares < 1).cpu() for of in found.values()])
        summary = {
            "sequences": len(rows), "tokens": rows.shape[1],
            "bounded": int(cut.any(0).sum()), "bounded_at": int(cut.any(1).sum()),
        }  # fmt: skip
        return cls.of(found, rows.shape[1] - 1), summary

    @classmethod
    def of(cls: type[Self], found: dict[str, Projected], tokens: int) -> Self:
        """What this kind keeps of projected gradients of so many predicted tokens."""
        tensors = {TOKENS: torch.tensor([tokens])}
        for name, of in found.items():
            U, V = linearcodes.encode(of.U, 0), linearcodes.encode(of.V, 0)
            kept = {
                "U": U[0], "U_scale": U[1], "V": V[0], "V_scale": V[1],
                **cls.keep(of, linearcodes.decode(*U).to(of.U), linearcodes.decode(*V).to(of.V)),
            }  # fmt: skip
            tensors |= {f"{name}.{part}": _single(kept[part]) for part in cls.parts}
        return cls(tensors)

    @classmethod
    @abstractmethod
    def keep(cls, of: Projected, U: Tensor, V: Tensor) -> dict[str, Tensor]:
        """The parts beside the bases; U and V are those that will be read back."""

    @staticmethod
    def describe(summary: dict[str, Any]) -> list[str]:
        said = [
            f"Gradients of {summary['sequences']} sequences of {summary['tokens']} tokens on "
            f"{summary['layers']} layers, gathered without training."
        ]
        if bounded := summary.get("bounded"):
            one = bounded == 1
            said.append(
                f"{bounded} of them, with {'a gradient' if one else 'gradients'} far larger than "
                f"the others', {'is' if one else 'are'} scaled down at {summary['bounded_at']} of "
                "the layers."
            )
        return said

    def check(self) -> None:
        for name, least in TEXTS.items():
            rows = self._tensors.get(name)
            if rows is not None and not (
                rows.dim() == 2 and len(rows) >= least and rows.shape[1] >= 2
                and not rows.is_floating_point() and int(rows.min()) >= 0
            ):  # fmt: skip
                raise ValueError(f"{name} does not hold {least} or more rows of tokens")
        for name, t in self._tensors.items():
            if t.is_floating_point() and not t.isfinite().all():
                raise ValueError(f"{name} is not finite")

    @classmethod
    def sizes(cls, m: int, n: int, sequences: int) -> dict[str, tuple[tuple[int, ...], int]]:
        """Shape and bytes an element of what can be kept of an (m, n) matrix, by part."""
        p, q = min(m, RANK), min(n, RANK)
        return {
            "U": ((m, p), 1), "U_scale": ((1, p), 4), "V": ((n, q), 1), "V_scale": ((1, q), 4),
            "left": ((p, p), 4), "right": ((q, q), 4), "rows": ((m,), 4), "columns": ((n,), 4),
            "cores": ((sequences, m, min(q, COLUMNS)), 1), "cores_scale": ((sequences, 1, 1), 4),
        }  # fmt: skip

    @classmethod
    def bytes(cls, shapes: Shapes, storage: str = "fp32", sequences: int = 0) -> int:
        return sum(
            prod(shape) * width
            for m, n, _ in shapes
            for part, (shape, width) in cls.sizes(m, n, sequences or SEQUENCES).items()
            if part in cls.parts
        )

    def stack(self, group: Group, part: str) -> Tensor:
        """A part of all layers of a group, decoded, (L, ...)."""
        stacked = group.stack(self._tensors, "{}." + part)
        if f"{group.names[0]}.{part}_scale" in self._tensors:
            stacked *= group.stack(self._tensors, "{}." + part + "_scale")
        return stacked

    def forgetting(self, groups: Groups, changes: Changes) -> Tensor:
        nothing = [c.P[:, :, :1] for c in changes], [c.Q[:, :1] for c in changes]
        return total_of(self.pulls(groups, changes, *nothing)[0])

    def pull(self, group: Group, change: LowRank, left: Tensor, right: Tensor) -> Weighed:
        return self.pulls([group], [change], [left], [right])[0][0]


def total_of(pulled: list[Weighed]) -> Tensor:
    """R of all layers, a scalar."""
    values = [values for values, _, _ in pulled]
    return torch.stack([v.sum().to(values[0].device) for v in values]).sum()


def _single(part: Tensor) -> Tensor:
    return part.float() if part.is_floating_point() else part


def _names(tensors: Iterable[str]) -> set[str]:
    return {key.removesuffix(".V") for key in tensors if key.endswith(".V")}
