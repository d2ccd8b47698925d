"""KV memory as the block map shows it: who holds how many blocks, and what the rest is."""

from collections.abc import Sequence
from typing import Any

from kvpilot.adapters.engine import Sight
from kvpilot.link.telemetry import TenantRow
from kvpilot.policy.source import printable

MOST_TENANTS = 12
"""Named; all others are one row."""
MOST_LETTERS = 64


def memory(sight: Sight, tenants: Sequence[TenantRow]) -> dict[str, Any]:
    """Blocks by state and by tenant. `missing` instead where the engine does not say how many are free.

    Sharers of a block are each counted as its holder, so tenants may add up to more than `held`; what no
    tenant accounts for is `unattributed`.
    """
    manifest, record = sight.manifest, sight.record
    if manifest is None or record is None or not manifest.blocks:
        return {"missing": "no engine" if manifest is None else "no step yet"}
    free, cached = record.get("kv_blocks_free"), record.get("kv_blocks_cached")
    if free is None:
        return {"missing": "this engine does not report free blocks"}
    held = max(0, round(manifest.blocks - free - (cached or 0)))
    waste = record.get("tail_waste_tokens")
    rows = _rows(tenants)
    return {
        "blocks": manifest.blocks,
        "block_tokens": manifest.block_size,
        "block_bytes": manifest.bytes_per_block,
        "held": held,
        "cached": None if cached is None else round(cached),
        "free": round(free),
        "shared": record.get("kv_blocks_shared"),
        "tail_waste_blocks": None if waste is None else round(waste / manifest.block_size, 1),
        "tenants": rows,
        "unattributed": max(0, held - sum(row["blocks"] for row in rows)),
    }


def _rows(tenants: Sequence[TenantRow]) -> list[dict[str, Any]]:
    order = sorted(tenants, key=lambda row: (-row.kv_blocks, -row.running, -row.waiting, row.name))
    order = [row for row in order if row.kv_blocks or row.running or row.waiting]
    rows = [
        {
            "name": printable(row.name)[:MOST_LETTERS] or "(none)",
            "blocks": row.kv_blocks,
            "running": row.running,
            "waiting": row.waiting,
        }
        # By name: a map whose bands change places is hard to read.
        for row in sorted(order[:MOST_TENANTS], key=lambda row: row.name)
    ]
    rest = order[MOST_TENANTS:]
    if rest:
        rows.append(
            {
                "name": f"({len(rest)} others)",
                "blocks": sum(row.kv_blocks for row in rest),
                "running": sum(row.running for row in rest),
                "waiting": sum(row.waiting for row in rest),
            }
        )
    return rows
