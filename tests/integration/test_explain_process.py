"""`kvpilot explain` beside a pilot that flies, and after it was killed."""

import json
import signal
from typing import Any

from pilot_lab import Lab
from pilot_process import eventually


def test_it_explains_while_the_pilot_flies_and_when_it_is_gone(lab: Lab) -> None:
    engine = lab.engine()
    child = lab.flying()
    engine.fields["waiting"] = 11
    eventually(lambda: engine.chunk == 64)

    def explained() -> dict[str, Any] | None:
        done = lab.command("explain", "--last", "1", "--json")
        assert (done.returncode, done.stderr) == (0, "")
        return eventually_applied(done.stdout)

    found = eventually(explained)
    (decision,) = found["decisions"]
    assert found["pilot"] is True
    assert decision["now"] == {
        "state": "active", "for_s": decision["now"]["for_s"], "value": 64.0, "holder": "guard/act",
    }  # fmt: skip
    assert decision["ages"]["waiting"] < 1
    assert decision["claims"] == [{"rule": "guard/act", "scope": "all", "value": 64.0, "by": None}]
    child.send_signal(signal.SIGKILL)
    child.wait()
    done = lab.command("explain")
    assert done.returncode == 0
    assert "No pilot answers: this is what the journal says." in done.stdout
    assert "prefill_chunk_tokens 512 -> 64: applied, in force " in done.stdout
    assert "            11 > 10.0\n" in done.stdout


def eventually_applied(text: str) -> dict[str, Any] | None:
    """The journal is written by a thread of its own: a moment later."""
    found = json.loads(text)
    applied = [row for row in found["decisions"] if row["verdict"] == "applied"]
    return found if applied else None
