"""Where PEFT ends: the LoRA pairs of a model, and the only code that knows PEFT's insides.

A pair is one target matrix with its two factors: θ = θ₀ + s·B A, B (m × r), A (r × n). The paper
calls it a layer (its Fig. 7 draws q_proj and v_proj of each block).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from hlora.errors import MismatchError, StoreError, UnsupportedModelError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")

_REFUSED_SETTINGS = {
    "use_dora": "DoRA also trains a magnitude for each row",
    "lora_bias": "a bias beside B is not part of B·A",
    "modules_to_save": "these modules are trained whole",
    "trainable_token_indices": "these embeddings are trained whole",
    "target_parameters": "LoRA on bare parameters has no pair of matrices per module",
    "alora_invocation_tokens": "an adapter that acts on some tokens only is not one change of θ",
    "layer_replication": "replicated layers share one θ₀",
}

_MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that take B₀A₀ out of the base weights, so that B = 0 is not the base model."""


@dataclass(frozen=True)
class Pair:
    """One target matrix.

    Attributes:
        name: the module's path in the base model, such as `model.layers.0.self_attn.q_proj`.
        B: (m, r) parameter.
        A: (r, n) parameter.
        s: LoRA's scaling, α/r or α/√r (rsLoRA), as PEFT holds it.
        weight: the base weight, possibly quantized.
    """

    name: str
    B: nn.Parameter
    A: nn.Parameter
    s: float
    weight: Tensor

    @property
    def shape(self) -> tuple[int, int, int]:
        """(m, n, r)."""
        return (self.B.shape[0], self.A.shape[1], self.A.shape[0])

    @property
    def target(self) -> str:
        """The last part of the name: `q_proj`."""
        return self.name.rsplit(".", 1)[-1]


class Group:
    """All pairs of one shape on one device, so that each operation runs once for all of them.

    Their factors are stacked when they are asked for: B (L, m, r) and A (L, r, n), in float32
    or, for float64 parameters, in float64.
    """

    def __init__(self, pairs: list[Pair]) -> None:
        self.pairs = pairs
        self.names = tuple(p.name for p in pairs)
        self.m, self.n, self.r = pairs[0].shape
        self.device = pairs[0].A.device
        self.dtype = torch.promote_types(pairs[0].A.dtype, torch.float32)
        self.trains_A = pairs[0].A.requires_grad
        self.trains_B = pairs[0].B.requires_grad
        self.s = torch.tensor([p.s for p in pairs], dtype=self.dtype, device=self.device).reshape(
            -1, 1, 1
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(L, m, n)."""
        return (len(self.pairs), self.m, self.n)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """Copies of B (L, m, r) and A (L, r, n) as they are now."""
        return (
            torch.stack([p.B for p in self.pairs]).to(self.dtype),
            torch.stack([p.A for p in self.pairs]).to(self.dtype),
        )

    @torch.no_grad()
    def gradients(self) -> tuple[Tensor, Tensor]:
        """Copies of g^B (L, m, r) and g^A (L, r, n); zero where a factor is frozen.

        A step that the fp16 scaler is about to skip has infinite gradients. They become zero
        here, since infinity times no movement is not a number.
        """
        gB, gA = (
            torch.stack([torch.zeros_like(f) if f.grad is None else f.grad for f in factors])
            for factors in ([p.B for p in self.pairs], [p.A for p in self.pairs])
        )
        return tuple(  # type: ignore[return-value]
            g.to(self.dtype).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0) for g in (gB, gA)
        )

    @torch.no_grad()
    def add_gradients(self, dB: Tensor, dA: Tensor) -> None:
        """Add (L, m, r) and (L, r, n) to the parameters' gradients."""
        gradients, added = [], []
        for trained, factors, more in (
            (self.trains_B, [p.B for p in self.pairs], dB),
            (self.trains_A, [p.A for p in self.pairs], dA),
        ):
            if not trained:
                continue
            for f, d in zip(factors, more.to(factors[0].dtype).unbind(0), strict=True):
                if f.grad is None:
                    f.grad = d.clone()
                else:
                    gradients.append(f.grad)
                    added.append(d)
        if gradients:
            torch._foreach_add_(gradients, added)  # one launch for many small matrices

    @torch.no_grad()
    def set_factors(self, B: Tensor, A: Tensor) -> None:
        """Write (L, m, r) and (L, r, n) into the parameters."""
        for pair, b, a in zip(self.pairs, B, A, strict=True):
            pair.B.copy_(b)
            pair.A.copy_(a)

    def stack(self, by_name: dict[str, Tensor]) -> Tensor:
        """Tensors kept by name as one stack in this group's order, on its device."""
        return torch.stack([by_name[n].to(self.device, self.dtype) for n in self.names])


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside (Distributed)DataParallel and torch.compile."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(
            model, (nn.parallel.DistributedDataParallel, nn.DataParallel)
        ):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def adapter_config(model: nn.Module) -> tuple[str, Any]:
    """The one active adapter's name and its LoraConfig.

    Raises:
        UnsupportedModelError: there is no LoRA adapter, or more than one is active.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        raise UnsupportedModelError(
            "The model has no LoRA adapter: wrap it with peft.get_peft_model(model, "
            "LoraConfig(...)), or give SFTTrainer a peft_config."
        )
    active = getattr(model, "active_adapters", None)
    if callable(active):
        active = active()
    names = [active] if isinstance(active, str) else list(active or configs)
    if len(names) != 1:
        raise UnsupportedModelError(
            f"Several adapters are active ({', '.join(names)}): θ would be a sum of them. "
            "Activate one with model.set_adapter(name)."
        )
    config = configs[names[0]]
    kind = getattr(config.peft_type, "value", str(config.peft_type))
    if kind != "LORA":
        raise UnsupportedModelError(
            f"The active adapter is {kind}, not LORA: only LoRA's θ = θ₀ + s·B·A is supported."
        )
    return names[0], config


def find_pairs(model: nn.Module) -> list[Pair]:
    """The LoRA pairs of the active adapter, in the model's order.

    Raises:
        UnsupportedModelError: something else than B and A is trained, or a setting of the
            adapter makes θ something else than θ₀ + s·B·A. The message names the setting.
    """
    from peft.tuners.lora import LoraLayer

    model = unwrap(model)
    adapter, config = adapter_config(model)
    for setting, why in _REFUSED_SETTINGS.items():
        if getattr(config, setting, None):
            raise UnsupportedModelError(f"LoraConfig({setting}=...) is not supported: {why}.")
    if getattr(config, "bias", "none") != "none":
        raise UnsupportedModelError(
            f"LoraConfig(bias={config.bias!r}) is not supported: a trained bias is not part of "
            "B·A. Use bias='none'."
        )
    pairs: list[Pair] = []
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = path.removeprefix("base_model.model.")
        if adapter in module.lora_embedding_A:
            raise UnsupportedModelError(
                f"LoRA on the embedding {name} is not supported: take it out of target_modules."
            )
        if adapter not in module.lora_A:
            continue
        variant = getattr(module, "lora_variant", {}).get(adapter)
        if variant is not None:
            raise UnsupportedModelError(
                f"The LoRA variant {type(variant).__name__} on {name} is not supported: its "
                "change of the weight is not s·B·A."
            )
        if module.merged:
            raise UnsupportedModelError(
                f"The adapter is merged into {name}: call model.unmerge_adapter() first."
            )
        A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        _check_factors(name, A, B)
        pairs.append(
            Pair(name, B, A, float(module.scaling[adapter]), module.get_base_layer().weight)
        )
    if not pairs:
        raise UnsupportedModelError(f"Adapter {adapter!r} has no LoRA matrices in this model.")
    _check_nothing_else_is_trained(model, pairs)
    return pairs


def lora_layers(model: nn.Module, pairs: Iterable[Pair]) -> dict[str, nn.Module]:
    """The module of each pair, whose output is that of θ₀ + s·B A together."""
    model = unwrap(model)
    return {p.name: model.get_submodule(f"base_model.model.{p.name}") for p in pairs}


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters of the base model by name, without any adapter's.

    Raises:
        UnsupportedModelError: quantized weights, which have no gradient.
    """
    found = {n: p for n, p in unwrap(model).named_parameters() if "lora_" not in n}
    for name, p in found.items():
        if not p.is_floating_point():
            raise UnsupportedModelError(
                f"{name} is quantized and has no gradient: load the model in bf16 or fp32."
            )
    return found


def is_transposed(layer: nn.Module) -> bool:
    """Whether a layer keeps its base weight as (n, m): Conv1D does."""
    return bool(getattr(layer, "fan_in_fan_out", False))


def _check_factors(name: str, A: Tensor, B: Tensor) -> None:
    if type(A).__name__ == "DTensor" or A.ndim == 1 or B.ndim == 1:
        raise UnsupportedModelError(
            f"The LoRA matrices of {name} are sharded (FSDP): train with DistributedDataParallel, "
            "or on one process."
        )
    if A.ndim != 2 or B.ndim != 2:
        raise UnsupportedModelError(
            f"LoRA on {name} is a convolution's: only Linear and Conv1D targets are supported."
        )


def _check_nothing_else_is_trained(model: nn.Module, pairs: list[Pair]) -> None:
    ours = {id(f) for p in pairs for f in (p.A, p.B)}
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    if others:
        raise UnsupportedModelError(
            f"{len(others)} trained parameters are not LoRA's, the first is {others[0]}: freeze "
            "them, since the importance covers B·A only."
        )
    if not trained:
        raise UnsupportedModelError(
            "Nothing is trainable: load the adapter with PeftModel.from_pretrained(..., "
            "is_trainable=True)."
        )


def group(pairs: Iterable[Pair]) -> list[Group]:
    """The pairs by shape, device and what is trained."""
    by_shape: dict[tuple, list[Pair]] = {}
    for p in pairs:
        key = (*p.shape, p.A.device, p.A.dtype, p.A.requires_grad, p.B.requires_grad)
        by_shape.setdefault(key, []).append(p)
    return [Group(ps) for ps in by_shape.values()]


def starts_at_base(model: nn.Module) -> bool:
    """Whether B·A = 0 means the base model: not so where the initialization changed θ₀."""
    init = adapter_config(unwrap(model))[1].init_lora_weights
    return not (isinstance(init, str) and init.lower().startswith(_MUTATING_INITS))


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the active adapter in PEFT's own format, so that it loads without hlora."""
    model = unwrap(model)
    adapter, _ = adapter_config(model)
    model.save_pretrained(  # type: ignore[operator]
        str(folder),
        selected_adapters=[adapter],
        safe_serialization=True,
        save_embedding_layers=False,
    )
    if not (folder / ADAPTER_FILES[0]).exists():  # PEFT puts named adapters in their own folder
        for path in sorted((folder / adapter).iterdir()):
            path.rename(folder / path.name)
        (folder / adapter).rmdir()


def read_adapter(folder: Path) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """The adapter in a folder: its config and (B, A) by the pair's name.

    Raises:
        StoreError: a file is missing or damaged.
    """
    for file in ADAPTER_FILES:
        if not (folder / file).is_file():
            raise StoreError(f"{folder} holds no LoRA adapter: {file} is missing.")
    try:
        config = json.loads((folder / ADAPTER_FILES[0]).read_text("utf-8"))
        tensors = load_file(folder / ADAPTER_FILES[1])
    except (ValueError, SafetensorError, OSError) as error:
        raise StoreError(f"The adapter in {folder} cannot be read ({error}).") from None
    factors: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        for which in ("lora_A", "lora_B"):
            if key.endswith(f".{which}.weight"):
                name = key.removeprefix("base_model.model.").removesuffix(f".{which}.weight")
                factors.setdefault(name, {})[which] = value
    broken = [n for n, f in factors.items() if len(f) != 2]
    if broken or not factors:
        raise StoreError(f"{folder / ADAPTER_FILES[1]} lacks LoRA matrices ({broken or 'all'}).")
    return config, {n: (f["lora_B"], f["lora_A"]) for n, f in factors.items()}


def describe(pairs: Iterable[Pair]) -> dict[str, dict[str, float]]:
    """What an importance folder notes of each pair: m, n, r and s."""
    return {p.name: {"m": p.shape[0], "n": p.shape[1], "r": p.shape[2], "s": p.s} for p in pairs}


def check_same(
    pairs: Iterable[Pair], noted: dict[str, dict[str, float]], where: str, *, ranks: bool
) -> None:
    """Refuse pairs that are not those of an importance folder.

    Args:
        pairs: the model's.
        noted: `describe` of the model that was recorded.
        where: the folder, for the message.
        ranks: also compare r and s. The importance itself does not depend on them.

    Raises:
        MismatchError: names the two values that differ.
    """
    here = describe(pairs)
    if here.keys() != noted.keys():
        mine, theirs = _targets(here), _targets(noted)
        if mine == theirs:
            mine, theirs = f"{len(here)} of them", f"{len(noted)} of them"
        raise MismatchError(
            f"The LoRA targets differ: this model has {mine}, {where} was recorded on {theirs}."
        )
    words = {"m": "output size", "n": "input size", "r": "rank", "s": "scaling (alpha/rank)"}
    for name, values in here.items():
        for key in ("m", "n", "r", "s") if ranks else ("m", "n"):
            if abs(values[key] - noted[name][key]) > 1e-6 * abs(noted[name][key]):
                raise MismatchError(
                    f"The {words[key]} of {name} differs: {values[key]:g} in this model, "
                    f"{noted[name][key]:g} in {where}."
                )


def _targets(names: Iterable[str]) -> str:
    return ", ".join(sorted({n.rsplit(".", 1)[-1] for n in names}))
