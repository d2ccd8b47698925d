"""`kvpilot plan` as people type it; and docs/plan.md, command by command."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kvpilot.commands import app

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/plan.md").read_text()
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLE = "--device-memory 80GB --weights 14GB --kv-bytes-per-token 0.5MB --block-size 16"


def run(line: str) -> Any:
    return CliRunner().invoke(app, ["plan", *shlex.split(line)])


def plan(line: str) -> dict[str, Any]:
    done = run(f"{line} --json")
    assert done.exit_code == 0, done.output
    assert len(done.stdout.splitlines()) == 1
    return dict(json.loads(done.stdout))


def test_the_issue_s_example_in_json() -> None:
    said = plan(f"{EXAMPLE} --kv-memory 50GB")
    assert (said["kv_tokens"], said["block_bytes"], said["kv_blocks"]) == (100_000, 8_000_000, 6_250)
    assert (said["kv_bytes"], said["activation_bytes"]) == (50 * 10**9, 16 * 10**9)
    assert said["max_sequences"] == 6_250 // 256


def test_a_fraction_is_of_what_remains_after_weights_and_says_so() -> None:
    said = plan(f"{EXAMPLE} --kv-fraction 0.6")
    assert said["kv_bytes"] == 39_600_000_000
    assert "KV is 60 % of the 66 GB that remain after weights" in said["notes"]
    assert "KV is 60 % of the 66 GB that remain after weights" in run(f"{EXAMPLE} --kv-fraction 0.6").stdout


def test_a_model_directory_is_planned_as_its_name_is(tmp_path: Path) -> None:
    from kvengine.kv.plan.published import PUBLISHED

    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["llama-3.1-70b"]))
    options = "--device h200 --tp 2 --kv-dtype fp8"
    by_name, by_file = plan(f"llama-3.1-70b {options}"), plan(f"{tmp_path} {options}")
    assert by_file.pop("model") == tmp_path.name
    assert by_name.pop("model") == "llama-3.1-70b"
    assert by_name == by_file
    parts = ("weights_bytes", "reserve_bytes", "kv_bytes", "activation_bytes", "unused_bytes")
    assert sum(by_name[part] for part in parts) == by_name["memory_bytes"] == 143_771 * 2**20
    assert by_name["reserve_bytes"] == 5 * 2**30
    changes = [other["change"] for other in by_name["alternatives"]]
    assert changes == ["chunk 1,024", "chunk 4,096", "KV in bf16", "KV in int4", "block of 8", "block of 32"]
    halved = next(other for other in by_name["alternatives"] if other["change"] == "KV in bf16")
    assert halved["kv_tokens"] == pytest.approx(by_name["kv_tokens"] / 2, abs=16)


def test_what_is_kept_free_is_said_and_can_be_chosen() -> None:
    on_table = plan("llama-3.1-8b --device h100")
    assert on_table["reserve_bytes"] == 3 * 2**30
    assert plan("llama-3.1-8b --device h100 --reserve 0")["reserve_bytes"] == 0
    assert plan("llama-3.1-8b --device-memory 80GB")["reserve_bytes"] == 0


def test_the_engine_s_own_model_fits_where_the_engine_starts() -> None:
    """The shipped model, in the engine's precision, in the engine's default memory."""
    target = ROOT / "engine/kvengine/weights/target"
    said = plan(f"{target} --device-memory 256MiB --weight-dtype fp32 --kv-dtype fp32")
    assert said["kv_bytes_per_token"] == 6 * 2 * 4 * 32 * 4
    assert said["sequence_tokens"] == 2048


def test_what_does_not_apply_is_null_not_zero() -> None:
    said = plan(f"{EXAMPLE} --kv-memory 50GB")
    assert [said[key] for key in ("model", "device", "kv_dtype", "chunk_tokens", "window")] == [None] * 5


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "which device?"),
        ("llama-3.1-8b", "which device?"),
        ("llama-3.1-8b --device h200 --device-memory 80GB", "give one of them"),
        ("llama-3.1-8b --device h20", "did you mean h200?"),
        ("lama-3.1-8b --device h200", "did you mean llama-3.1-8b?"),
        (
            "llama-3.1-70b --device h100",
            "141.11 GB of weights and 3.22 GB kept free do not fit into 85.52 GB",
        ),
        ("qwen2.5-7b --device h100 --tp 8", "--tp 8: does not divide the 28 attention heads"),
        ("llama-3.1-8b --device h100 --kv-dtype fp9", "did you mean fp8?"),
        ("llama-3.1-8b --device h100 --weight-dtype q4", "--weight-dtype q4: known are"),
        ("llama-3.1-8b --device h100 --block-size 24", "block_size=24: a power of two"),
        ("mistral-7b-v0.1 --device h100 --block-size 8192", "window=4096: smaller than a block of 8192"),
        ("llama-3.1-8b --device h100 --window 8", "window=8: smaller than a block of 16"),
        ("llama-3.1-8b --device l4 --length 131072", "a sequence needs 8,192 blocks, the pool has"),
        (f"{EXAMPLE} --kv-memory 70GB", "70 GB of KV do not fit into the 66 GB"),
        (f"{EXAMPLE} --kv-memory 50gb", "--kv-memory '50gb' is not a size"),
        (f"{EXAMPLE} --kv-fraction 1", "--kv-fraction 1: a share"),
        (f"{EXAMPLE} --kv-memory 50GB --kv-dtype fp8", "need a model"),
        (f"{EXAMPLE} --kv-memory 50GB --kv-dtype fp9", "did you mean fp8?"),
    ],
)
def test_what_cannot_work_is_one_line(line: str, says: str) -> None:
    done = run(line)
    assert done.exit_code == 1
    assert done.output.startswith("kvpilot: ")
    assert len(done.output.strip().splitlines()) == 1
    assert says in done.output


def test_a_refusal_goes_to_stderr() -> None:
    """Where a program that reads the JSON does not take it for an answer."""
    command = [sys.executable, "-m", "kvpilot", "plan", "llama-3.1-70b", "--device", "h100", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("kvpilot: 141.11 GB of weights")


def test_the_tables_can_be_listed() -> None:
    shown = run("--list")
    assert shown.exit_code == 0
    listed = json.loads(run("--list --json").stdout)
    for name in (*(device["name"] for device in listed["devices"]), *listed["models"]):
        assert name in shown.stdout
    assert all(device["flops"]["bf16"] > 10**13 and device["source"] for device in listed["devices"])


def examples() -> list[tuple[str, str]]:
    """Each command of the page, with what the page says that it prints."""
    blocks = FENCE.findall(PAGE)
    pairs = zip(blocks, [*blocks[1:], ("", "")], strict=True)
    return [(text.strip(), after) for (kind, text), (_, after) in pairs if kind == "sh"]


@pytest.mark.parametrize(("command", "printed"), examples())
def test_the_page_s_commands_print_what_it_says(command: str, printed: str) -> None:
    program, verb, *rest = shlex.split(command, comments=True)
    assert (program, verb) == ("kvpilot", "plan")
    done = CliRunner().invoke(app, ["plan", *rest])
    assert [line.rstrip() for line in done.output.splitlines()] == [
        line.rstrip() for line in printed.splitlines()
    ]


def test_the_page_has_examples_of_both_kinds_and_of_a_refusal() -> None:
    commands = [command for command, _ in examples()]
    assert any("--kv-memory" in command for command in commands)
    assert any("--device h200 --tp 2" in command for command in commands)
    assert any(printed.startswith("kvpilot: ") for _, printed in examples())
