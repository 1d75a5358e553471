"""What the adapter_config.json of others may say: patterns that end, numbers that are some."""

from __future__ import annotations

import re
from typing import Any

LARGEST_ALPHA = 1e6
MOST_ITERATIONS = 1000
_ENDLESS = re.compile(r"\)\s*[*+{]")
"""A group that is repeated: with a repetition inside, the time doubles with each letter."""
_REPEATS, _LONGEST = 3, 500
"""Of one pattern, and its length: time grows with a name's length to the power of the first."""


def check_config(config: dict[str, Any]) -> None:
    """Refuse settings with which loading may never end, or means nothing.

    Raises:
        ValueError: names the setting.
    """
    patterns = [config.get(k) for k in ("target_modules", "exclude_modules", "layers_pattern")]
    patterns += [config.get("target_parameters")]
    for of in ("rank_pattern", "alpha_pattern"):
        patterns += [list(found)] if isinstance(found := config.get(of) or {}, dict) else []
    for found in patterns:
        for pattern in found if isinstance(found, list) else [found]:
            if isinstance(pattern, str):
                _check_pattern(pattern)
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


def _check_pattern(pattern: str) -> None:
    plain = re.sub(r"\\.|\[[^\]]*\]", "", pattern)
    repeats = sum(map(plain.count, "*+{"))
    if len(pattern) > _LONGEST or repeats > _REPEATS or _ENDLESS.search(plain):
        raise ValueError(f"the pattern {pattern[:60]!r} could take for ever to match")
