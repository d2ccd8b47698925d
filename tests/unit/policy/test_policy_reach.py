"""Rules that can never act or never end are found where that is certain, and only there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.policy.load import PolicyErrors, load_text
from kvpilot.policy.syntax import Binary, Choice, Name, Number, Unary, parse

TEXT = """\
apiVersion: kvpilot.dev/v1alpha1
kind: Policy
metadata: {name: guard}
spec:
  inputs:
    x: {signal: kv_occupancy}
    y: {signal: requests_waiting}
    t: {signal: forecast.kv_exhaustion_seconds}
  rules:
    - name: act
      when: WHEN
      until: UNTIL
      keepFor: KEEP
      do: [{knob: max_running, set: 1}]
"""

NEVER = "p.yaml:11:14: when: can never be true: this rule never acts"
FOR_EVER = "p.yaml:12:15: until: can never be true: this rule never ends"
AT_ONCE = "p.yaml:12:15: until: is true whenever `when` is: this rule would end as soon as it acts"


def errors(when: str, until: str = "y < 1", keep: str = "0s") -> list[str]:
    text = TEXT.replace("WHEN", repr(when)).replace("UNTIL", repr(until)).replace("KEEP", keep)
    try:
        load_text(text, "p.yaml")
    except PolicyErrors as found:
        return [str(problem) for problem in found.problems]
    return []


@pytest.mark.parametrize(
    "when",
    [
        "x > 0.9 && x < 0.5",
        "x > 0.5 && x <= 0.5",
        "x < 0.5 && !(x < 0.6)",
        "!(x < 0.5 || x >= 0.5)",
        "y > 3 && (x > 0.9 && y < 2 || x < 0.1 && x > 0.2)",
        "0.9 < x && 0.5 > x",
        "x == 0.5 && x != 0.5",
        "x == 0.5 && x == 0.6",
        "2 * x > 3",
        "x - 1 > 0",
        "-x > 0.1",
        "x * x > 1.5 && y > 3",
        "slo.itl < 0 - 1 && x > 0.5",
        "(y > 5 ? 0.2 : 0.3) > x + 1",
        "y > 10 && x < 0 - y",
    ],
)
def test_a_rule_that_can_never_act(when: str) -> None:
    assert errors(when) == [NEVER]


@pytest.mark.parametrize(
    "when",
    [
        "x > 0.9 || x < 0.5",
        "x >= 0.5 && x <= 0.5",
        "x > 0.5 && y > 0.5",
        "x / y > 5",
        "x > slo.itl && x < 2 * slo.itl",
        "t > 5 && t > 1000000",
        "y - 5 > 3",
        "x > 0.2 && x * 100 < 90",
        "x >= 1",
        "y > 10 && y < 10 * t",
    ],
)
def test_a_rule_that_may_act(when: str) -> None:
    assert errors(when) == []


def test_a_rule_that_never_ends_or_ends_as_it_begins() -> None:
    assert errors("x > 0.5", "x > 0.6 && x < 0.2") == [FOR_EVER]
    assert errors("x > 0.9", "x > 0.5") == [AT_ONCE]
    assert errors("x > 0.9 && y > 5", "y > 2 || x > 0.95") == [AT_ONCE]
    assert errors("x > 0.9", "x > 0.5", keep="5s") == [], "a pulse of five seconds can be meant"
    assert errors("x > 0.9", "x > 0.95") == []


def test_the_tree_is_cels() -> None:
    x, y, one = Name("x"), Name("y"), Number(1.0)
    assert parse("x - 1 - y") == Binary("-", Binary("-", x, one), y)
    assert parse("x < 1 || x > 1 && y < 1") == Binary(
        "||", Binary("<", x, one), Binary("&&", Binary(">", x, one), Binary("<", y, one))
    )
    assert parse("!(x > 1) ? -x : y") == Choice(Unary("!", Binary(">", x, one)), Unary("-", x), y)
    assert parse("x ? 1 : y ? 1 : 1") == Choice(x, one, Choice(y, one, one))
    assert parse("slo . itl") == Name("slo.itl")


@given(st.text("xy.1()-!&|<>=?:+*/ ", max_size=40) | st.text(max_size=20))
def test_any_text_gives_a_tree_or_none(text: str) -> None:
    parse(text)


def test_what_nests_too_deeply_is_not_looked_into() -> None:
    assert parse("(" * 240 + "x" + ")" * 240) is None
    assert parse("-" * 400 + "x") is None


NUMBERS = st.sampled_from(["0", "0.25", "0.5", "0.75", "1", "x", "y", "x + y", "x * y", "0.5 - x", "-y"])
COMPARISONS = st.builds(
    "({} {} {})".format, NUMBERS, st.sampled_from(["<", "<=", ">", ">=", "==", "!="]), NUMBERS
)
CONDITIONS = st.recursive(
    COMPARISONS,
    lambda inner: (
        st.builds("({} && {})".format, inner, inner)
        | st.builds("({} || {})".format, inner, inner)
        | st.builds("!({})".format, inner)
    ),
    max_leaves=6,
)


@given(CONDITIONS, st.floats(0, 1), st.floats(0, 20) | st.integers(0, 2).map(float))
def test_what_is_called_impossible_is_never_true(condition: str, x: float, y: float) -> None:
    """The claim is a proof: no value of the plausible ranges contradicts it."""
    when = f"x >= 0 && {condition}"
    if NEVER not in errors(when):
        return
    python = condition.replace("&&", " and ").replace("||", " or ").replace("!(", " not (")
    assert not eval(python, {"x": x, "y": y})
