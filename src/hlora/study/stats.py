"""Is a difference more than noise?"""

from __future__ import annotations

import math
import statistics
import warnings
from dataclasses import dataclass

from hlora.errors import InputError


@dataclass(frozen=True)
class Independent:
    """Two samples compared as independent ones, as the paper does (its Fig. 3).

    Attributes:
        welch, student: p-values of the t-tests without and with equal variances; NaN if n < 2 or
            neither sample varies.
        g: Hedges' g, the difference in pooled standard deviations, corrected for small samples.
        n: sizes of the two samples.
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
        n: how many.
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
        if not self.n:
            return "–"
        error = " (n = 1)" if self.n == 1 else f" ± {self.se:.{digits}f}"
        return f"{self.mean:+.{digits}f}{error}"


def independent(a: list[float], b: list[float]) -> Independent:
    """Welch's and Student's t-test of the means of a and b, and the effect size."""
    n = (len(a), len(b))
    if min(n) < 2 or not (statistics.variance(a) or statistics.variance(b)):
        return Independent(math.nan, math.nan, math.nan, n)
    stats = _scipy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one sample without variance
        welch = float(stats.ttest_ind(a, b, equal_var=False).pvalue)
        student = float(stats.ttest_ind(a, b, equal_var=True).pvalue)
    freedom = sum(n) - 2
    variances = (n[0] - 1) * statistics.variance(a) + (n[1] - 1) * statistics.variance(b)
    pooled = math.sqrt(variances / freedom)
    difference = statistics.fmean(a) - statistics.fmean(b)
    g = difference / pooled * (1 - 3 / (4 * freedom - 1)) if pooled else math.nan
    return Independent(welch, student, g, n)


def paired(a: dict[int, float], b: dict[int, float]) -> Paired:
    """a minus b over the seeds that both have."""
    differences = [a[s] - b[s] for s in sorted(a.keys() & b.keys())]
    n = len(differences)
    if not n:
        return Paired(math.nan, math.nan, math.nan, 0)
    mean = statistics.fmean(differences)
    if n < 2:
        return Paired(mean, math.nan, math.nan, n)
    se = statistics.stdev(differences) / math.sqrt(n)
    if se == 0:  # accuracies move in steps: the same step twice proves nothing
        return Paired(mean, se, math.nan, n)
    return Paired(mean, se, float(2 * _scipy().t.sf(abs(mean / se), n - 1)), n)


def p_text(p: float) -> str:
    if math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def p_equals(p: float) -> str:
    """After `p`: `= 0.031`, `< 0.001`, or `–` where there was no test."""
    return p_text(p) if math.isnan(p) or p < 0.001 else f"= {p_text(p)}"


def _scipy():  # type: ignore[no-untyped-def]
    try:
        from scipy import stats
    except ImportError:
        raise InputError("Comparisons need scipy: pip install 'hlora[report]'.") from None
    return stats
