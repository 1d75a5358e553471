"""Means, their standard errors, and perplexity: plain numbers, so that a report needs no torch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable


def mean_se(values: Iterable[float]) -> tuple[float, float]:
    """The mean and its standard error, from the sample variance: NaN for none, and for one."""
    values = list(values)
    n = len(values)
    if not n or not all(map(math.isfinite, values)):
        return sum(values) / n if n else math.nan, math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan


def exp(nats: float) -> float:
    """e to the loss, infinite where that is no float."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
