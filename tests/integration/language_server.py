"""The language server that editors run for YAML, installed once at a pinned version, driven as editors do."""

import fcntl
import json
import os
import queue
import shutil
import subprocess
import threading
from pathlib import Path
from typing import IO, Any

PATIENCE_S = 30.0
PINNED = Path(__file__).parent / "editor"
LANGUAGE_SERVER = "node_modules/yaml-language-server/bin/yaml-language-server"
SETTINGS = {
    "yaml": {"validate": True, "completion": True, "hover": True, "schemaStore": {"enable": False}},
    "http": {"proxyStrictSSL": False},
}
CAPABILITIES = {
    "textDocument": {
        "completion": {"completionItem": {"snippetSupport": True, "documentationFormat": ["markdown"]}},
        "hover": {"contentFormat": ["markdown"]},
        "publishDiagnostics": {"relatedInformation": False},
    },
    "workspace": {"configuration": True},
}


def installed() -> Path:
    """Where it is: in the cache, by `npm ci` from the lock file here. RuntimeError: npm's words."""
    version = json.loads((PINNED / "package.json").read_text())["dependencies"]["yaml-language-server"]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvpilot"
    folder = cache / f"yaml-language-server-{version}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ready = folder / ".ready"
        wanted = (PINNED / "package-lock.json").read_text()
        if not ready.exists() or ready.read_text() != wanted:
            for name in ("package.json", "package-lock.json"):
                shutil.copyfile(PINNED / name, folder / name)
            command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, timeout=110, check=False
            )
            if done.returncode != 0:
                raise RuntimeError(
                    f"npm cannot install yaml-language-server {version}: {done.stderr[-2000:]}"
                )
            ready.write_text(wanted)
    return folder / LANGUAGE_SERVER


class LanguageServer:
    """A running server, spoken to over its standard streams."""

    def __init__(self, program: Path, folder: Path) -> None:
        self._folder = folder
        self._process = subprocess.Popen(
            ["node", str(program), "--stdio"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=folder
        )
        self._number = 0
        self._replies: dict[int, queue.Queue[Any]] = {}
        self._diagnostics: dict[str, queue.Queue[list[dict[str, Any]]]] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        started = {"processId": os.getpid(), "rootUri": folder.as_uri(), "capabilities": CAPABILITIES}
        self.ask("initialize", started)
        self._tell("initialized", {})
        self._tell("workspace/didChangeConfiguration", {"settings": SETTINGS})

    def open(self, name: str, text: str) -> list[dict[str, Any]]:
        """Open a document as an editor does, and wait for what the server says is wrong with it."""
        uri = (self._folder / name).as_uri()
        found = self._diagnostics.setdefault(uri, queue.Queue())
        document = {"uri": uri, "languageId": "yaml", "version": 1, "text": text}
        self._tell("textDocument/didOpen", {"textDocument": document})
        return found.get(timeout=PATIENCE_S)

    def completions(self, name: str, line: int, column: int) -> dict[str, dict[str, Any]]:
        """What it offers at a place (1-based), by label."""
        found = self.ask("textDocument/completion", self._at(name, line, column))
        return {item["label"]: item for item in found["items"]}

    def hover(self, name: str, line: int, column: int) -> str:
        """What it shows over a place (1-based)."""
        found = self.ask("textDocument/hover", self._at(name, line, column))
        return str(found["contents"]["value"])

    def ask(self, method: str, parameters: dict[str, Any]) -> Any:
        """One request and its answer."""
        self._number += 1
        reply = self._replies[self._number] = queue.Queue()
        self._send({"id": self._number, "method": method, "params": parameters})
        answer = reply.get(timeout=PATIENCE_S)
        assert "error" not in answer, answer
        return answer["result"]

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._reader.join()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def _at(self, name: str, line: int, column: int) -> dict[str, Any]:
        uri = (self._folder / name).as_uri()
        return {"textDocument": {"uri": uri}, "position": {"line": line - 1, "character": column - 1}}

    def _tell(self, method: str, parameters: dict[str, Any]) -> None:
        self._send({"method": method, "params": parameters})

    def _send(self, message: dict[str, Any]) -> None:
        body = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self._process.stdin is not None
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
        self._process.stdin.flush()

    def _read(self) -> None:
        assert self._process.stdout is not None
        while (message := _next(self._process.stdout)) is not None:
            if "method" not in message:
                self._replies[message["id"]].put(message)
            elif message["method"] == "textDocument/publishDiagnostics":
                told = message["params"]
                self._diagnostics.setdefault(told["uri"], queue.Queue()).put(told["diagnostics"])
            elif "id" in message:
                self._answer(message)

    def _answer(self, message: dict[str, Any]) -> None:
        """What an editor says when it is asked: its settings, and nothing else."""
        result: Any = None
        if message["method"] == "workspace/configuration":
            result = [SETTINGS.get(item["section"]) for item in message["params"]["items"]]
        self._send({"id": message["id"], "result": result})


def _next(stream: IO[bytes]) -> dict[str, Any] | None:
    length = 0
    while line := stream.readline().strip():
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            length = int(value)
    return json.loads(stream.read(length)) if length else None
