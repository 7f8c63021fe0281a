"""Estimates from an evaluation's scores: pass@k without bias, and intervals. Pure functions, no numpy."""

import math
from collections.abc import Sequence

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile: two-sided 95 %


def pass_at_k(num_samples: int, num_solved: int, k: int) -> float:
    """The probability that at least one of k samples solves a problem, from num_samples >= k of which num_solved did.

    Unbiased: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374, equation 1). Raises ValueError where the
    numbers cannot be.
    """
    if not (0 <= num_solved <= num_samples and 1 <= k <= num_samples):
        raise ValueError(
            f"pass@{k} of {num_samples} samples with {num_solved} solved: the rule is "
            "0 <= solved <= samples and 1 <= k <= samples"
        )
    return 1.0 - math.comb(num_samples - num_solved, k) / math.comb(num_samples, k)


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, … up to limit."""
    return [1 << i for i in range(limit.bit_length())]


def wilson_interval(mean: float, count: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval (1927) of a share `mean` of `count` independent trials; within [0, 1].

    Unlike mean ± z σ it has width where all trials, or none, succeeded. count: need not be whole (an effective size).
    """
    centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
    spread = z * math.sqrt(mean * (1 - mean) / count + (z / (2 * count)) ** 2)
    half = spread / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def score_interval(scores: Sequence[Sequence[float]]) -> tuple[float, float] | None:
    """A 95 % interval of the mean score. scores: of each problem, those of its samples; equally many, at least one.

    Samples of one problem are alike, so what counts as independent are problems (Miller 2024, arXiv 2411.00640,
    section 2.2). Scores that are all 0 or 1: Wilson's interval for as many trials as would vary like the problems'
    means do, which for one sample each is the number of problems. Other scores: normal, and None for one problem.
    """
    num = len(scores)
    means = [sum(of_problem) / len(of_problem) for of_problem in scores]
    mean = sum(means) / num
    squares = sum((each - mean) ** 2 for each in means)
    if all(score in (0.0, 1.0) for of_problem in scores for score in of_problem):
        most = float(sum(map(len, scores)))
        # All alike: their spread says nothing, and no more is certain than so many problems.
        count = mean * (1 - mean) * num * num / squares if squares else float(num)
        return wilson_interval(min(mean, 1.0), min(count, most))
    if num < 2:
        return None
    half = Z95 * math.sqrt(squares / (num - 1) / num)
    return mean - half, mean + half
