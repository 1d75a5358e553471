"""A new LoRA adapter from settings."""

from __future__ import annotations

from torch import nn

from hlora.errors import InputError, suggest
from hlora.run.settings import TrainSettings


def new_adapter(model: nn.Module, settings: TrainSettings) -> nn.Module:
    """The model with an untrained adapter on the targets.

    Raises:
        InputError: a target names nothing in the model; those that exist are suggested.
    """
    from peft import LoraConfig, get_peft_model

    targets: list[str] | str = list(settings.targets)
    if targets == ["all-linear"]:
        targets = "all-linear"
    else:
        check_targets(model, settings.targets)
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        use_rslora=settings.rslora,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def check_targets(model: nn.Module, targets: list[str]) -> None:
    """Refuse a target that no linear module has as (the end of) its name."""
    linear = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    ends = sorted({n.rsplit(".", 1)[-1] for n in linear if "lm_head" not in n})
    for target in targets:
        if not any(n == target or n.endswith(f".{target}") for n in linear):
            raise InputError(
                f"The model has no linear module {target!r}"
                + suggest(target, ends, "")
                + f" Its targets are {', '.join(ends)}."
            )
