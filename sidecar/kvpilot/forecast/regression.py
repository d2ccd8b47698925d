"""Linear regression that learns one row at a time, forgets, shrugs off outliers and has no negative slopes.

It keeps the normal equations (the information form of recursive least squares): the matrix A, the sum of
w x x', and the vector b, the sum of w x y. What is asked of it:

- *Forgetting by direction.* A row takes a share `1 - MEMORY` of the information away, along its own direction
  alone: hours of one steady batch refine what that batch says and erase nothing about other batches. With
  plain exponential forgetting that would fade to nothing, and the estimate would drift there.
- *Forgetting at large* while the median residual is off: everything has changed (a clock, a neighbour), and
  directions that are rarely seen must not hold the old for long. It fades confidence, not the estimate.
- *Bounded covariance.* A ridge is part of every solution. It shares a total out where rows cannot tell two
  features apart, and is far too weak to be seen where they can.
- *Robust weights* (Huber): a row counts less, the further it lies outside the median residual of late. The
  median follows when everything moves, so that a wrong start is not an outlier for ever.
- *No negative coefficients* (Lawson and Hanson's active set, from the last one): no work takes negative time.

Rows and targets should be scaled so that targets are near 1 and residuals have one spread. A row is O(n^2), a
solution O(n^3) for each change of the active set.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from math import sqrt
from operator import mul

MEMORY = 0.999
"""What remains of the information along a row's direction after it: a memory of a thousand rows."""
WEAK_ROWS = 5.0
"""What everything learnt counts for after `weaken`."""
HUBER = 1.345
"""In standard deviations: beyond it a row counts less. 95 % as efficient as least squares on normal noise."""
SPREAD_ROWS = 65
"""Residuals whose median is the spread."""
CHANGED = 0.1
CHANGED_SIGMAS = 0.6
"""A median residual further off than both, the second in deviations about it, is a change and not noise."""
CHANGED_MEMORY = 0.98
FIRST_SIGMA = 0.1
"""Before there is a residual."""
_LEAST_SIGMA = 0.005
_MAD_TO_SIGMA = 1.4826
_IQR_TO_SIGMA = 1.349
_TINY = 1e-12
_MOST_CHANGES = 2
"""Of the active set in one solution, for each feature: the next solution goes on from there."""


class Regression:
    """See the module docstring."""

    def __init__(self, features: int) -> None:
        self._n = features
        self.coefficients = [0.0] * features
        self.rows = 0
        self._a = [[0.0] * features for _ in range(features)]
        self._b = [0.0] * features
        self._reach = [0.0] * features
        """The largest value of each feature: what the ridge is relative to."""
        self._residuals: deque[float] = deque()
        self._signed: list[float] = []
        self._sizes: list[float] = []

    @property
    def sigma(self) -> float:
        """The spread of residuals of late, as a standard deviation."""
        if not self._sizes:
            return FIRST_SIGMA
        return max(_MAD_TO_SIGMA * self._sizes[len(self._sizes) // 2], _LEAST_SIGMA)

    def predict(self, x: Sequence[float]) -> float:
        """By the latest solution."""
        return float(sum(map(mul, x, self.coefficients)))

    def learn(self, x: Sequence[float], y: float) -> None:
        """One row. Does not move the solution: `solve` does."""
        residual = y - self.predict(x)
        self._note(residual)
        sigma, size = self.sigma, abs(residual)
        if self._changed():
            self._scale(CHANGED_MEMORY)
        weight = min(1.0, HUBER * sigma / size) if size else 1.0
        a, b = self._a, self._b
        # A feature that no row has had yet, this one included, has a row of zeros, and keeps it.
        reach = self._reach = list(map(max, self._reach, x))
        v = [sum(map(mul, row, x)) if most else 0.0 for row, most in zip(a, reach, strict=True)]
        information = sum(map(mul, v, x))
        fade = (1.0 - MEMORY) / information if information > _TINY else 0.0
        fade_b = fade * sum(map(mul, x, b))
        weighted = weight * y
        for i, (xi, vi) in enumerate(zip(x, v, strict=True)):
            if not reach[i]:
                continue
            add, take = weight * xi, fade * vi
            a[i] = [old + add * xj - take * vj for old, xj, vj in zip(a[i], x, v, strict=True)]
            b[i] += xi * weighted - vi * fade_b
        self.rows += 1

    def solve(self) -> "Solution":
        """Move to the best non-negative coefficients for what was learnt."""
        sigma = self.sigma
        a = [row.copy() for row in self._a]
        for i, reach in enumerate(self._reach):
            a[i][i] += max((sigma * reach) ** 2, _TINY)
        self.coefficients = _non_negative(a, self._b, self.coefficients)
        return Solution(tuple(self.coefficients), _cholesky(a), sigma)

    def _changed(self) -> bool:
        """Whether residuals of late lie to one side, by more than their own scatter would explain."""
        signed = self._signed
        n = len(signed)
        scatter = (signed[3 * n // 4] - signed[n // 4]) / _IQR_TO_SIGMA
        return abs(signed[n // 2]) > max(CHANGED, CHANGED_SIGMAS * scatter)

    def weaken(self) -> None:
        """From here on what was learnt is only where to begin: worth `WEAK_ROWS` rows."""
        if self.rows > WEAK_ROWS:
            self._scale(WEAK_ROWS / min(self.rows, 1 / (1 - MEMORY)))
        self.rows = 0
        for each in (self._residuals, self._signed, self._sizes):
            each.clear()

    def _scale(self, share: float) -> None:
        self._a = [[share * value for value in row] for row in self._a]
        self._b = [share * value for value in self._b]

    def _note(self, residual: float) -> None:
        if len(self._residuals) == SPREAD_ROWS:
            oldest = self._residuals.popleft()
            del self._signed[bisect_left(self._signed, oldest)]
            del self._sizes[bisect_left(self._sizes, abs(oldest))]
        self._residuals.append(residual)
        insort(self._signed, residual)
        insort(self._sizes, abs(residual))


class Solution:
    """A frozen solution: coefficients, and how far a prediction can be off for want of rows like it."""

    __slots__ = ("_factor", "_sigma", "coefficients")

    def __init__(self, coefficients: tuple[float, ...], factor: list[list[float]], sigma: float) -> None:
        self.coefficients = coefficients
        self._factor = factor
        self._sigma = sigma

    def predict(self, x: Sequence[float]) -> float:
        return float(sum(map(mul, x, self.coefficients)))

    def deviation(self, x: Sequence[float]) -> float:
        """Standard deviation of the prediction at `x` that comes from the coefficients, in y's unit."""
        solved: list[float] = []
        for row, xi in zip(self._factor, x, strict=True):
            solved.append((xi - sum(map(mul, row, solved))) / row[len(solved)])
        return self._sigma * sqrt(sum(map(mul, solved, solved)))


def _cholesky(a: Sequence[Sequence[float]]) -> list[list[float]]:
    """Lower rows of the factor; a pivot that rounding made negative is a tiny one."""
    rows: list[list[float]] = []
    for i, source in enumerate(a):
        row: list[float] = []
        if not any(source[:i]):
            row = [0.0] * i
        for j in range(len(row), i):
            other = rows[j]
            row.append((source[j] - sum(map(mul, row, other))) / other[j])
        row.append(sqrt(max(source[i] - sum(map(mul, row, row)), _TINY * source[i])))
        rows.append(row)
    return rows


def _solved(a: Sequence[Sequence[float]], b: Sequence[float], active: Sequence[int]) -> list[float]:
    """The solution of A x = b over the `active` features alone, in their order."""
    factor = _cholesky([[a[i][j] for j in active] for i in active])
    forward: list[float] = []
    for row, i in zip(factor, active, strict=True):
        forward.append((b[i] - sum(map(mul, row, forward))) / row[len(forward)])
    x = [0.0] * len(active)
    for i in range(len(active) - 1, -1, -1):
        rest = sum(factor[k][i] * x[k] for k in range(i + 1, len(active)))
        x[i] = (forward[i] - rest) / factor[i][i]
    return x


def _non_negative(a: Sequence[Sequence[float]], b: Sequence[float], start: Sequence[float]) -> list[float]:
    """Minimise x'Ax/2 - b'x over x >= 0, from `start`, which must be feasible.

    After Lawson and Hanson: solve over the features above zero; where that would go below, go there only as
    far as the first of them allows and leave it at zero; when nothing more is to be gained so, let in the
    feature that promises most.
    """
    x = list(start)
    n = len(b)
    active = [i for i in range(n) if x[i] > 0]
    enough = 1e-6 * max((abs(b[i]) / sqrt(a[i][i]) for i in range(n)), default=0.0)
    for _ in range(_MOST_CHANGES * n):
        while active:
            aim = _solved(a, b, active)
            if min(aim) > 0:
                break
            step = min(
                x[i] / (x[i] - to) if x[i] > to else 0.0 for i, to in zip(active, aim, strict=True) if to <= 0
            )
            for i, to in zip(active, aim, strict=True):
                x[i] += step * (to - x[i])
            stuck = min(active, key=lambda i: x[i])
            x[stuck] = 0.0
            active = [i for i in active if x[i] > 0]
        for i, to in zip(active, aim if active else (), strict=True):
            x[i] = to
        gains = [((b[i] - sum(map(mul, a[i], x))) / sqrt(a[i][i]), i) for i in range(n) if i not in active]
        gain, best = max(gains, default=(0.0, 0))
        if gain <= enough:
            break
        active.append(best)
    return x
