"""Whatever the bytes: a policy, or errors with places, soon, and never a traceback."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvpilot.policy.files import File, Gathered, PolicyText
from kvpilot.policy.load import Loaded, PolicyErrors, load_gathered
from kvpilot.policy.source import MAX_BYTES, Source
from kvpilot.policy.testing import run_case

ROOT = Path(__file__).parents[3]
FULL = (Path(__file__).parent / "every_clause.yaml").read_text()
TEXTS = [FULL, *(path.read_text() for path in sorted((ROOT / "policies").glob("*.yaml")))]
HEAD = FULL.split("  rules:\n")[0]
WITHOUT_TESTS = FULL.split("tests:\n")[0]
SOON_S = 5.0
FEW_TICKS = 500

thorough = settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])


def load(raw: bytes, tests: bytes | None = None) -> list[Loaded]:
    """What loading gives; what it says when it refuses must be fit to print."""
    beside = None if tests is None else File(Path("p.test.yaml"), tests)
    try:
        return load_gathered(Gathered((PolicyText(File(Path("p.yaml"), raw), beside),), ()), ["batch"])
    except PolicyErrors as found:
        assert found.problems  # noqa: PT017
        texts = {"p.yaml": raw, "p.test.yaml": tests or b""}
        length = {path: text.count(b"\n") + text.count(b"\r") + 1 for path, text in texts.items()}
        for problem in found.problems:
            assert 1 <= problem.line <= length[problem.path]
            assert problem.column >= 1
            assert str(problem).isprintable()
            assert len(str(problem)) < 3_000
        return []


def fly(loaded: list[Loaded]) -> None:
    """What can be loaded can be run."""
    for one in loaded:
        for case in one.cases:
            if case.ticks <= FEW_TICKS:
                run_case(one.policy, case)


@st.composite
def torn(draw: st.DrawFn) -> bytes:
    """A good file with a few stretches replaced."""
    text = draw(st.sampled_from(TEXTS))
    words = [
        "",
        "[]",
        "{}",
        "~",
        "-1",
        "1e9",
        "on",
        "%",
        "\t",
        ": ",
        "- ",
        "\x00",
        "é",
        "'",
        "set",
        "&a",
        "*a",
    ]
    words += ["9" * 30, "0", "inf", ".nan", "!!binary", "|", ">", "? ", "5s", "slo.itl", "\ud800", "\r", "#"]
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = start + draw(st.integers(0, 12))
        text = text[:start] + draw(st.sampled_from(words) | st.text(max_size=4)) + text[end:]
    return text.encode("utf-8", "surrogatepass")


@thorough
@given(
    torn() | st.binary(max_size=200) | st.text(max_size=200).map(lambda text: HEAD.encode() + text.encode())
)
def test_any_bytes(raw: bytes) -> None:
    fly(load(raw))
    load(FULL.encode(), tests=raw)


ODD: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**17), 10**17)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6)
    | st.sampled_from(["itl", "kv", "all", "top", "lowest", "batch", "5s", "0s", "24h", "10%", "-10%", "0"])
    | st.sampled_from(["kv > 0.5", "1/0 > kv", "slo.itl", "kv", "itl % 2 > 1", "kv == kv", "!(kv > 1 - 1)"])
    | st.sampled_from(["step-down", "drafts", "shed_fraction", "admission_credits", "max_running", "1x9"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=4,
)


def paths(value: object, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ())
    return [here, *(path for key, item in items for path in paths(item, (*here, key)))]


DOCUMENT = Source("full", FULL.encode()).data()
PLACES = paths(DOCUMENT)[1:]


@st.composite
def odd_values(draw: st.DrawFn) -> bytes:
    """The right shape with a few values that do not belong: as a value, as one more key, or gone."""
    document = json.loads(json.dumps(DOCUMENT))
    for path in draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=3)):
        parent = document
        try:
            for step in path[:-1]:
                parent = parent[step]
            if draw(st.booleans()):
                parent[path[-1]] = draw(ODD)
            elif draw(st.booleans()):
                del parent[path[-1]]
            else:
                parent[draw(st.sampled_from([path[-1], "knob", "set", "when", "x"]))] = draw(ODD)
        except (KeyError, IndexError, TypeError):
            continue
    return json.dumps(document).encode()


@thorough
@given(odd_values())
def test_any_values_in_the_right_shape(raw: bytes) -> None:
    fly(load(raw))


def many(rule: str, count: int) -> str:
    return HEAD + "  rules:\n" + "".join(f"    - {rule.replace('N', str(i))}\n" for i in range(count))


def cases(case: str, count: int) -> str:
    return WITHOUT_TESTS + "tests:\n" + f"  - {case}\n" * count


HOSTILE = {
    "bomb of aliases": "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i},*a{i}]\n" for i in range(60)),
    "an alias of itself": "a: &a [*a]\n",
    "aliases": "a: &a x\nb: [" + "*a," * 20_000 + "]",
    "merge keys": "a: &a {b: 1}\nc: {<<: *a}\n",
    "deep maps": "{a: " * 10_000,
    "deep lists": "[" * 30_000,
    "deep dashes": "- " * 30_000,
    "deep keys": "? " * 30_000,
    "wide list": "[" + "[]," * 20_000,
    "unknown keys": "".join(f"k{i}: 1\n" for i in range(6_000)),
    "keys that are nearly right": "".join(f"kinds{i}: 1\n" for i in range(4_000)),
    "one key again and again": "a: 1\n" * 13_000,
    "a huge number": "a: " + "9" * 60_000,
    "a huge exponent": FULL.replace("priority: 1000", "priority: 1e999999999"),
    "a long name": FULL.replace("name: every-clause", "name: " + "a" * 50_000),
    "a long key": FULL.replace("  mode:", f"  {'k' * 900}: 1\n  mode:"),
    "controls in a key": FULL.replace("  mode:", '  "a\\x1b[2J\\nb": 1\n  mode:'),
    "NUL": FULL.replace("mode", "mo\0de"),
    "a byte order mark inside": FULL.replace("mode", "mo\ufeffde"),
    "UTF-16": FULL,
    "a line of 10 MB": "a: " + "x" * 10_000_000,
    "many inputs": HEAD + "".join(f"    i{i}: {{signal: x{i}}}\n" for i in range(1_500)),
    "many rules": many("{name: rN, when: kw > 1, do: [{knob: max_runnin, set: 1}]}", 700),
    "rules against each other": many("{name: rN, when: kv > 1, do: [{knob: max_running, add: 1}]}", 800),
    "brackets": many(f"{{name: rN, when: '{'(' * 240}kv{')' * 240} > 1', do: []}}", 100),
    "signs": many(f"{{name: rN, when: 'kv > {'-' * 480}1', do: []}}", 100),
    "choices": many(f"{{name: rN, when: '{'kv > 1 ? ' * 50}', do: []}}", 100),
    "alternatives": many(f"{{name: rN, when: '{' && '.join(['(kv > 1 || itl > 1)'] * 20)}', do: []}}", 100),
    "long series": cases("{name: t, series: {kv: 1x99999}, expect: [{at: 1s}]}", 900),
    "many items": cases(f"{{name: t, series: {{kv: {'1x9 ' * 9_000}}}, expect: [{{at: 1s}}]}}", 1),
    "wrong tests": cases("{name: t, series: {x: y}, expect: [{at: 1}]}", 1_000),
    "a deep slo": cases(f"{{name: t, slo: {'{a: ' * 30}1{'}' * 30}, series: {{kv: 1}}, expect: []}}", 1),
    "folded": "a: >\n" + " x\n" * 20_000,
    "escapes": 'a: "' + "\\x41" * 12_000 + '"',
    "a comment": "#" * 60_000,
    "directives": "%YAML 1.1\n%TAG ! tag:x,2000:\n---\n" + FULL,
    "python": "!!python/object/apply:os.system [x]\n",
    "documents": "--- a\n" * 5_000,
    "hashes": "".join(f"? {{a: {i}}}\n: 1\n" for i in range(3_000)),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_or_loaded_soon(name: str) -> None:
    raw = HOSTILE[name].encode("utf-16" if name == "UTF-16" else "utf-8")
    for place in ("policy", "tests"):
        began_s = time.process_time()
        loaded = load(raw) if place == "policy" else load(WITHOUT_TESTS.encode(), tests=raw)
        assert time.process_time() - began_s < SOON_S
        assert not loaded or name in ("long series", "many items", "directives"), place


def run(*arguments: str | bytes, **environ: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "kvpilot", *arguments],
        capture_output=True,
        timeout=60,
        env={**os.environ, **environ},
        check=False,
    )


@pytest.mark.parametrize("command", ["check", "test"])
def test_the_commands_never_show_a_traceback(tmp_path: Path, command: str) -> None:
    """Also where a name is no text, and a terminal knows ASCII alone."""
    named = os.fsencode(tmp_path) + b"/\xff\xc3.yaml"
    with open(named, "wb") as file:
        file.write(FULL.replace("mode: enforce", "modé: enforce").encode())
    (tmp_path / "bytes.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "big.yaml").write_bytes(b"a" * (MAX_BYTES + 1))
    (tmp_path / "escape.yaml").write_text(HOSTILE["controls in a key"])
    done = run(command, str(tmp_path), named, PYTHONIOENCODING="ascii:strict")
    assert done.returncode == 1
    assert b"Traceback" not in done.stdout + done.stderr
    assert "\\udcff\\udcc3.yaml:9:3: unknown key 'modé' (did you mean 'mode'?)".encode() in done.stdout
    assert b"\x1b" not in done.stdout
    assert rb"unknown key 'a\x1b[2J\nb'" in done.stdout
    assert done.stderr == b""
