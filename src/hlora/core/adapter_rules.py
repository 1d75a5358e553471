"""What the adapter_config.json of others may say: patterns that end, numbers that are some."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from hlora.core.patterns import check_patterns

LARGEST_ALPHA = 1e6
MOST_ITERATIONS = 1000
_PATTERNS = (
    "target_modules", "exclude_modules", "layers_pattern", "target_parameters", "modules_to_save",
)  # fmt: skip


def check_config(config: dict[str, Any], modules: Iterable[str]) -> None:
    """Refuse settings with which loading may never end, or means nothing.

    Args:
        modules: all names that a pattern is matched against.

    Raises:
        ValueError: names the setting.
    """
    patterns = [config.get(k) for k in _PATTERNS]
    for of in ("rank_pattern", "alpha_pattern"):
        patterns += [list(found)] if isinstance(found := config.get(of) or {}, dict) else []
    listed = [p for found in patterns for p in (found if isinstance(found, list) else [found])]
    check_patterns((p for p in listed if isinstance(p, str)), modules)
    alphas = config.get("alpha_pattern") or {}
    for value in (config.get("lora_alpha"), *(alphas.values() if isinstance(alphas, dict) else ())):
        if isinstance(value, (int, float)) and not abs(value) <= LARGEST_ALPHA:
            raise ValueError(f"lora_alpha is {value}")
    dropout = config.get("lora_dropout")
    if isinstance(dropout, (int, float)) and not 0 <= dropout < 1:
        raise ValueError(f"lora_dropout is {dropout}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and int((re.findall(r"\d+", init) or [0])[0]) > MOST_ITERATIONS:
        raise ValueError(f"init_lora_weights is {init[:60]}")
