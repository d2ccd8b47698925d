"""A decision's trace id, made from what the decision is: whoever knows the decision knows its trace."""

import hashlib


def trace_id(engine: str, rank: int, nonce: int, number: int) -> int:
    """128 bits, never 0. The same for a decision wherever it is named: exemplar, span, journal."""
    return _hashed("trace", engine, rank, nonce, number, size=16)


def span_id(engine: str, rank: int, nonce: int, number: int) -> int:
    """64 bits, never 0."""
    return _hashed("span", engine, rank, nonce, number, size=8)


def _hashed(what: str, engine: str, rank: int, nonce: int, number: int, size: int) -> int:
    text = f"{what}/{engine}/{rank}/{nonce:016x}/{number}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:size], "big") or 1
