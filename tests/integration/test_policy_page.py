"""docs/policy.md, followed by a stranger: its files, its commands in its order, and what they print.

A ```text block is what the commands above it print; where it says `live`, but for measured numbers.
A ```sh block that `stays` runs until the end, in a terminal of its own.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from pilot_process import eventually

from kvpilot.demo.processes import free_port

PAGE = Path(__file__).parents[2] / "docs/policy.md"
BIN = Path(sys.executable).parent
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MEASURED = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}"  # when
    r"|[\d.]+(?= s\b)"  # how long: a window is written without the space
    r"|\b(?:0|1|0\.\d+)\b(?=, | > 0\.8$)",  # KV occupancy
    re.MULTILINE,
)
ATTEMPTS = 30
"""Of a command that takes a second or so, until a running engine has come to where the page is."""

pytestmark = [pytest.mark.needs_program(name) for name in ("curl", "xargs", "bash")]


class Block(NamedTuple):
    language: str
    mark: str
    text: str

    @property
    def title(self) -> str:
        """The file that it is."""
        (title,) = re.findall(r'title="(.+)"', self.mark)
        return str(title)


class Terminal:
    """A folder, and shells in it with kvpilot on the path. `port` stands for the page's 8000."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        clean = {key: value for key, value in os.environ.items() if not key.startswith("KVPILOT_")}
        here = {"XDG_STATE_HOME": str(folder / "state"), "no_proxy": "localhost"}
        self._environ = {**clean, **here, "PATH": f"{BIN}:{os.environ['PATH']}"}
        self._staying: list[subprocess.Popen[bytes]] = []

    def run(self, commands: str) -> tuple[int, str]:
        """Exit code, and what a terminal shows."""
        done = subprocess.run(
            ["bash", "-c", self._here(commands)],
            cwd=self.folder,
            env=self._environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            check=False,
        )
        return done.returncode, done.stdout

    def stays(self, commands: str) -> Path:
        """Start it; where its output goes."""
        log = self.folder / f"{len(self._staying)}.log"
        with log.open("wb") as output:
            child = subprocess.Popen(
                ["bash", "-c", self._here(commands)],
                cwd=self.folder,
                env=self._environ,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._staying.append(child)
        return log

    def close(self) -> None:
        """Ctrl-C in each, last first; then what a closed window does."""
        for number in (signal.SIGINT, signal.SIGKILL):
            for child in reversed(self._staying):
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(10)

    def _here(self, commands: str) -> str:
        return commands.replace("8000", str(self.port))


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    terminal = Terminal(tmp_path)
    yield terminal
    terminal.close()


def blocks() -> list[Block]:
    return [Block(language, mark.strip(), text) for language, mark, text in FENCE.findall(PAGE.read_text())]


def shape(text: str) -> str:
    return MEASURED.sub("N", text.strip())


def up(terminal: Terminal, commands: str, log: Path) -> None:
    """Wait for what a reader sees before going on."""
    if "kvengine" in commands:
        eventually(lambda: "kvengine serves" in log.read_text())
    elif "kvpilot run" in commands:
        eventually(lambda: "armed: rules act" in log.read_text())


def show(terminal: Terminal, commands: str, expected: Block | None) -> None:
    """Run them, and hold what they print against the page."""
    if expected is None:
        code, shown = terminal.run(commands)
        assert (code, shown) == (0, ""), f"{commands}{shown}"
    elif expected.mark == "live":
        for _ in range(ATTEMPTS):
            shown = terminal.run(commands)[1]
            if shape(shown) == shape(expected.text):
                return
        assert shape(shown) == shape(expected.text), commands
    else:
        assert terminal.run(commands)[1] == expected.text, commands


def held(terminal: Terminal) -> dict[str, str]:
    """Who holds which knob."""
    code, shown = terminal.run("kvpilot status --json")
    assert code == 0, shown
    return {lease["knob"]: lease["policy"] for lease in json.loads(shown)["leases"]}


@pytest.mark.timeout(300)
def test_from_an_empty_file_to_a_policy_that_flies(terminal: Terminal) -> None:
    page = blocks()
    for block, following in zip(page, [*page[1:], None], strict=True):
        expected = following if following is not None and following.language == "text" else None
        if block.language == "yaml":
            api = "api: {port: 0}\n" if block.title == "kvpilot.yaml" else ""
            (terminal.folder / block.title).write_text(block.text + api)
        elif block.mark == "stays":
            up(terminal, block.text, terminal.stays(block.text))
        elif block.language == "sh":
            show(terminal, block.text, expected)
        check_what_it_says(terminal, block.text)


def check_what_it_says(terminal: Terminal, commands: str) -> None:
    """What the page says in words about what a command has done."""
    if commands.startswith("kvpilot override max_running=16"):
        eventually(lambda: held(terminal) == {"max_running": "override"}, 1)
    elif commands.startswith(("kvpilot off", "touch policies/off")):
        eventually(lambda: held(terminal) == {}, 1)
    elif commands == "kvpilot on\n":
        eventually(lambda: (held(terminal) == {}) == (terminal.folder / "policies/off").exists(), 1)


def test_every_file_of_the_page_has_its_modeline() -> None:
    for block in blocks():
        if block.language == "yaml" and block.title != "kvpilot.yaml":
            assert re.match(r"# yaml-language-server: \$schema=\S+\n", block.text), block.title
