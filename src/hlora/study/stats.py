"""Is a difference more than noise?"""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Collection
from dataclasses import dataclass

from hlora.errors import optional
from hlora.run.means import mean_se


@dataclass(frozen=True)
class Independent:
    """Two samples compared as independent ones, as the paper does (its Fig. 3).

    Attributes:
        welch, student: p-values of the t-tests without and with equal variances; NaN if n < 2 or
            neither sample varies.
        g: Hedges' g, the difference in pooled standard deviations, corrected for small samples.
    """

    welch: float
    student: float
    g: float
    n: tuple[int, int]


@dataclass(frozen=True)
class Paired:
    """Differences of runs that share their seed.

    Attributes:
        mean, se: of the differences; se is NaN for one.
        p: of a t-test against zero; NaN if n < 2 or the differences do not vary.
    """

    mean: float
    se: float
    p: float
    n: int

    @property
    def decided(self) -> bool:
        """Whether it differs from zero at the 5 % level."""
        return self.p < 0.05

    def shown(self, digits: int) -> str:
        """`mean ± standard error`; a single difference is said to be one."""
        return _text(self.mean, self.se, self.n, digits, "+")


def shown(values: Collection[float], digits: int, signed: bool = False) -> str:
    """`mean ± standard error`, or the value of one seed, which is said."""
    return _text(*mean_se(values), len(values), digits, "+" if signed else "")


def _text(mean: float, se: float, n: int, digits: int, sign: str) -> str:
    error = " (n = 1)" if n == 1 else f" ± {se:.{digits}f}"
    return f"{mean:{sign}.{digits}f}{error}" if n else "–"


def independent(a: list[float], b: list[float]) -> Independent:
    """Welch's and Student's t-test of the means of a and b, and the effect size."""
    n = (len(a), len(b))
    if min(n) < 2 or not (statistics.variance(a) or statistics.variance(b)):
        return Independent(math.nan, math.nan, math.nan, n)
    stats = optional("scipy.stats", "Comparisons need", "report")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one sample without variance
        welch, student = (stats.ttest_ind(a, b, equal_var=equal) for equal in (False, True))
    g = student.statistic * math.sqrt(1 / n[0] + 1 / n[1]) * (1 - 3 / (4 * (sum(n) - 2) - 1))
    return Independent(float(welch.pvalue), float(student.pvalue), float(g), n)


def paired(a: dict[int, float], b: dict[int, float]) -> Paired:
    """a minus b over the seeds that both have."""
    differences = [a[s] - b[s] for s in sorted(a.keys() & b.keys())]
    n, (mean, se) = len(differences), mean_se(differences)
    if n < 2 or se == 0:  # accuracies move in steps: the same step twice proves nothing
        return Paired(mean, se, math.nan, n)
    p = 2 * optional("scipy.stats", "Comparisons need", "report").t.sf(abs(mean / se), n - 1)
    return Paired(mean, se, float(p), n)


def p_text(p: float) -> str:
    if math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def p_equals(p: float) -> str:
    """After `p`: `= 0.031`, `< 0.001`, or `–` where there was no test."""
    return p_text(p) if math.isnan(p) or p < 0.001 else f"= {p_text(p)}"
