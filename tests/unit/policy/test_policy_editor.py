"""The JSON Schemas: committed as they are generated, and true to what the loader takes."""

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvpilot.commands import app
from kvpilot.knobs import KNOBS
from kvpilot.policy.editor import as_text, schema_of_policies, schema_of_tests
from kvpilot.signals import AGGREGATIONS, SIGNALS

SHIPPED = Path(__file__).parents[3] / "policies"


@pytest.mark.parametrize("option", ["policy", "policy-tests"])
def test_the_committed_schema_is_what_the_command_prints(option: str) -> None:
    arguments = ["schema", "--tests"] if option == "policy-tests" else ["schema"]
    printed = CliRunner().invoke(app, arguments).stdout
    how = f"kvpilot {' '.join(arguments)} > policies/{option}.schema.json"
    assert (SHIPPED / f"{option}.schema.json").read_text() == printed, how
    assert printed == as_text(schema_of_tests() if option == "policy-tests" else schema_of_policies())


def test_every_name_of_the_catalogues_is_there_with_its_meaning() -> None:
    models = schema_of_policies()["$defs"]
    signal, knob = models["Input"]["properties"]["signal"], models["Do"]["properties"]["knob"]
    assert signal["enum"] == sorted(SIGNALS)
    assert knob["enum"] == sorted(KNOBS) == models["ChooseModel"]["properties"]["knob"]["enum"]
    for row, catalogue in ((signal, SIGNALS), (knob, KNOBS)):
        meanings = dict(zip(row["enum"], row["markdownEnumDescriptions"], strict=True))
        assert all(meanings[name].startswith(each.meaning) for name, each in catalogue.items())


def test_which_aggregation_fits_is_said_for_each_kind() -> None:
    rules = schema_of_policies()["$defs"]["Input"]["allOf"]
    for name, signal in SIGNALS.items():
        (fits,) = [r["then"] for r in rules if name in r["if"]["properties"]["signal"]["enum"]]
        assert fits["properties"]["agg"]["enum"] == list(AGGREGATIONS[signal.kind])


def nodes(value: Any) -> list[dict[str, Any]]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [*([value] if isinstance(value, dict) else []), *(node for item in inner for node in nodes(item))]


def test_defaults_are_written_as_people_would() -> None:
    """A lease of 15000000000 is what a program thinks of."""
    for node in nodes([schema_of_policies(), schema_of_tests()]):
        default = node.get("default")
        assert not isinstance(default, int) or isinstance(default, bool) or default < 10_000, node
    rule = schema_of_policies()["$defs"]["RuleModel"]["properties"]
    assert (rule["lease"]["default"], rule["for"]["default"]) == ("15s", "0s")


def test_unknown_keys_are_forbidden_everywhere() -> None:
    for model in schema_of_policies()["$defs"].values():
        assert model["additionalProperties"] is False
