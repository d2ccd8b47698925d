"""`kvpilot run` as a child of a test, in a folder of its own, and a receiver for what it tells."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

PATIENCE_S = 30.0


def eventually(predicate: Callable[[], Any], within_s: float = PATIENCE_S) -> Any:
    """What `predicate` gives once it is true; fails if it never is."""
    wait = threading.Event()
    for _ in range(round(within_s / 0.01)):
        if found := predicate():
            return found
        wait.wait(0.01)
    raise AssertionError("it never came about")


class PilotProcess:
    """A folder with a configuration and policies, and the pilots started in it. `environ` names the link."""

    def __init__(self, folder: Path, environ: Mapping[str, str], policies: Path | None = None) -> None:
        self.folder = folder
        self.policies = policies or folder / "policies"
        self.policies.mkdir(mode=0o750, exist_ok=True)
        self.environ = dict(environ)
        self.children: list[subprocess.Popen[str]] = []
        self.configure()

    def configure(self, **changes: Any) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        config = {
            "classes": [{"name": "default", "ttft": 1.0, "itl": 0.05}],
            "policies": str(self.policies),
            "arm": {"after": 0, "finished": 0},
            "api": {"port": self.port},
            "journal": "journal.sqlite",
            "socket": "pilot.sock",
            **changes,
        }
        (self.folder / "kvpilot.yaml").write_text(json.dumps(config))

    def pilot(self, **environ: str) -> subprocess.Popen[str]:
        self.children.append(
            subprocess.Popen(
                [sys.executable, "-m", "kvpilot", "run", "--config", str(self.folder / "kvpilot.yaml")],
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, **self.environ, **environ},
            )
        )
        return self.children[-1]

    def flying(self) -> subprocess.Popen[str]:
        child = self.pilot()
        eventually(lambda: child.poll() is not None or self.get("/healthz"))
        assert child.poll() is None, child.communicate()[1]
        return child

    def get(self, path: str) -> httpx.Response | None:
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}{path}", timeout=5, trust_env=False)
        except httpx.HTTPError:
            return None

    def status(self) -> dict[str, Any]:
        answer = self.get("/status")
        return answer.json() if answer is not None else {}

    def metric(self, name: str) -> list[float]:
        answer = self.get("/metrics")
        families = text_string_to_metric_families(answer.text) if answer is not None else ()
        return [sample.value for family in families if family.name == name for sample in family.samples]

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "kvpilot", *arguments, "--config", str(self.folder / "kvpilot.yaml")],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            env={**os.environ, **self.environ},
            check=False,
        )

    def close(self) -> None:
        for child in self.children:
            child.kill()
            child.wait()
            if child.stderr is not None:
                child.stderr.close()


def ended(child: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = child.communicate(timeout=PATIENCE_S)
    return child.returncode, err


class Webhook(ThreadingHTTPServer):
    """Keeps the bodies it is sent."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)

    def alerts(self) -> list[tuple[str, str]]:
        return [(body["alerts"][0]["labels"]["alertname"], body["status"]) for body in self.bodies]
