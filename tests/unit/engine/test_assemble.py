"""An assembled engine with the shipped model, without processes: what its directory says holds."""

import json
import shutil
import socket
from pathlib import Path
from typing import Literal

import pytest

from kvengine.assemble import assemble
from kvengine.channel import Channel
from kvengine.config import SHIPPED_TARGET, EngineConfig
from kvengine.model.domains import prompt
from kvengine.request import Request, SamplingParams
from kvengine.sched.scheduler import Knobs
from kvpilot.clock import SystemClock


def test_every_end_token_of_generation_config_ends_an_output(tmp_path: Path) -> None:
    """Chat models name more end tokens there than in config.json; a newline stands for one."""
    directory = tmp_path / "model"
    shutil.copytree(SHIPPED_TARGET, directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, ord("\n")]}))
    config = EngineConfig(model=directory, draft=None, memory_bytes=64 << 20)
    ours, theirs = (Channel(end) for end in socket.socketpair())
    loop = assemble(config, theirs, SystemClock()).loop
    tokens = list(prompt("json", 200, seed=1).encode())
    ours.send(["add", 1, tokens, {"max_tokens": 400, "temperature": 0.0}, 0, None, 0])
    output, finish = [], None
    while finish is None:
        loop.turn()
        for _out, _at_ns, rows in ours.receive():
            ((_id, more, finish, *_rest),) = rows
            output += more
    ours.close()
    theirs.close()
    assert finish == "stop"
    assert output[-1] == ord("\n")


@pytest.mark.parametrize("admission", ["predicted", "held"])
def test_the_watermark_bounds_what_the_operator_chose(admission: Literal["predicted", "held"]) -> None:
    """By default the predicted peak of KV demand; without looking ahead, what is held now."""
    config = EngineConfig(draft=None, memory_bytes=64 << 20, admission=admission)
    ours, theirs = (Channel(end) for end in socket.socketpair())
    core = assemble(config, theirs, SystemClock()).loop._core
    core.scheduler.tables.tree = None
    for request in [Request(number, [7] * 100, SamplingParams(1_000)) for number in range(1, 61)]:
        assert core.accept(request) is None
    core.scheduler.schedule(Knobs(100_000, 100_000, 0, 60, 1.0))
    running, all_by_prompt = len(core.scheduler.running), core.scheduler.pool.total // 7
    ours.close()
    theirs.close()
    # 7 blocks hold a prompt of 100 tokens, 69 what it may grow to.
    assert running == all_by_prompt if admission == "held" else 1 < running < all_by_prompt / 4
