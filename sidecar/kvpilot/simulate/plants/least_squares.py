"""Non-negative robust least squares over a few columns and thousands of rows, in plain Python.

Minimises the sum of Huber's loss over the rows, coefficients at least 0: iteratively reweighted normal
equations, each solved by Lawson and Hanson's active set ("Solving Least Squares Problems", 1974, chapter 23).
Columns are lists, so that a pass over the rows runs in C: O(columns^2 rows) for each reweighting.
"""

from collections.abc import Sequence
from math import sqrt
from operator import mul

HUBER = 1.345
"""In standard deviations: beyond it a row counts less. 95 % as efficient as least squares on normal noise."""
REWEIGHTINGS = 8
_MAD_TO_SIGMA = 1.4826
_LEAST_SIGMA = 1e-6
_RIDGE = 1e-9
"""Of a column's own square: shares a total out between columns that are alike, too weak to be seen else."""

Column = Sequence[float]


def fit(columns: Sequence[Column], targets: Column) -> list[float]:
    """One coefficient for each column. A column that is all zero has coefficient 0."""
    scales = [max(map(abs, column), default=0.0) for column in columns]
    scaled = [
        [value / scale for value in column] for column, scale in zip(columns, scales, strict=True) if scale
    ]
    weights = [1.0] * len(targets)
    solution = [0.0] * len(scaled)
    for _ in range(REWEIGHTINGS):
        solution = _weighted(scaled, targets, weights)
        sizes = [abs(target - made) for target, made in zip(targets, predict(scaled, solution), strict=True)]
        sigma = max(_MAD_TO_SIGMA * sorted(sizes)[len(sizes) // 2], _LEAST_SIGMA)
        weights = [min(1.0, HUBER * sigma / size) if size else 1.0 for size in sizes]
    found = iter(solution)
    return [next(found) / scale if scale else 0.0 for scale in scales]


def predict(columns: Sequence[Column], coefficients: Sequence[float]) -> list[float]:
    """One value for each row."""
    return [sum(map(mul, row, coefficients)) for row in zip(*columns, strict=True)]


def _weighted(columns: Sequence[Column], targets: Column, weights: Column) -> list[float]:
    n = len(columns)
    weighted = [list(map(mul, column, weights)) for column in columns]
    a = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(i + 1):
            a[i][j] = a[j][i] = sum(map(mul, weighted[i], columns[j]))
        a[i][i] *= 1 + _RIDGE
    return _non_negative(a, [sum(map(mul, column, targets)) for column in weighted])


def _non_negative(a: Sequence[Sequence[float]], b: Sequence[float]) -> list[float]:
    """Minimise x'Ax/2 - b'x over x >= 0."""
    n = len(b)
    x = [0.0] * n
    free: list[int] = []
    enough = 1e-9 * max((abs(b[i]) / sqrt(a[i][i]) for i in range(n)), default=0.0)
    for _ in range(3 * n):
        gains = [((b[i] - sum(map(mul, a[i], x))) / sqrt(a[i][i]), i) for i in range(n) if i not in free]
        gain, best = max(gains, default=(0.0, -1))
        if gain <= enough:
            break
        free.append(best)
        while free:
            aim = _solved([[a[i][j] for j in free] for i in free], [b[i] for i in free])
            if min(aim) > 0:
                break
            # Go towards it as far as the first coefficient that reaches zero, and leave that one there.
            step = min(x[i] / (x[i] - to) for i, to in zip(free, aim, strict=True) if to <= 0)
            for i, to in zip(free, aim, strict=True):
                x[i] += step * (to - x[i])
            stuck = min(free, key=lambda i: x[i])
            x[stuck] = 0.0
            free = [i for i in free if i != stuck]
        for i, to in zip(free, aim if free else (), strict=True):
            x[i] = to
    return x


def _solved(a: list[list[float]], b: list[float]) -> list[float]:
    """The solution of A x = b, A positive definite: Gaussian elimination with the largest pivot first."""
    n = len(b)
    rows = [[*row, value] for row, value in zip(a, b, strict=True)]
    for i in range(n):
        pivot = max(range(i, n), key=lambda k: abs(rows[k][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for k in range(i + 1, n):
            factor = rows[k][i] / rows[i][i]
            rows[k] = [value - factor * above for value, above in zip(rows[k], rows[i], strict=True)]
    x = [0.0] * n
    for i in range(n - 1, -1, -1):
        x[i] = (rows[i][n] - sum(rows[i][j] * x[j] for j in range(i + 1, n))) / rows[i][i]
    return x
