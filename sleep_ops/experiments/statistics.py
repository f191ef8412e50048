"""What several seeds say: means with intervals by Student's t, and differences paired by seed."""

import math
import statistics
from collections.abc import Mapping, Sequence

CONFIDENCE = 0.95


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """The t that Student's distribution keeps to with this probability: P(|T| <= t), 12.706 for 1 degree of freedom.

    Exact but for bisection: for whole degrees of freedom the probability is a finite sum (Abramowitz and Stegun,
    Handbook of Mathematical Functions, 26.7.3 and 26.7.4). ValueError for less than one degree.
    """
    if freedom < 1 or not 0 < confidence < 1:
        raise ValueError(f"freedom, confidence: expected >= 1, in (0, 1), got {freedom}, {confidence}")
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _probability(middle, freedom) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan(middle)


def _probability(angle: float, freedom: int) -> float:
    """P(|T| <= t) for t = sqrt(freedom) tan(angle)."""
    odd, total = freedom % 2, 0.0
    term = math.cos(angle) if odd else 1.0
    for k in range(1, freedom // 2 + 1):
        total += term
        term *= (2 * k - 1 + odd) / (2 * k + odd) * math.cos(angle) ** 2
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean and its 95 % confidence interval, which is unknown (NaN) for one value alone."""
    mean, n = statistics.fmean(values), len(values)
    if n < 2:
        return mean, math.nan, math.nan
    half = t_quantile(n - 1) * statistics.stdev(values) / math.sqrt(n)
    return mean, mean - half, mean + half


def summary(values: Sequence[float]) -> dict[str, float]:
    """n, mean, standard deviation (of a sample), 95 % interval of the mean, least and largest value."""
    mean, low, high = interval(values)
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    ends = {"min": min(values), "max": max(values)}
    return {"n": len(values), "mean": mean, "std": spread, "ci_low": low, "ci_high": high} | ends


def paired(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float] | None:
    """first - second over the seeds that both have: n, mean, 95 % interval, and of how many it is above zero.

    None without such a seed.
    """
    differences = [value - second[seed] for seed, value in first.items() if seed in second]
    if not differences:
        return None
    mean, low, high = interval(differences)
    return {"n": len(differences), "mean": mean, "ci_low": low, "ci_high": high} | {
        "positive": sum(x > 0 for x in differences)
    }
