"""Where PEFT ends: the LoRA pairs of a model, and the only code that knows PEFT's insides."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hlora.core.adapter_file import ADAPTER_FILES
from hlora.core.pairs import Layout, Pair, resized
from hlora.core.sharded import is_sharded, placed, whole
from hlora.errors import DivergedError, UnsupportedModelError, one_line, one_of
from hlora.hf.distributed import weights_to_come

UNHELD = ("refuse", "warn")
"""What to do about trained parameters that no importance covers."""

_UNHELD_SETTINGS = {
    "use_dora": "DoRA also trains a magnitude for each row",
    "lora_bias": "a bias beside B is not part of B·A",
    "modules_to_save": "these modules are trained whole",
    "trainable_token_indices": "these embeddings are trained whole",
}
_REFUSED_SETTINGS = {
    "alora_invocation_tokens": "an adapter that acts on some tokens only is not one change of θ",
    "layer_replication": "replicated layers share one θ₀",
}
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""The new heads that PEFT adds to modules_to_save itself, by task_type."""

_FINGERPRINT_ENTRIES = 64
_CONFIG_KEYS = {
    "model_type": ("model_type",),
    "vocabulary size": ("vocab_size",),
    "hidden size": ("hidden_size", "n_embd"),
    "number of layers": ("num_hidden_layers", "n_layer"),
}

Noted = Mapping[str, Mapping[str, float]]

_MUTATING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that take B₀A₀ out of the base weights, so that B = 0 is not the base model."""


@contextlib.contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """The base model's predictions inside, also of a model that transformers gave its adapter.

    What was frozen stays so: PEFT thaws a whole adapter when it comes back.
    """
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        if hasattr(model, "disable_adapter"):
            with model.disable_adapter():
                yield
        else:
            model.disable_adapters()
            try:
                yield
            finally:
                model.enable_adapters()
    finally:
        for p, trained in before:
            if p.requires_grad != trained:
                p.requires_grad_(trained)


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
    name, config = active_adapter(model)
    kind = kind_of(config)
    if kind != "LORA":
        raise UnsupportedModelError(
            f"The active adapter is {kind}, not LORA: only LoRA's θ = θ₀ + s·B·A is supported."
        )
    return name, config


def kind_of(config: Any) -> str:
    """`LORA`, `OFT`, ..."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def active_adapter(model: nn.Module) -> tuple[str, Any]:
    """The same of any kind."""
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
    return names[0], configs[names[0]]


def find_pairs(model: nn.Module, unheld: str = "refuse") -> list[Pair]:
    """The LoRA pairs of the active adapter, in the model's order.

    Args:
        unheld: `refuse` whatever is trained beside them, but for a new head of a classifier; or
            `warn`: leave it free. `unheld_names` names it.

    Raises:
        UnsupportedModelError: something else than B and A is trained, or a setting of the
            adapter makes θ something else than θ₀ + s·B·A. The message names the setting.
    """
    from peft.tuners.lora import LoraLayer

    one_of("unheld", unheld, UNHELD)
    model = unwrap(model)
    adapter, config = adapter_config(model)
    _check_settings(config, unheld)
    for module in model.modules():  # a forward pass without a backward leaves FSDP2 gathered
        if callable(reshard := getattr(module, "reshard", None)):
            reshard()
    pairs: list[Pair] = []
    for path, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        name = path.removeprefix("base_model.model.")
        if adapter in module.lora_embedding_A and unheld == "refuse":
            raise UnsupportedModelError(
                f"LoRA on the embedding {name} is not supported: take it out of target_modules"
                f"{_OR_WARN}"
            )
        if adapter not in module.lora_A:
            continue
        variant = type(getattr(module, "lora_variant", {}).get(adapter)).__name__
        if variant != "NoneType" and not (variant.startswith("Dora") and unheld == "warn"):
            raise UnsupportedModelError(
                f"The LoRA variant {variant} on {name} is not supported: its change of the weight "
                "is not s·B·A."
            )
        if module.merged:
            raise UnsupportedModelError(
                f"The adapter is merged into {name}: call model.unmerge_adapter() first."
            )
        A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        if A.ndim == B.ndim == 4 and unheld == "warn":
            continue
        _check_factors(name, A, B)
        pairs.append(_pair(path, module, B, A, float(module.scaling[adapter])))
    if not pairs:
        raise UnsupportedModelError(
            f"Adapter {adapter!r} has no LoRA matrices on Linear modules in this model."
        )
    _check_what_is_trained(model, pairs, config, unheld)
    return pairs


@dataclass(frozen=True)
class Experts(Layout):
    """Of experts kept as one parameter: A (count·r, n) by expert, B (m, r·count) by column."""

    def split(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        B = B.unflatten(2, (-1, self.count)).permute(0, 3, 1, 2).flatten(0, 1)
        return B.contiguous(), A.unflatten(1, (self.count, -1)).flatten(0, 1)

    def join(self, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        B = B.unflatten(0, (-1, self.count)).permute(0, 2, 3, 1).flatten(2)
        return B, A.unflatten(0, (-1, self.count)).flatten(1, 2)


def _pair(path: str, module: Any, B: nn.Parameter, A: nn.Parameter, s: float) -> Pair:
    """What a module of LoRA adapts: a Linear, or a parameter of another (`target_parameters`)."""
    kept_as, base = path.removeprefix("base_model.model."), module.get_base_layer()
    parameter = getattr(module, "parameter_name", None)
    if parameter is None:
        transposed = bool(getattr(module, "fan_in_fan_out", False))
        return Pair(kept_as, B, A, s, base.weight, layer=module, transposed=transposed)
    # Wrappers of several parameters of one module are nested.
    place = re.sub(r"(\.base_layer)+$", "", kept_as)
    last = "" if parameter == "weight" else f".{parameter}"
    weight, several = getattr(base, parameter), getattr(base, parameter).ndim == 3
    return Pair(
        f"{place}{last}", B, A, s, weight, base,
        # An older PEFT, such as 0.18, takes all of them for (count, n, m).
        transposed=several and not getattr(module, "_did_swap_in_out_features", False),
        layout=Experts(len(weight)) if several else Layout(),
        experts=tuple(f"{place}.{e}{last}" for e in range(len(weight))) if several else (),
        kept_as=kept_as,
        theta=lambda: getattr(base, parameter),
    )  # fmt: skip


def unheld_names(model: nn.Module, pairs: list[Pair]) -> list[str]:
    """What is trained and in no pair, so unprotected: parameters, or the modules of LoRA."""
    model = unwrap(model)
    adapter = adapter_config(model)[0]
    found: dict[str, None] = {}
    for name in _unheld(model, pairs):
        name = re.sub(rf"\.lora_(embedding_)?[AB]\.{re.escape(adapter)}(\.weight)?$", "", name)
        name = re.sub(rf"\.(modules_to_save\.)?{re.escape(adapter)}(?=\.|$)", "", name)
        found[name.replace(".base_layer", "").removeprefix("base_model.model.")] = None
    return list(found)


def _unheld(model: nn.Module, pairs: list[Pair]) -> list[str]:
    ours = {id(f) for p in pairs for f in (p.A, p.B)}
    return [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in ours]


def scale_adapter(model: nn.Module, factor: float) -> None:
    """Multiply what the active adapter changes, trainable or not."""
    from peft.tuners.lora import LoraLayer

    for module in unwrap(model).modules():
        if isinstance(module, LoraLayer):
            module.scale_layer(factor)


def scale_from(model: nn.Module, start: Path, factor: float) -> None:
    """Multiply the active adapter's change from another one: θ = θ_start + factor (θ − θ_start).

    Exact, of any two ranks: both adapters act, each with its share. To evaluate, not to train.

    Args:
        start: the other adapter's folder.
    """
    from peft.tuners.lora import LoraLayer

    model = unwrap(model)
    adapter, _ = adapter_config(model)
    model.load_adapter(str(start), adapter_name="start")  # type: ignore[operator]
    model.base_model.set_adapter([adapter, "start"])  # type: ignore[operator, union-attr]
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale(adapter, factor)
            module.set_scale("start", 1 - factor)


def start_by_corda(
    model: nn.Module, config: Any, read: Callable[[], None]
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model with an adapter of CorDA's, knowledge-preserving, and its target weights before.

    Args:
        config: a LoraConfig.
        read: runs the model on general text, one row at a time.
    """
    from peft import get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda, target_modules

    of = replace(config, init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
    before = {n: m.weight.detach().clone() for n, m in target_modules(model, of)}
    preprocess_corda(model, of, read)
    return get_peft_model(model, of), before


def merge_adapter(model: nn.Module) -> nn.Module:
    """The base model with the active adapter added to its weights, as a model without PEFT.

    Raises:
        UnsupportedModelError: the adapter is on a matrix that the model uses twice.
        DivergedError: a merged weight is not finite.
    """
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()  # type: ignore[operator]
    tied = getattr(base.get_input_embeddings(), "weight", None)
    for name, module in base.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        if getattr(module.get_base_layer(), "weight", None) is tied:
            raise UnsupportedModelError(
                f"The adapter changes {name}, whose weight is also that of another layer (tied "
                "embeddings): the two would differ once merged. Use the adapter as it is."
            )
    try:
        return model.merge_and_unload(safe_merge=True)  # type: ignore[operator]
    except ValueError as error:
        raise DivergedError(f"The adapter cannot be merged: {one_line(error)}") from None


_OR_WARN = ", or give unheld='warn' to train it freely beside the held matrices."


def _task_of(config: Any) -> str:
    return str(getattr(config.task_type, "value", config.task_type))


def _check_settings(config: Any, unheld: str) -> None:
    for setting, why in _REFUSED_SETTINGS.items():
        if getattr(config, setting, None):
            raise UnsupportedModelError(f"LoraConfig({setting}=...) is not supported: {why}.")
    if unheld == "warn":
        return
    for setting, why in _UNHELD_SETTINGS.items():
        value = getattr(config, setting, None)
        if setting == "modules_to_save":
            value = set(value or ()) - set(_HEADS.get(_task_of(config), ()))
        if value:
            raise UnsupportedModelError(
                f"LoraConfig({setting}=...) is not held by any importance: {why}{_OR_WARN}"
            )
    if getattr(config, "bias", "none") != "none":
        raise UnsupportedModelError(
            f"LoraConfig(bias={config.bias!r}) is not held by any importance: a trained bias is "
            f"not part of B·A. Use bias='none'{_OR_WARN}"
        )


def _check_factors(name: str, A: Tensor, B: Tensor) -> None:
    if A.ndim == 1 or B.ndim == 1:
        raise UnsupportedModelError(
            f"The LoRA matrices of {name} are parts of a flat parameter (FSDP1): shard with FSDP2 "
            "(fully_shard), or train with DistributedDataParallel."
        )
    if A.ndim != 2 or B.ndim != 2:
        raise UnsupportedModelError(
            f"LoRA on {name} adapts a convolution: only Linear and Conv1D targets are supported"
            f"{_OR_WARN}"
        )


def _check_what_is_trained(model: nn.Module, pairs: list[Pair], config: Any, unheld: str) -> None:
    heads = _HEADS.get(_task_of(config), ())
    others = [
        n for n in _unheld(model, pairs)
        if not (".modules_to_save." in n and n.split(".modules_to_save.")[0].endswith(heads))
    ]  # fmt: skip
    if others and unheld == "refuse":
        raise UnsupportedModelError(
            f"{len(others)} trained parameters are not LoRA's, the first is {others[0]}: freeze "
            f"them, since the importance covers B·A only{_OR_WARN}"
        )
    if not any(f.requires_grad for p in pairs for f in (p.A, p.B)):
        raise UnsupportedModelError(
            "No LoRA matrix is trainable: load the adapter with PeftModel.from_pretrained(..., "
            "is_trainable=True)."
        )


@torch.no_grad()
def take_over(
    model: nn.Module, recorded: dict[str, Tensor], noted: Noted, adapter: str | None = None
) -> list[str]:
    """Put a recorded adapter into one of no smaller rank: where the earlier phase ended.

    What only this one has, a new head say, or more rows of A, stays as it is; a magnitude of DoRA
    is set so that it changes nothing.

    Args:
        recorded: the tensors of its file, as PEFT names them.
        noted: `r` and `s` of its pairs by name.
        adapter: the active one by default.

    Returns:
        What the recorded adapter has and this one has not.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.tuners.lora import LoraLayer

    model = unwrap(model)
    adapter = adapter or adapter_config(model)[0]
    here = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    taken = {k: v for k, v in recorded.items() if k in here and here[k].shape == v.shape}
    for path, module in model.named_modules():
        keys = [f"{path}.lora_{which}.weight" for which in "BA"]
        if not isinstance(module, LoraLayer) or not all(k in recorded and k in here for k in keys):
            continue
        pair = _pair(path, module, module.lora_B[adapter].weight, module.lora_A[adapter].weight,
                     module.scaling[adapter])  # fmt: skip
        if of := noted.get(pair.names[0]):
            B, A = pair.layout.split(*(recorded[k][None] for k in keys))
            B, A = resized(B, A, of, pair.shape[2], pair.s)
            _, new = pair.layout.split(*(whole(here[k])[None] for k in keys))
            A[:, int(of["r"]) :] = new[:, int(of["r"]) :]  # zero would never learn
            both = (f[0] for f in pair.layout.join(B, A))
            taken |= dict(zip(keys, both, strict=True))
    kept = {**here, **{k: placed(v.to(here[k].device), here[k]) for k, v in taken.items()}}
    set_peft_model_state_dict(model, kept, adapter_name=adapter)
    for path, module in model.named_modules():
        magnitudes = getattr(module, "lora_magnitude_vector", {})
        if not isinstance(module, LoraLayer) or adapter not in magnitudes:
            continue
        if f"{path}.lora_magnitude_vector" not in taken:
            old = magnitudes[adapter].weight
            magnitudes[adapter].update_layer(
                base_layer=module.get_base_layer(), lora_A=module.lora_A[adapter].weight,
                lora_B=module.lora_B[adapter].weight, scaling=module.scaling[adapter],
            )  # fmt: skip
            old.copy_(magnitudes[adapter].weight)
            magnitudes[adapter].weight = old  # the one that the optimizer has
    return sorted(recorded.keys() - taken.keys())


@torch.no_grad()
def add_reference(model: nn.Module, name: str, recorded: dict[str, Tensor], noted: Noted) -> None:
    """A frozen adapter beside the active one that holds a recorded one, for TRL's reference."""
    model = unwrap(model)
    adapter, config = adapter_config(model)
    if name not in model.peft_config:  # type: ignore[operator]
        config = copy.deepcopy(config)
        config.init_lora_weights = True  # another may take its start out of the base weights
        model.add_adapter(name, config)  # type: ignore[operator]
    parameters = dict(model.named_parameters())
    for of, p in parameters.items():
        same = re.sub(rf"\.{re.escape(adapter)}(?=\.|$)", f".{name}", of)
        if same != of and same in parameters:
            parameters[same].data = p.data.clone()
    take_over(model, recorded, noted, name)


def starts_at_base(model: nn.Module) -> bool:
    """Whether B·A = 0 means the base model: not so where the initialization changed θ₀."""
    return not moves_base(vars(adapter_config(unwrap(model))[1]))


PLAIN_FIRST = "convert it to plain LoRA first (PEFT's path_initial_model_for_weight_conversion)."
"""What to do with an adapter that moved its base, where that cannot be had."""


def moves_base(config: Mapping[str, Any]) -> bool:
    """Whether a new adapter with these settings takes its start out of the base weights."""
    init = config.get("init_lora_weights")
    return isinstance(init, str) and init.lower().startswith(_MUTATING_INITS)


def init_of(model: nn.Module) -> Any:
    """`init_lora_weights` where a new adapter begins at B ≠ 0; None where it begins at B = 0."""
    init = adapter_config(unwrap(model))[1].init_lora_weights
    return None if init is True or init in ("gaussian", "eva") else init


def whole_adapter(model: nn.Module) -> dict[str, Any] | None:
    """The model's state with the active adapter gathered; None where nothing is in parts.

    Every process calls it.
    """
    model = unwrap(model)
    adapter, _ = adapter_config(model)
    if not any(map(is_sharded, model.parameters())):
        return None
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    return {
        n: whole(v) if n in trained or adapter in n.split(".") else v
        for n, v in model.state_dict().items()
    }


def save_adapter(model: nn.Module, folder: Path, state: dict[str, Any] | None = None) -> None:
    """Write the active adapter in PEFT's own format, so that it loads without hlora.

    Args:
        state: from `whole_adapter`, where the model is held in parts.

    Raises:
        DivergedError: its weights are not finite, or too large for float32 to square.
    """
    model = unwrap(model)
    adapter, _ = active_adapter(model)
    for name, p in (state or dict(model.named_parameters())).items():
        if not ("lora_" in name or p.requires_grad):
            continue
        if not torch.linalg.vector_norm(p.detach().float()).isfinite():
            raise DivergedError(
                f"The adapter is not written: {name} is not finite, or far too large. Likely "
                "cause: the learning rate; try a tenth of it."
            )
    model.save_pretrained(  # type: ignore[operator]
        str(folder),
        selected_adapters=[adapter],
        state_dict=state,
        safe_serialization=True,
        save_embedding_layers=False,
    )
    if not (folder / ADAPTER_FILES[0]).exists():  # PEFT puts named adapters in their own folder
        for path in sorted((folder / adapter).iterdir()):
            path.rename(folder / path.name)
        (folder / adapter).rmdir()


def base_of(model: nn.Module, pairs: list[Pair]) -> dict[str, Any]:
    """What identifies the base model: a few numbers of its config and of its weights.

    Every process calls it, where the model is held in parts. A quantized weight has no entries to
    compare, nor has one that is yet to be sent, and another adapter than LoRA names none.
    """
    here = pairs and (is_sharded(pairs[0].B) or not weights_to_come())
    return _identity(model, {p.name: p.weight for p in (pairs[0], pairs[-1])} if here else {})


def base_like(model: nn.Module, noted: Mapping[str, Any]) -> dict[str, Any]:
    """The same of the weights that `base_of` named before, with an adapter on the model or none."""
    weights: dict[str, Tensor] = {}
    for name, p in () if weights_to_come() else model.named_parameters(remove_duplicate=False):
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        for of in (name, name.removesuffix(".weight")):  # a parameter of experts, or a module
            if of in noted["samples"]:
                weights[of] = p
    return _identity(model, weights)


def _identity(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    config = unwrap(model).config
    values = {}
    for what, keys in _CONFIG_KEYS.items():
        for key in keys:
            if getattr(config, key, None) is not None:
                values[what] = getattr(config, key)
                break
    samples: dict[str, list[float]] = {}
    for name, weight in weights.items():
        w = whole(weight.detach())
        if w.is_floating_point():
            index = torch.linspace(0, w.numel() - 1, _FINGERPRINT_ENTRIES).long().to(w.device)
            samples[name] = [float(f"{v:.6g}") for v in w.flatten()[index].float().tolist()]
    return {
        "name": getattr(config, "name_or_path", ""), "config": values, "samples": samples,
        "revision": getattr(config, "_commit_hash", None),
    }  # fmt: skip
