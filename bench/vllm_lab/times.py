"""A plugin of the bench's own for vLLM: when did each request get each of its tokens, on the engine's clock?

Two halves in one file. In the engine, `register` (a `vllm.general_plugins` entry point) makes every scheduler
write one JSON line for each request that ended: its name, when it was added, and (time, tokens) of each
emission. In the bench, `install` writes this file as a plugin into a directory for PYTHONPATH, and `Times`
reads the lines. Clients' own clocks would measure the client, which shares two cores with the engine.
"""

import json
import os
import re
import time
from pathlib import Path

ENVIRON_TIMES = "KVPILOT_BENCH_TIMES"
_PLUGIN = "kvpilot_bench_times"
_NAME = re.compile(r"cmpl-(.+)-\d+-[0-9a-f]+")
"""A request's name is what its client sent as X-Request-Id; the server adds a prefix, an index, a suffix."""


def register() -> None:
    """Called by vLLM in each of its processes."""
    path = os.environ.get(ENVIRON_TIMES)
    if not path:
        return
    from vllm.v1.core.sched.scheduler import Scheduler

    if hasattr(Scheduler, "_bench_requests"):
        return
    Scheduler._bench_requests = {}
    file = open(path, "a", buffering=1)  # noqa: SIM115  (open for as long as the engine lives)
    add_request, update = Scheduler.add_request, Scheduler.update_from_output

    def add(self, request):
        self._bench_requests[request.request_id] = (time.monotonic_ns(), [])
        return add_request(self, request)

    def update_from_output(self, scheduler_output, model_runner_output):
        result = update(self, scheduler_output, model_runner_output)
        now_ns = time.monotonic_ns()
        for client in result.values():
            for output in client.outputs:
                entry = self._bench_requests.get(output.request_id)
                if entry is None:
                    continue
                if output.new_token_ids:
                    entry[1].append((now_ns, len(output.new_token_ids)))
                if output.finish_reason is not None:
                    del self._bench_requests[output.request_id]
                    line = {"name": output.request_id, "received_ns": entry[0], "emitted": entry[1]}
                    file.write(json.dumps(line) + "\n")
        return result

    Scheduler.add_request, Scheduler.update_from_output = add, update_from_output


def install(folder: Path) -> Path:
    """Make `folder` a directory for PYTHONPATH that holds the plugin; returns it."""
    from vllm_lab.waiting import as_plugin  # not in the engine, which sees this file alone

    return as_plugin(Path(__file__), _PLUGIN, folder)


class Times:
    """Follows the file that the engine writes. O(new lines) a look."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self._file = path.open()
        self._rest = ""
        self._known: dict[str, dict] = {}

    def take(self, name: str) -> dict | None:
        """`received_ns` and `emitted` of the request of that name, once; None if it has not ended."""
        self._read()
        return self._known.pop(name, None)

    def _read(self) -> None:
        *lines, self._rest = (self._rest + self._file.read()).split("\n")
        for line in lines:
            row = json.loads(line)
            match = _NAME.fullmatch(row.pop("name"))
            if match:
                self._known[match[1]] = row

    def close(self) -> None:
        self._file.close()
