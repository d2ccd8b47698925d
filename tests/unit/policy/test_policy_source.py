# ruff: noqa: E501 - tables of one error a line
"""YAML with positions: 1.2 scalars, exact places, and no exception whatever the bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.policy.source import Source


def load(text: str) -> object:
    source = Source("f.yaml", text.encode())
    assert not source.problems, source.problems
    return source.data()


def problems(raw: str | bytes) -> list[str]:
    return [
        str(problem) for problem in Source("f.yaml", raw.encode() if isinstance(raw, str) else raw).problems
    ]


def test_yaml_1_2_scalars() -> None:
    text = "{a: no, b: on, c: Yes, d: 12:30:45, e: 1e3, f: 0o17, g: ~, h: true, i: '1', j: -7, k: .5, l: 1_000, m: 2026-01-01}"
    assert load(text) == {
        "a": "no", "b": "on", "c": "Yes", "d": "12:30:45", "e": 1000.0, "f": "0o17", "g": None, "h": True,
        "i": "1", "j": -7, "k": 0.5, "l": "1_000", "m": "2026-01-01",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: 2\na: 3\n", "f.yaml:3:1: duplicate key 'a' (first on line 1)"),
        ("a: {b: 1, 'b': 2}", "f.yaml:1:11: duplicate key 'b' (first on line 1)"),
        ("a: &x 1\nb: *x\n", "f.yaml:1:4: anchors and aliases are not supported: write the value out"),
        (
            "a: !!python/object:os.system x",
            "f.yaml:1:4: tags are not supported: tag:yaml.org,2002:python/object:os.system",
        ),
        ("? [1]\n: 2", "f.yaml:1:3: a key must be a plain word"),
        (
            "a: [1",
            "f.yaml:1:6: not YAML: while parsing a flow sequence expected ',' or ']', but got '<stream end>'",
        ),
        (
            "a: 1\n---\nb: 2",
            "f.yaml:2:1: not YAML: expected a single document in the stream but found another document",
        ),
        ("a: 1e999", "f.yaml:1:4: number 1e999 is too long or not finite"),
        ("", "f.yaml:1:1: empty: a policy begins with `apiVersion: kvpilot.dev/v1alpha1`"),
        (b"a: \xff", "f.yaml:1:4: not UTF-8 text"),
        ('a: "x\\ud800"', "f.yaml:1:4: U+D800 is half a character"),
        ('"\\ud800": x', "f.yaml:1:1: U+D800 is half a character"),
        ("a: x\x85 b: c: d\n", "f.yaml:1:8: not YAML: mapping values are not allowed here"),
        ("ab\x01", "f.yaml:1:3: character U+0001 is not allowed"),
        ("[" * 1000, "f.yaml:1:1: nested too deeply: at most 40 levels"),
        ("[" * 60 + "]" * 60, "f.yaml:1:42: nested too deeply: at most 40 levels"),
        (b"a" * 70_000, "f.yaml:1:1: file of 70000 bytes: at most 65536"),
    ],
)
def test_problems(text: str | bytes, problem: str) -> None:
    assert problem in problems(text)


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("a: one two bad", 1, 12),
        ("a:   'one two bad'", 1, 15),
        ('a: "one two bad"', 1, 13),
        ("a: |\n  one\n  two bad\n", 3, 7),
        ("a: >-\n   one\n   two bad\n", 3, 8),
        ("a: one\n   two bad\n", 2, 8),
        ("b: {a: 1}\na: {b: x, c: one two bad}\n", 2, 22),
    ],
)
def test_the_place_inside_a_string(text: str, line: int, column: int) -> None:
    source = Source("f.yaml", text.encode())
    data = source.data()
    assert isinstance(data, dict)
    path = ("a",) if isinstance(data["a"], str) else ("a", "c")
    value = data["a"] if isinstance(data["a"], str) else data["a"]["c"]
    problem = source.inside(path, value.index("bad"), "!")
    assert (problem.line, problem.column) == (line, column)


@given(
    st.binary(max_size=200)
    | st.text(max_size=100).map(str.encode)
    | st.text("a1:-[]{}&*!|>'\"#%@`,? \n\t\\x", max_size=60).map(str.encode)
)
def test_any_bytes_are_data_or_problems(raw: bytes) -> None:
    source = Source("f.yaml", raw)
    if source.problems:
        assert source.data() is None
    for problem in source.problems:
        assert problem.line >= 1
        assert problem.column >= 1
        assert problem.message
