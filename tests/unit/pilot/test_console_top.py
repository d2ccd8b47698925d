"""`kvpilot top`: where it looks, and one line where there is nothing to see."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvpilot.api.console.follow import NoPilot, frames
from kvpilot.commands import app
from kvpilot.config import ConfigError
from kvpilot.top_command import _address


def configured(folder: Path, api: str) -> Path:
    path = folder / "kvpilot.yaml"
    path.write_text(
        f"engine: {{name: e, telemetry: {folder}, controls: {folder}}}\n"
        f"classes: [{{name: a, ttft: 1s, itl: 40ms}}]\napi: {api}\n"
    )
    return path


@pytest.mark.parametrize(
    ("api", "address"),
    [
        ("{}", "http://127.0.0.1:9477"),
        ("{host: 0.0.0.0, port: 8080}", "http://127.0.0.1:8080"),
        ('{host: "::", port: 8080}', "http://[::1]:8080"),
        ("{host: 10.0.0.7}", "http://10.0.0.7:9477"),
    ],
)
def test_it_looks_where_the_configured_pilot_listens(tmp_path: Path, api: str, address: str) -> None:
    assert _address(configured(tmp_path, api)) == address


def test_a_port_that_nobody_knows_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --url"):
        _address(configured(tmp_path, "{port: 0}"))


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "no address", "http://[", "ftp://127.0.0.1"])
def test_nobody_there_is_one_line(url: str) -> None:
    with pytest.raises(NoPilot) as caught:
        next(frames(url))
    assert len(str(caught.value).splitlines()) == 1
    assert url in str(caught.value)


def test_the_command_fails_with_that_line() -> None:
    done = CliRunner().invoke(app, ["top", "--once", "--url", "http://127.0.0.1:9"])
    assert done.exit_code == 1
    assert "kvpilot run" in done.output or "kvpilot run" in str(done.exception)
