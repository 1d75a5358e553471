"""What others may have done to a file."""

import copy
import random
from collections.abc import Sequence
from typing import Any

ODD = [None, [], {}, -1, 10**30, "x", [[]], {"a": {}}, True, 0.5]


def changed(draw: random.Random, value: Any, odd: Sequence[Any] = ODD, deeper: float = 0.8) -> Any:
    """A value from JSON with one thing in it of another type, or away.

    Args:
        odd: what may stand in its place.
        deeper: the chance to go on into a list or mapping.
    """
    value = copy.deepcopy(value)
    at = value
    while True:
        key = draw.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if isinstance(at[key], (dict, list)) and at[key] and draw.random() < deeper:
            at = at[key]
            continue
        if draw.random() < 0.3 and isinstance(at, dict):
            del at[key]
        else:
            at[key] = draw.choice(odd)
        return value
