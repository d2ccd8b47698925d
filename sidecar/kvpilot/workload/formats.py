"""Which format is this file? Told by its first line; gzip by its first bytes.

Azure CSV, Mooncake JSONL, ServeGen's clients with the token file beside them, Vidur's lengths.
"""

import gzip
import zlib
from pathlib import Path

from kvpilot.workload.azure import HEADER as AZURE_HEADER
from kvpilot.workload.azure import parse_azure
from kvpilot.workload.lengths import HEADER as LENGTHS_HEADER
from kvpilot.workload.lengths import parse_lengths
from kvpilot.workload.mooncake import BLOCK_TOKENS, parse_mooncake
from kvpilot.workload.servegen import CLIENTS_HEADER, Clients, parse_servegen
from kvpilot.workload.trace import Trace, TraceError, sliced, sped

KNOWN = (
    f"Azure CSV ({','.join(AZURE_HEADER)}), Mooncake JSONL, "
    f"ServeGen clients ({','.join(CLIENTS_HEADER[:3])},...) or lengths ({','.join(LENGTHS_HEADER)},...)"
)
SERVEGEN_RPS = 5.0
SERVEGEN_SECONDS = 3600.0
"""What is drawn of two weeks at 800 requests a second where nobody says."""
_GZIP = b"\x1f\x8b"


def read_trace(
    path: Path | str,
    start_s: float | None = None,
    end_s: float | None = None,
    speed: float = 1.0,
    seed: int = 0,
    mean_rps: float = SERVEGEN_RPS,
) -> Trace:
    """The trace in a file, of any known format; the slice counts in the trace's own seconds, before `speed`.

    `seed` and `mean_rps` are for formats that describe arrivals and do not list them. Raises TraceError.
    """
    path = Path(path)
    lines = _lines(path)
    first = next((line for line in lines if line.strip()), "").strip().lstrip("\ufeff")
    if not first:
        raise TraceError(f"{path}: empty; expected {KNOWN}")
    if first.startswith(",".join(CLIENTS_HEADER[:3])):
        start = start_s or 0.0
        end = start + SERVEGEN_SECONDS if end_s is None else end_s
        rows = _clients(path, lines).rows(seed, start, end, mean_rps)
        return sped(Trace(path.name, "servegen", tuple(rows)), speed)
    if first.startswith("{"):
        trace = Trace(path.name, "mooncake", tuple(parse_mooncake(lines, str(path))), BLOCK_TOKENS)
    elif first.replace(" ", "") == ",".join(AZURE_HEADER):
        trace = Trace(path.name, "azure", tuple(parse_azure(lines, str(path))))
    elif first.startswith(",".join(LENGTHS_HEADER)):
        trace = Trace(path.name, "lengths", tuple(parse_lengths(lines, str(path), seed)))
    else:
        raise TraceError(f"{path}:1: {first[:60]!r}: expected {KNOWN}")
    if start_s is not None or end_s is not None:
        trace = sliced(trace, start_s or 0.0, end_s)
    return sped(trace, speed)


def read_clients(path: Path | str) -> Clients:
    """ServeGen's clients and, beside them, their lengths. Raises TraceError."""
    return _clients(Path(path), _lines(Path(path)))


def parse_slice(text: str) -> tuple[float, float | None]:
    """`600:1200`, `600:`, `:1200`: seconds of the trace. Raises TraceError."""
    start, colon, end = text.partition(":")
    try:
        span = float(start or 0), float(end) if end else None
        if not colon or not 0 <= span[0] < (span[1] if span[1] is not None else float("inf")):
            raise ValueError
    except ValueError as error:
        raise TraceError(f"--slice {text}: START:END in seconds of the trace, such as 600:1200") from error
    return span


def _clients(path: Path, lines: list[str]) -> Clients:
    name = path.name.removesuffix(".gz")
    beside = path.with_name(name.replace("clients", "tokens"))
    if "clients" not in name or not (beside.exists() or beside.with_name(beside.name + ".gz").exists()):
        raise TraceError(f"{path}: needs its clients' lengths beside it, as {beside.name}")
    tokens = beside if beside.exists() else beside.with_name(beside.name + ".gz")
    return parse_servegen(lines, _lines(tokens), str(path), str(tokens))


def _lines(path: Path) -> list[str]:
    try:
        raw = path.read_bytes()
        if raw.startswith(_GZIP):
            raw = gzip.decompress(raw)
        return raw.decode("utf-8").splitlines()
    except OSError as error:
        # A damaged gzip file is an OSError without a `strerror`.
        raise TraceError(f"trace {path}: {error.strerror or 'damaged gzip'}; expected {KNOWN}") from error
    except (EOFError, zlib.error) as error:
        raise TraceError(f"trace {path}: damaged gzip; expected {KNOWN}") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"trace {path}: not text; expected {KNOWN}") from error
