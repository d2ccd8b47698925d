"""The capability table: complete, true to the code it speaks of, and true to what runs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from link_pages import manifest
from typer.testing import CliRunner

from kvengine.config import EngineConfig
from kvengine.kv.plan import Plan
from kvengine.manifest import build_manifest
from kvpilot.adapters.capabilities import differences, missing_signals, ranks_seen
from kvpilot.adapters.known_engines import KNOWN, TENANTS
from kvpilot.clock import VirtualClock
from kvpilot.commands import app
from kvpilot.inside.hook import StepHook
from kvpilot.inside.vllm.outlook import IN_WORKERS
from kvpilot.inside.vllm.record import FIELDS
from kvpilot.knobs import KNOBS
from kvpilot.link.fields import STEP_FIELDS
from kvpilot.link.manifest import Manifest
from kvpilot.link.place import LinkPlace
from kvpilot.signals import SIGNALS


@pytest.mark.parametrize("kind", KNOWN)
def test_the_table_has_every_knob_and_every_signal(kind: str) -> None:
    known = KNOWN[kind]
    assert set(known.knobs) == set(KNOBS)
    assert set(known.signals) == {n for n, s in SIGNALS.items() if s.provider != "pilot"} | {TENANTS}
    assert all(capability.how for capability in (*known.knobs.values(), *known.signals.values()))


def kvengine(fields: tuple[str, ...] | None = None, **config: object) -> Manifest:
    return build_manifest(
        EngineConfig(**config),  # type: ignore[arg-type]
        Plan(1 << 30, 1 << 20, 16, 512, 64, 1 << 20),
        fields=fields or tuple(name for name in STEP_FIELDS if not name.startswith("controls")),
        max_model_len=100,
        activation_bytes_per_token=8192,
        device="cpu",
    )


def test_the_reference_engine_is_as_the_table_says() -> None:
    assert differences(KNOWN["kvengine"], kvengine()) == []
    assert differences(KNOWN["kvengine"], kvengine(draft=None)) == [], "speculation needs a draft model"


def vllm() -> Manifest:
    """As the plugin builds it, from its own lists."""
    fields = tuple(STEP_FIELDS[name] for name in FIELDS)
    knobs = tuple(
        replace(manifest().knobs[0], name=name)
        for name, knob in KNOBS.items()
        if knob.where == "engine" and not name.startswith("kv_")
    )
    lacking = dict.fromkeys(("device_free_bytes", "device_headroom_tokens", "oom"), IN_WORKERS)
    return replace(manifest(), engine="vllm", knobs=knobs, fields=fields, unsupported_signals=lacking)


def test_vllm_is_as_the_table_says_of_its_signals() -> None:
    assert differences(KNOWN["vllm"], vllm()) == []


def test_differences_are_found() -> None:
    """Both ways: what the table promises and the engine lacks, and the other way round."""
    lacking = replace(vllm(), knobs=vllm().knobs[1:], unsupported_signals={"steps": "it does not count"})
    lines = differences(KNOWN["vllm"], lacking)
    assert "knob max_running" in str(differences(KNOWN["vllm"], replace(vllm(), knobs=())))
    assert "signal steps: in the table, not in the manifest: it does not count" in lines
    more = replace(vllm(), fields=(*vllm().fields, STEP_FIELDS["oom_total"]), unsupported_signals={})
    assert "signal oom: in the manifest, not in the table" in differences(KNOWN["vllm"], more)


def test_a_signal_without_its_field_is_missing_with_that_reason() -> None:
    missing = missing_signals(manifest("time_ns", "running"))
    assert missing["requests_running"] is None
    assert missing["itl_seconds"] is None
    assert missing["kv_occupancy"] == missing["preemptions"] == "its records have no field for it"


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    for name in ("t", "c"):
        (tmp_path / name).mkdir(mode=0o750)
    return {
        "KVPILOT_TELEMETRY": f"{tmp_path}/t",
        "KVPILOT_CONTROLS": f"{tmp_path}/c",
        "KVPILOT_ENGINE": "pair",
    }


def run(environ: dict[str, str], *more: str) -> str:
    where = ["--telemetry", environ["KVPILOT_TELEMETRY"], "--engine", environ["KVPILOT_ENGINE"]]
    done = CliRunner().invoke(app, ["engines", *where, *more], env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    return done.stdout


def two_ranks(environ: dict[str, str]) -> None:
    """Both gone; the second cannot speculate."""
    for rank in (0, 1):
        hook = StepHook.open(
            replace(
                manifest(rank=rank), unsupported_knobs={"speculative_tokens": "no draft model is loaded"}
            ),
            environ,
            VirtualClock(),
        )
        hook.begin_step(1)
        hook.end_step((1, 2, 3, 4))
        hook.close()


def test_every_rank_that_wrote_is_seen(environ: dict[str, str]) -> None:
    two_ranks(environ)
    place = LinkPlace.from_environ(environ)
    assert place is not None
    ranks, problems = ranks_seen(place)
    assert [(rank.rank, rank.alive) for rank in ranks] == [(0, False), (1, False)]
    assert ranks[1].in_force == {
        "max_running": 32,
        "prefill_chunk_tokens": 512,
        "admission_watermark": 0.95,
    }
    assert problems == []
    for page in (Path(environ["KVPILOT_TELEMETRY"]) / "pair-0").iterdir():
        page.chmod(0o646)
    ranks, problems = ranks_seen(place)
    assert [rank.rank for rank in ranks] == [1]
    assert "writable by others" in problems[0]


def test_the_live_table(environ: dict[str, str]) -> None:
    two_ranks(environ)
    text = " ".join(run(environ).split())
    assert "rank 0" in text
    assert "rank 1" in text
    assert "max_running 1 32 64 requests step boundary" in text
    assert "speculative_tokens no: no draft model is loaded" in text
    assert "not preemptions: its records have no field for it" in text
    assert text.count("prefill_chunk_tokens") == 1, "ranks that are alike share one table"
    assert "valves: none lives" in text


def test_the_live_table_as_json(environ: dict[str, str]) -> None:
    two_ranks(environ)
    told = json.loads(run(environ, "--json"))
    assert (told["engine"], told["valves"]) == ("pair", 0)
    (first, _) = told["ranks"]
    assert first["knobs"]["max_running"]["in_force"] == 32
    assert first["unsupported_knobs"] == {"speculative_tokens": "no draft model is loaded"}
    assert "requests_running" in first["signals"]
    assert first["alive"] is False


def test_the_known_table_reads_at_100_columns() -> None:
    done = CliRunner().invoke(app, ["engines"], env={"COLUMNS": "100"})
    assert done.exit_code == 0
    assert max(len(line.rstrip()) for line in done.stdout.splitlines()) <= 100
    text = " ".join(done.stdout.split())
    assert "vllm run: 0.32.0, CPU, eager; only read: 0.14.0" in text
    told = json.loads(CliRunner().invoke(app, ["engines", "--json"]).stdout)
    assert {engine["kind"] for engine in told} == set(KNOWN)
    assert told[1]["knobs"]["max_running"]["since"] == "0.32.0"


def test_where_no_engine_has_written_is_one_line(environ: dict[str, str]) -> None:
    where = ["--telemetry", environ["KVPILOT_TELEMETRY"], "--engine", "nobody"]
    done = CliRunner().invoke(app, ["engines", *where])
    assert done.exit_code == 1
    assert "no engine nobody has written here" in done.output
