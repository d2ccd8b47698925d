"""The core process: owns the model, the KV pool and the step loop; the API process starts it and talks to it.

    CoreProcess.start(config)     in the API process
    python -m kvengine.process FD in the core process, FD being its end of the channel

The core outlives nothing: when the API process dies the channel closes and the loop ends. Ctrl-C, and a
service manager's SIGTERM, reach every process; the core ignores both and ends with the API process, once that
has drained.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
from typing import Any

from kvengine.channel import Channel
from kvengine.config import EngineConfig
from kvengine.errors import ChannelClosed, EngineError, StartError
from kvpilot.clock import SystemClock

LOG_FORMAT = "%(levelname)s %(name)s: %(message)s"

_WAIT_S = 1.0
_STOP_WAIT_S = 5.0


class CoreProcess:
    """The child, from the API process's side."""

    def __init__(self, child: subprocess.Popen[bytes], channel: Channel, facts: dict[str, Any]) -> None:
        self.channel = channel
        self.facts = facts
        """What `assemble` says about the engine."""
        self._child = child

    @classmethod
    def start(cls, config: EngineConfig) -> "CoreProcess":
        """Start the core and wait until it can step. Raises StartError."""
        ours, theirs = socket.socketpair()
        with theirs:
            child = subprocess.Popen(
                [sys.executable, "-m", "kvengine.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        channel = Channel(ours)
        try:
            channel.send(config.to_wire())
            kind, facts = _first(channel)
        except ChannelClosed:
            code = child.wait()
            raise StartError(
                f"the engine core ended with code {code} while starting; see its output"
            ) from None
        except BaseException:
            child.kill()
            child.wait()
            raise
        if kind == "refused":
            child.wait()
            raise StartError(facts)
        return cls(child, channel, facts)

    def stop(self) -> None:
        """End it. The channel must be closed already: that is what it waits for."""
        try:
            self._child.wait(_STOP_WAIT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


def _first(channel: Channel) -> Any:
    while not (messages := channel.receive()):
        channel.wait(_WAIT_S)
    return messages[0]


def main() -> None:
    """Run a core until its API process is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    try:
        config = EngineConfig.from_wire(_first(channel))
        # OpenMP reads this once, when torch is imported.
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
        try:
            from kvengine.assemble import assemble

            engine = assemble(config, channel, SystemClock())
        except EngineError as error:
            channel.send(["refused", str(error)])
            return
        except ModuleNotFoundError as error:
            channel.send(["refused", f"{error.name} is not installed: pip install 'kvpilot[engine]'"])
            return
        channel.send(["ready", engine.facts])
    except ChannelClosed:
        return
    engine.loop.run()


if __name__ == "__main__":
    main()
