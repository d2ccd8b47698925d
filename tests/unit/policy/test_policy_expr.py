# ruff: noqa: E501 - tables of one error a line
"""Expressions: typed at load, missing at run time whenever an input is, never truthy by accident."""

import pytest
from cel_expr_python import cel
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.policy.expr import MAX_LENGTH, Expression, ExpressionError, compile_expression
from kvpilot.signals import SIGNALS, Missing

INPUTS = {
    "itl_p95": SIGNALS["itl_seconds"],
    "kv": SIGNALS["kv_occupancy"],
    "wait": SIGNALS["requests_waiting"],
}


def condition(text: str) -> Expression:
    return compile_expression(text, INPUTS, "bool")


def faults(text: str, classes: list[str] | None = None) -> list[tuple[int, str]]:
    with pytest.raises(ExpressionError) as caught:
        compile_expression(text, INPUTS, "bool", classes)
    return [tuple(fault) for fault in caught.value.faults]


def test_values() -> None:
    expression = condition("itl_p95 > 0.75 * slo.itl && kv >= 0.5")
    assert expression.names == ("itl_p95", "kv", "slo.itl")
    assert expression.evaluate({"itl_p95": 0.04, "kv": 0.5, "slo.itl": 0.05}) is True
    assert expression.evaluate({"itl_p95": 0.03, "kv": 0.5, "slo.itl": 0.05}) is False


def test_an_error_of_the_evaluator_is_missing_and_not_true() -> None:
    """The trap: CEL hands errors back as values, and unwrapped they are non-empty strings, hence truthy."""
    program = cel.NewEnv(variables={"kv": cel.Type.DOUBLE}).compile("1 / 0 > 1")
    assert program.eval(data={"kv": 1.0}).value(), "the trap is gone: this test can go too"
    assert Expression("1 / 0 > 1", ("kv",), "bool", program).evaluate({"kv": 1.0}) == Missing("eval_error")
    number = cel.NewEnv(variables={"kv": cel.Type.DOUBLE}).compile("1 / 0")
    assert Expression("1 / 0", ("kv",), "number", number).evaluate({"kv": 1.0}) == Missing("eval_error")


def test_the_wrong_type_is_missing() -> None:
    program = cel.NewEnv(variables={"kv": cel.Type.DOUBLE}).compile("kv")
    assert Expression("kv", ("kv",), "bool", program).evaluate({"kv": 1.0}) == Missing("eval_error")


@pytest.mark.parametrize("text", ["kv > 0.1 || itl_p95 > 1", "kv > 0.1 ? kv > 0.1 : itl_p95 > 1"])
def test_a_missing_input_is_missing_even_where_cel_could_conclude(text: str) -> None:
    absent = Missing("too_old", 3.0)
    assert condition(text).evaluate({"kv": 0.9, "itl_p95": absent}) == absent
    assert condition(text).evaluate({"kv": 0.9}) == Missing("not_provided")
    assert condition(text).evaluate({"kv": 0.9, "itl_p95": float("nan")}) == Missing("not_finite")


def test_a_number_that_is_not_finite_is_missing() -> None:
    inverse = compile_expression("1 / kv", INPUTS, "number")
    assert inverse.evaluate({"kv": 0.5}) == 2.0
    assert inverse.evaluate({"kv": 0.0}) == Missing("not_finite")


def test_infinite_inputs_are_values() -> None:
    assert condition("wait > 5").evaluate({"wait": float("inf")}) is True


def test_integer_literals_are_promoted() -> None:
    assert condition("wait > 16").evaluate({"wait": 16.5}) is True
    assert condition("wait > 3 * (1 + 2)").evaluate({"wait": 8.0}) is False


@pytest.mark.parametrize(
    ("text", "offset", "message"),
    [
        ("itl_p96 > slo.itl", 0, "undeclared reference to 'itl_p96' (did you mean 'itl_p95'?)"),
        ("itl_p95 > slo.itll", 10, "undeclared reference to 'slo.itll' (did you mean 'slo.itl'?)"),
        ("kv > 0.5 && wait > 3 && itl_p95", 21, "cannot apply '&&' to (bool, double)"),
        ("wait > 3 && oops > 1", 12, "undeclared reference to 'oops'"),
        ("kv + 1", 0, "must be a condition (true or false), but is double"),
        ("kv >", 4, "something is missing at the end"),
        ("has(kv)", 0, "has(...): expressions have no functions and no macros"),
        ("wait > 1 && [1].all(x, x > 1)", 12, "unexpected character '['"),
        ("kv > 'a'", 5, "there is no text in expressions, only numbers"),
        ("1 < 2", 0, "names no input, so it can never change"),
        ("slo.itl > 1", 0, "names no input, so it can never change"),
        ("(" * 40 + "kv" + ")" * 40 + " > 0.5", 0, "nested too deeply"),
    ],
)
def test_faults_and_where(text: str, offset: int, message: str) -> None:
    assert (offset, message) in faults(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("kv > 80%", [(5, "write 0.8 for 80%: percentages are for fields")]),
        ("wait > 250ms", [(7, "write 0.25 for 250ms: durations are for fields, here are seconds")]),
        ("kv > 0.5 and not kv", [(9, "write && for 'and'"), (13, "write ! for 'not'")]),
        ("kv = 0.5", [(3, "write == for =")]),
        ("kv => 0.5", [(3, "write >= for =>")]),
        ("kv > 0,5", [(5, "write 0.5 for 0,5")]),
        ("kv > 0.5 & wait > 1", [(9, "write && for &")]),
        ("kv > 0.5 # full", [(9, "a comment begins with //")]),
        ('kv > "5s and 80%"', [(5, "there is no text in expressions, only numbers")]),
        ("  ", [(0, "empty: write a condition, such as `kv > 0.8`")]),
        ("KV > 0.5", [(0, "undeclared reference to 'KV' (did you mean 'kv'?)")]),
    ],
)
def test_habits_of_other_languages_are_told_what_to_write(text: str, found: list[tuple[int, str]]) -> None:
    assert faults(text) == found


def test_what_is_meant_is_taken() -> None:
    condition('kv > 0.5 // at 80%, "full" = 1, and then some')
    assert compile_expression("and > 1.0", {"and": None}, "bool").names == ("and",)


def test_all_faults_at_once() -> None:
    assert [offset for offset, _ in faults("foo > 1 && bar > 2\n  && baz > 3")] == [0, 11, 24]


def test_length() -> None:
    text = "kv > 0.5 " + " " * MAX_LENGTH
    assert faults(text)[0][1] == f"expression of {len(text)} characters: at most 500"
    condition(text[:MAX_LENGTH])


@pytest.mark.parametrize("text", ["kv > 80", "80 < kv", "kv > -1", "wait > 1 && (kv) > 0.5 && kv <= 1.5"])
def test_implausible_thresholds(text: str) -> None:
    assert "is outside the plausible range of kv_occupancy (0 to 1 ratio)" in faults(text)[0][1]


def test_percent_as_a_plain_number_gets_the_right_hint() -> None:
    assert faults("kv > 80") == [
        (
            5,
            "threshold 80 is outside the plausible range of kv_occupancy (0 to 1 ratio); write 0.8 for 80 percent",
        )
    ]


def test_thresholds_that_can_never_be_crossed() -> None:
    assert "is never true" in faults("kv > 1")[0][1]
    assert "is never true" in faults("0 > kv")[0][1]


@pytest.mark.parametrize("text", ["kv * 100 > 80", "wait > 80", "kv >= 1", "kv - -1 > 0.5", "2 * kv > 1.5"])
def test_plausible_thresholds(text: str) -> None:
    condition(text)


def test_slo_of_a_class() -> None:
    assert compile_expression("itl_p95 > slo.chat.itl", INPUTS, "bool").names == ("itl_p95", "slo.chat.itl")
    assert compile_expression("itl_p95 > slo.chat.itl", INPUTS, "bool", ["chat"])
    assert faults("itl_p95 > slo.chat.itl", ["batch"])[0][0] == 10
    assert faults("itl_p95 > slo.chat.speed")[0][0] == 10
    assert faults("itl_p95 > slo.chta.itl", ["chat"]) == [
        (10, "undeclared reference to 'slo.chta.itl' (did you mean 'slo.chat.itl'?)")
    ]


@pytest.mark.parametrize(
    ("written", "klass"),
    [
        ('slo["batch-low"].itl', "batch-low"),
        ("slo[ 'batch-low' ] . itl", "batch-low"),
        ('slo["b.c"].itl', "b.c"),
        ("slo.b.c.itl", "b.c"),
        ('slo["7b"].itl', "7b"),
        ("slo.in.itl", "in"),
        ('slo["chat"].itl', "chat"),
    ],
)
def test_a_class_whose_name_is_no_plain_word_stands_in_quotes(written: str, klass: str) -> None:
    expression = compile_expression(f"itl_p95 - {written} > 3", INPUTS, "bool", [klass])
    variable = f"slo.{klass}.itl"
    assert expression.names == ("itl_p95", variable)
    assert expression.evaluate({"itl_p95": 9.0, variable: 2.0}) is True
    assert expression.evaluate({"itl_p95": 9.0, variable: 7.0}) is False
    assert expression.evaluate({"itl_p95": 9.0}) == Missing("not_provided")


@pytest.mark.parametrize("classes", [None, ["batch-low", "chat"]])
def test_a_class_with_a_dash_without_quotes_is_one_mistake_with_what_to_write(
    classes: list[str] | None,
) -> None:
    assert faults("kv > 0.5 && itl_p95 > slo.batch-low.itl && oops > 1", classes) == [
        (22, "'slo.batch-low.itl' is a subtraction: write slo[\"batch-low\"].itl"),
        (43, "undeclared reference to 'oops'"),
    ]
    assert compile_expression("itl_p95 > slo.chat.itl-slo.chat.ttft", INPUTS, "bool", classes)


def test_an_unknown_class_in_quotes_is_named_where_it_stands() -> None:
    assert faults('itl_p95 > slo["batch-lo"].itl && oops > 1', ["batch-low"]) == [
        (10, "undeclared reference to 'slo.batch-lo.itl' (did you mean 'slo[\"batch-low\"].itl'?)"),
        (33, "undeclared reference to 'oops'"),
    ]


@given(st.text(max_size=60) | st.text("kv itl_p95slo.0123456789<>=!&|?:()+-*/%\n\"'[]", max_size=60))
def test_any_text_is_an_expression_or_an_error_inside_it(text: str) -> None:
    try:
        expression = condition(text)
    except ExpressionError as error:
        assert error.faults  # noqa: PT017
        assert all(0 <= fault.offset <= len(text) and fault.message for fault in error.faults)  # noqa: PT017
    else:
        answer = expression.evaluate(
            {"kv": 0.5, "itl_p95": 0.1, "wait": 3.0, "slo.itl": 0.05, "slo.ttft": 1.0}
        )
        assert isinstance(answer, bool | Missing)


def test_slo_lowest_is_known_whatever_the_classes_are_called() -> None:
    expression = compile_expression("wait > slo.lowest.ttft", INPUTS, "bool", ["batch", "interactive"])
    assert expression.names == ("slo.lowest.ttft", "wait")
    assert expression.evaluate({"wait": 3.0, "slo.lowest.ttft": 2.0}) is True
    assert expression.evaluate({"wait": 3.0}) == Missing("not_provided")
    assert "undeclared reference" in faults("wait > slo.highest.ttft", ["batch"])[0][1]
    assert "undeclared reference" in faults("wait > slo.lowest", ["batch"])[0][1]
