"""Asking a running pilot through its operating socket. Light: commands import this and little else."""

import json
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_LINE_BYTES = 64 * 1024
"""Of an order."""


class SocketError(Exception):
    """The socket cannot be opened, nobody answers on it, or the order was refused; one line."""


def ask(path: Path, order: Mapping[str, Any], timeout_s: float = 5.0) -> dict[str, Any]:
    """Send one order and return what came of it. Raises SocketError, also for an order that was refused."""
    line = json.dumps(order).encode() + b"\n"
    if len(line) > MAX_LINE_BYTES:
        raise SocketError(f"an order has at most {MAX_LINE_BYTES} bytes; this one has {len(line)}")
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(path))
            connection.sendall(line)
            with connection.makefile("rb") as answers:
                answer = json.loads(answers.readline() or b"{}")
    except (FileNotFoundError, ConnectionRefusedError):
        raise SocketError(
            f"no pilot listens on {path}: is `kvpilot run` running with this configuration?"
        ) from None
    except (OSError, ValueError) as error:
        raise SocketError(f"socket {path}: {error}") from error
    if not answer.get("ok"):
        raise SocketError(answer.get("error", "the pilot gave no answer"))
    return dict(answer)
