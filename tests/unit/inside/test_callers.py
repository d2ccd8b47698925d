"""The caller map: who gets which class, and that no request can break it."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpilot.inside.callers import MAX_NAME_BYTES, Callers, CallersError, Tag
from kvpilot.link.controls import Lease, Scope, decode_slot, encode_slot

KEY = "sk-acme-1"
MAP = {
    "classes": {"batch": 0, "interactive": 1},
    "default": "batch",
    "keys": {hashlib.sha256(KEY.encode()).hexdigest(): {"class": "interactive", "tenant": "acme"}},
}


@pytest.fixture
def load(tmp_path: Path):
    def load(raw: object) -> Callers:
        path = tmp_path / "callers.json"
        path.write_text(raw if isinstance(raw, str) else json.dumps(raw))
        return Callers.load(path)

    return load


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"x"), (b"authorization", b"Bearer " + key.encode())]


class TestKeys:
    def test_a_known_key(self, load) -> None:
        assert load(MAP).classify(bearer(KEY)) == Tag("interactive", 1, "acme")

    @pytest.mark.parametrize(
        "headers", [[], bearer("sk-other"), [(b"authorization", b"Basic " + KEY.encode())]]
    )
    def test_an_unknown_caller_gets_the_default_class(self, load, headers) -> None:
        assert load(MAP).classify(headers) == Tag("batch", 0, "")

    def test_the_default_is_the_lowest_class_if_none_is_named(self, load) -> None:
        assert load({"classes": {"high": 1, "low": 0}}).classify([]) == Tag("low", 0, "")

    def test_without_a_header_configured_no_header_is_believed(self, load) -> None:
        assert load(MAP).classify([(b"x-kvpilot-caller", b"interactive")]).class_name == "batch"

    def test_without_a_file_everybody_is_equal(self) -> None:
        callers = Callers.load(None)
        assert callers.classes == ("default",)
        assert callers.classify(bearer(KEY)) == Tag("default", 0, "")


class TestTrustedHeader:
    def classify(self, load, value: bytes, **more: object) -> Tag:
        return load({**MAP, "header": "X-Kvpilot-Caller", **more}).classify([(b"x-kvpilot-caller", value)])

    def test_names_the_class(self, load) -> None:
        assert self.classify(load, b" interactive ") == Tag("interactive", 1, "")

    def test_names_class_and_tenant(self, load) -> None:
        assert self.classify(load, b"interactive/acme") == Tag("interactive", 1, "acme")
        assert self.classify(load, b"batch/globex", tenants=["globex"]) == Tag("batch", 0, "globex")

    def test_an_unknown_class_is_the_default(self, load) -> None:
        assert self.classify(load, b"root/acme") == Tag("batch", 0, "acme")

    def test_a_tenant_nobody_configured_is_hashed_and_always_the_same(self, load) -> None:
        first, again = self.classify(load, b"batch/initech"), self.classify(load, b"batch/initech")
        assert first == again
        assert "initech" not in first.tenant
        assert first.tenant != self.classify(load, b"batch/hooli").tenant
        assert (
            first.tenant != self.classify(load, b"batch/initech", tenants=["x"]).tenant
        )  # the file is the salt

    def test_wins_over_the_key(self, load) -> None:
        callers = load({**MAP, "header": "x-kvpilot-caller"})
        assert callers.classify([*bearer(KEY), (b"x-kvpilot-caller", b"batch")]) == Tag("batch", 0, "")


def test_every_tenant_fits_a_lease() -> None:
    callers = Callers({"a": 0}, header="h", tenants=["t" * MAX_NAME_BYTES])
    for value in (b"a/" + b"t" * MAX_NAME_BYTES, b"a/unknown"):
        tenant = callers.classify([(b"h", value)]).tenant
        (lease,) = decode_slot(encode_slot(1, 1, [Lease("k", Scope("tenant", tenant), 1, 1, 1)])).leases
        assert lease.scope.argument == tenant


@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"authorization", b"x-kvpilot-caller", b""]) | st.binary(max_size=20),
            st.binary(max_size=200)
            | st.binary(max_size=50).map(lambda b: b"Bearer " + b)
            | st.just(b"a" * 100_000),
        ),
        max_size=8,
    ),
    st.booleans(),
)
def test_hostile_headers_cannot_raise(headers: list[tuple[bytes, bytes]], trusted: bool) -> None:
    keys = {digest: (entry["class"], entry["tenant"]) for digest, entry in MAP["keys"].items()}
    callers = Callers(MAP["classes"], "batch", "x-kvpilot-caller" if trusted else None, keys)
    tag = callers.classify(headers)
    assert tag.class_name in callers.classes
    assert callers.classes[tag.level] == tag.class_name
    assert len(tag.tenant.encode()) <= MAX_NAME_BYTES
    assert tag.tenant.isprintable()


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([], "one JSON object"),
        ({}, "classes"),
        ({"classes": {}}, "between 1 and 8"),
        ({"classes": {f"c{i}": i for i in range(9)}}, "between 1 and 8"),
        ({"classes": {"a": 0, "b": 2}}, "without gaps"),
        ({"classes": {"a": 0, "b": 0}}, "each once"),
        ({"classes": {"a": "0"}}, "whole number"),
        ({"classes": {"a": True}}, "whole number"),
        ({"classes": {"a/b": 0}}, "slash"),
        ({"classes": {"a" * 33: 0}}, "longer than 32"),
        ({**MAP, "default": "gold"}, "'gold' is no class"),
        ({**MAP, "default": 1}, "class name"),
        ({**MAP, "header": 7}, "header name"),
        ({**MAP, "header": "é"}, "header name"),
        ({**MAP, "keys": []}, "SHA-256"),
        ({**MAP, "keys": {"sk-clear": {"class": "batch"}}}, "never write the key itself"),
        ({**MAP, "keys": {"0" * 64: {"class": "gold"}}}, "one of batch, interactive"),
        ({**MAP, "keys": {"0" * 64: {"class": ["batch"]}}}, "one of batch, interactive"),
        ({**MAP, "keys": {"0" * 64: {"class": "batch", "tenant": "\n"}}}, "printable"),
        ({**MAP, "tenants": "acme"}, "list of names"),
        ({**MAP, "klasses": {}}, "unknown entry 'klasses'"),
    ],
)
def test_a_bad_file_is_one_clear_line(load, raw: object, says: str) -> None:
    with pytest.raises(CallersError) as caught:
        load(raw)
    message = str(caught.value)
    assert says in message
    assert message.startswith("callers file ")
    assert "\n" not in message
    assert "sk-clear" not in message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.fixed_dictionaries(
        {"classes": json_values | st.just({"a": 0})},
        optional=dict.fromkeys(("default", "header", "keys", "tenants"), json_values),
    )
)
def test_any_json_is_a_map_or_a_callers_error(tmp_path_factory: pytest.TempPathFactory, raw: object) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(raw))
    try:
        callers = Callers.load(path)
    except CallersError:
        return
    assert callers.classify([]) == callers.default


def test_a_missing_file_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(CallersError, match="No such file"):
        Callers.load(tmp_path / "none.json")
