"""The regression alone: exact on exact rows, bounded, never negative, and no worse for what it has seen."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.forecast.regression import Regression


def taught(rows: list[tuple[list[float], float]], solve_every: int = 10) -> Regression:
    regression = Regression(len(rows[0][0]))
    for number, (x, y) in enumerate(rows):
        regression.learn(x, y)
        if number % solve_every == 0:
            regression.solve()
    regression.solve()
    return regression


def rows(
    truth: list[float], count: int, sigma: float = 0.0, seed: int = 1
) -> list[tuple[list[float], float]]:
    dice = random.Random(seed)
    found = []
    for _ in range(count):
        x = [1.0, *(dice.random() for _ in truth[1:])]
        y = sum(a * b for a, b in zip(x, truth, strict=True)) + dice.gauss(0, sigma)
        found.append((x, y))
    return found


def test_exact_rows_give_exact_coefficients() -> None:
    truth = [0.5, 2.0, 0.0, 1.0]
    assert taught(rows(truth, 300)).coefficients == pytest.approx(truth, abs=0.01)


def test_outliers_in_one_row_of_ten_hardly_move_it() -> None:
    truth = [0.5, 2.0, 1.0]
    table = rows(truth, 2000, sigma=0.02)
    spoilt = [(x, y + 30.0 if number % 10 == 0 else y) for number, (x, y) in enumerate(table)]
    assert taught(spoilt).coefficients == pytest.approx(truth, abs=0.15)


def test_what_would_be_negative_is_zero_and_the_rest_makes_the_best_of_it() -> None:
    table = [([1.0, number % 2], 1.0 - 0.5 * (number % 2)) for number in range(400)]
    found = taught(table).coefficients
    assert found[1] == 0.0
    assert found[0] == pytest.approx(0.75, abs=0.05)


def test_a_direction_without_rows_keeps_what_it_knew_and_its_doubt() -> None:
    truth = [0.5, 2.0]
    regression = taught(rows(truth, 2000, sigma=0.05))
    before = regression.solve().deviation([1.0, 1.0])
    dice = random.Random(9)
    for _ in range(50_000):
        regression.learn([1.0, 0.5], 1.5 + dice.gauss(0, 0.05))
    after = regression.solve()
    assert after.predict([1.0, 1.0]) == pytest.approx(2.5, abs=0.1)
    assert after.deviation([1.0, 0.5]) < 0.01
    assert before / 3 < after.deviation([1.0, 1.0]) < 3 * before + 0.01


def test_doubt_shrinks_with_rows_and_is_about_right() -> None:
    truth, x = [0.5, 2.0, 1.0], [1.0, 0.5, 0.5]
    few, many = taught(rows(truth, 30, 0.2)), taught(rows(truth, 800, 0.2))
    assert many.solve().deviation(x) < few.solve().deviation(x) / 3
    true = sum(a * b for a, b in zip(x, truth, strict=True))
    misses = []
    for seed in range(60):
        solution = taught(rows(truth, 200, 0.2, seed)).solve()
        misses.append(abs(solution.predict(x) - true) / solution.deviation(x))
    assert sum(miss < 1.64 for miss in misses) / 60 > 0.6


def test_after_weakening_new_rows_take_over_at_once_and_old_ones_show_the_way() -> None:
    regression = taught(rows([0.5, 2.0], 3000))
    regression.weaken()
    assert regression.rows == 0
    assert regression.solve().coefficients == pytest.approx((0.5, 2.0), abs=0.2)
    for x, y in rows([1.5, 6.0], 100):
        regression.learn(x, y)
        regression.solve()
    assert regression.coefficients == pytest.approx([1.5, 6.0], rel=0.15)


numbers = st.floats(0, 1e4)


@given(
    st.lists(st.tuples(st.lists(numbers, min_size=4, max_size=4), st.floats(0, 1e3)), min_size=1, max_size=80)
)
def test_whatever_comes_coefficients_are_finite_and_not_negative(
    table: list[tuple[list[float], float]],
) -> None:
    regression = taught(table, solve_every=7)
    solution = regression.solve()
    assert all(0 <= value < 1e12 for value in solution.coefficients)
    assert solution.deviation(table[0][0]) >= 0


@given(st.integers(0, 2**32), st.floats(0, 0.5))
def test_no_feasible_step_along_an_axis_is_better(seed: int, sigma: float) -> None:
    """Of the non-negative coefficients it is the least-squares ones that are found."""
    dice = random.Random(seed)
    truth = [dice.uniform(-1, 2) for _ in range(5)]
    table = rows(truth, 60, sigma, seed)
    regression = Regression(5)
    for x, y in table:
        regression.learn(x, y)
    a = [row.copy() for row in regression._a]
    found = regression.solve().coefficients
    for i in range(5):
        slope = sum(p * q for p, q in zip(a[i], found, strict=True)) - regression._b[i]
        tolerance = 0.02 * max(abs(each) for each in regression._b) + regression.sigma**2 * max(found)
        assert slope > -tolerance
        assert found[i] == 0 or abs(slope) < tolerance
