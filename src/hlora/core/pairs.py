"""A target matrix with its two factors: θ = θ₀ + s·B A, B (m × r), A (r × n).

The paper calls it a layer (its Fig. 7 draws q_proj and v_proj of each block). The experts of a
mixture may be kept as one parameter, with one B and one A for all: each is a layer of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlora.core.sharded import is_sharded, local, placed, whole
from hlora.errors import MismatchError, UnsupportedModelError


@dataclass(frozen=True)
class Layout:
    """How B and A, as an optimizer has them, hold their matrices: one each, as they are.

    A subclass has several in each.

    Attributes:
        count: matrices in each.
    """

    count: int = 1

    def split(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """P parameters, (P, ...) each, as (P·count, m, r) and (P·count, r, n)."""
        return B, A

    def join(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """The reverse of `split`."""
        return B, A


@dataclass(frozen=True)
class Pair:
    """One target matrix, or the experts of a mixture that are kept as one parameter.

    Attributes:
        name: the module's path in the base model, such as `model.layers.0.self_attn.q_proj`.
        B: (m, r) parameter; of experts, as `layout` has it.
        A: (r, n) parameter; of experts, as `layout` has it.
        s: LoRA's scaling, α/r or α/√r (rsLoRA), as PEFT holds it.
        weight: the base weight, possibly quantized; of experts (count, m, n).
        layer: the module whose output is that of θ₀ + s·B A together.
        transposed: the base weight is kept as (n, m), as Conv1D does.
        layout: how B and A hold the matrices.
        experts: the names of the matrices, where they are several.
        kept_as: the name in the adapter's file, where it is another.
        theta: θ itself, shaped like `weight`, while `layer` runs; for a layer that is not Linear,
            whose input and output do not give the gradient of θ.
    """

    name: str
    B: nn.Parameter
    A: nn.Parameter
    s: float
    weight: Tensor
    layer: nn.Module
    transposed: bool = False
    layout: Layout = Layout()
    experts: tuple[str, ...] = ()
    kept_as: str | None = None
    theta: Callable[[], Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(m, n, r) of each matrix."""
        return (self.B.shape[0], self.A.shape[1], self.A.shape[0] // self.layout.count)

    @property
    def names(self) -> tuple[str, ...]:
        """Of its matrices, one or several."""
        return self.experts or (self.name,)

    @property
    def target(self) -> str:
        """The last part of the name: `q_proj`."""
        return self.name.rsplit(".", 1)[-1]


class Group:
    """All matrices of one shape on one device, so that each operation runs once for all of them.

    Their factors are stacked when they are asked for: B (L, m, r) and A (L, r, n), in float32
    or, for float64 parameters, in float64. Where processes hold parts of them (FSDP2), all ask
    together, and each is given the whole.
    """

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs
        self.layout = pairs[0].layout
        self.names = tuple(n for p in pairs for n in p.names)
        self.m, self.n, self.r = pairs[0].shape
        self.device = pairs[0].A.device
        self.dtype = torch.promote_types(pairs[0].A.dtype, torch.float32)
        self.trains_A = pairs[0].A.requires_grad
        self.trains_B = pairs[0].B.requires_grad
        self._parameters: tuple[list[Tensor], ...] = [p.B for p in pairs], [p.A for p in pairs]
        self.s = torch.tensor(
            [[[p.s]] for p in pairs for _ in p.names], dtype=self.dtype, device=self.device
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, m, n)."""
        return (len(self.names), self.m, self.n)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """Copies of B (L, m, r) and A (L, r, n) as they are now."""
        B, A = (whole(torch.stack(factors)).to(self.dtype) for factors in self._parameters)
        return self.layout.split(B, A)

    @torch.no_grad()
    def gradients(self) -> tuple[Tensor, Tensor]:
        """Copies of g^B (L, m, r) and g^A (L, r, n); zero where a factor is frozen."""
        gB, gA = (
            whole(torch.stack([torch.zeros_like(f) if f.grad is None else f.grad for f in factors]))
            for factors in self._parameters
        )
        return self.layout.split(gB.to(self.dtype), gA.to(self.dtype))

    @torch.no_grad()
    def add_gradients(self, dB: Tensor, dA: Tensor) -> None:
        """Add (L, m, r) and (L, r, n) to the parameters' gradients."""
        gradients, added = [], []
        for factors, more in zip(self._parameters, self.layout.join(dB, dA), strict=True):
            if factors[0].requires_grad:
                more = more.to(factors[0].dtype)
                if is_sharded(factors[0]):
                    more = local(placed(more, torch.stack(factors)))
                for f, d in zip(factors, more, strict=True):
                    f.grad = torch.zeros_like(f) if f.grad is None else f.grad
                    gradients.append(local(f.grad))
                    added.append(d)
        if gradients:
            torch._foreach_add_(gradients, added)  # one launch for many small matrices

    @torch.no_grad()
    def set_factors(self, B: Tensor, A: Tensor) -> None:
        """Write (L, m, r) and (L, r, n) into the parameters."""
        for pair, b, a in zip(self.pairs, *self.layout.join(B, A), strict=True):
            pair.B.copy_(placed(b, pair.B))
            pair.A.copy_(placed(a, pair.A))

    def stack(self, by_name: Mapping[str, Tensor], key: str = "{}") -> Tensor:
        """Tensors kept by name as one stack in this group's order, on its device.

        `key` makes a name a key: see `unstack`.
        """
        found = [by_name[key.format(n)] for n in self.names]
        return torch.stack([t.to(self.device, self.dtype) for t in found])

    def stack_both(self, by_name: Mapping[str, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The same for two tensors a name."""
        first, second = ({n: by_name[n][i] for n in self.names} for i in (0, 1))
        return self.stack(first), self.stack(second)


def group(pairs: Iterable[Pair]) -> list[Group]:
    """The pairs by shape, layout, device and what is trained."""
    by_shape: dict[tuple, list[Pair]] = {}
    for p in pairs:
        key = (*p.shape, p.layout, p.A.device, p.A.dtype, p.A.requires_grad, p.B.requires_grad)
        by_shape.setdefault(key, []).append(p)
    return [Group(ps) for ps in by_shape.values()]


def check_held(optimizer: Any, groups: Iterable[Group]) -> None:
    """Refuse an optimizer that does not train all that the groups train.

    Raises:
        UnsupportedModelError: it lacks a factor.
    """
    held = {id(p) for s in optimizer.param_groups for p in s["params"]}
    for pair in (p for g in groups for p in g.pairs):
        if any(f.requires_grad and id(f) not in held for f in (pair.B, pair.A)):
            raise UnsupportedModelError(
                f"The optimizer does not hold the LoRA matrices of {pair.name}: make it after the "
                "adapter, from all parameters that are trained."
            )


def digest(groups: Iterable[Group]) -> str:
    """Of the factors' bits: which weights a state beside a checkpoint belongs to.

    Every process calls it.
    """
    found = hashlib.sha256()
    for factor in (f for g in groups for p in g.pairs for f in (p.B, p.A)):
        found.update(whole(factor.detach()).cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def unstack(
    names: tuple[str, ...], stacked: Iterable[Tensor], keys: Iterable[str] = ("{}",)
) -> dict[str, Tensor]:
    """Stacks (L, ...) of a group as rows by name; `keys` gives each stack's key, `{}` the name."""
    return {
        key.format(name): row
        for key, stack in zip(keys, stacked, strict=True)
        for name, row in zip(names, stack, strict=True)
    }


def resized(
    B: Tensor, A: Tensor, noted: Mapping[str, float], r: int, s: float
) -> tuple[Tensor, Tensor]:
    """The same s·B·A at a rank r that is no smaller, and another s: further columns of B are zero.

    Args:
        noted: `r` and `s` of B (..., m, r) and A (..., r, n), as `describe` gives them.
    """
    more = (0, r - A.shape[-2])
    return F.pad(B * (noted["s"] / s), more), F.pad(A, (0, 0, *more))


def describe(pairs: Iterable[Pair]) -> dict[str, dict[str, float]]:
    """What an importance folder notes of each matrix: m, n, r and s."""
    return {
        name: {"m": p.shape[0], "n": p.shape[1], "r": p.shape[2], "s": p.s}
        for p in pairs
        for name in p.names
    }


def check_same(
    pairs: Iterable[Pair], noted: dict[str, dict[str, float]], where: str, *, ranks: bool
) -> None:
    """Refuse pairs that are not those of an importance folder.

    Args:
        noted: `describe` of the model that was recorded.
        where: the folder, for the message.
        ranks: also refuse a rank that is smaller, in which the recorded adapter has no room. The
            importance itself does not depend on r and s.

    Raises:
        MismatchError: names the two values that differ.
    """
    here = describe(pairs)
    if here.keys() != noted.keys():
        mine, theirs = targets_of(here), targets_of(noted)
        if mine == theirs:
            mine, theirs = f"{len(here)} of them", f"{len(noted)} of them"
        raise MismatchError(
            f"The LoRA targets differ: this model has {mine}, {where} was recorded on {theirs}: "
            "give --targets (LoraConfig's target_modules) as there."
        )
    for name, values in here.items():
        for key, word in (("m", "output size"), ("n", "input size")):
            if values[key] != noted[name][key]:
                raise MismatchError(
                    f"The {word} of {name} differs: {values[key]:g} in this model, "
                    f"{noted[name][key]:g} in {where}."
                )
        if ranks and values["r"] < noted[name]["r"]:
            raise MismatchError(
                f"The rank of {name} is {values['r']:g} and training starts from the adapter in "
                f"{where}, whose rank is {noted[name]['r']:g}: give that or a larger one, or merge "
                "that adapter into the base model first (anchor='merged')."
            )


def targets_of(names: Iterable[str]) -> str:
    """The last parts of the names, each once: `q_proj, v_proj`."""
    return ", ".join(sorted({n.rsplit(".", 1)[-1] for n in names}))


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of the base model by name, without any adapter's.

    Raises:
        UnsupportedModelError: quantized weights, which have no gradient.
    """
    found = {n: p for n, p in model.named_parameters() if "lora_" not in n}
    for name, p in found.items():
        if not p.is_floating_point():
            raise UnsupportedModelError(
                f"{name} is quantized and has no gradient: load the model in bf16 or fp32."
            )
    return found
