"""One row for each tenant whose requests came with a tag: what it holds, and held, of the engine."""

from collections import Counter
from typing import Any

from kvpilot.inside.hook import StepHook
from kvpilot.inside.vllm.layout import Layout
from kvpilot.inside.vllm.lives import Life, Lives
from kvpilot.link.telemetry_page import MAX_TENANTS, TenantRow


class Tenants:
    """Rows as last shown. Whoever can name tenants could name millions: of those that hold nothing only the
    latest to change are kept.
    """

    def __init__(self, hook: StepHook) -> None:
        self._hook = hook
        self._rows: dict[str, TenantRow] = {}
        self._tokens: Counter[str] = Counter()
        self._shown_ns = 0

    def count_tokens(self, life: Life, output_tokens: int) -> None:
        """The request of `life` has come to this many output tokens."""
        if life.tenant:
            self._tokens[life.tenant] += output_tokens - life.tokens_counted
            life.tokens_counted = output_tokens

    def show(self, lives: Lives, scheduler: Any, layout: Layout, now_ns: int) -> None:
        """Show what changed since the last time. O(requests), nothing where no request has a tenant."""
        elapsed_ns = now_ns - self._shown_ns if self._shown_ns else 0
        self._shown_ns = now_ns
        if not lives.tagged and not self._rows:
            return
        running: Counter[str] = Counter()
        blocks: Counter[str] = Counter()
        for request in scheduler.running:
            life = lives.get(request.request_id)
            if life is not None and life.tenant:
                self.count_tokens(life, request.num_output_tokens)
                running[life.tenant] += 1
                for table in layout.tables:
                    blocks[life.tenant] += len(table.get(request.request_id, ()))
        everybody = Counter([life.tenant for life in lives.values() if life.tenant])
        for tenant in self._rows.keys() | everybody.keys() | self._tokens.keys():
            waiting = max(0, everybody[tenant] - running[tenant])
            self._show(tenant, running[tenant], waiting, blocks[tenant], elapsed_ns)
        self._forget()

    def _show(self, tenant: str, running: int, waiting: int, blocks: int, elapsed_ns: int) -> None:
        before = self._rows.get(tenant)
        held, block_ns = (before.kv_blocks, before.block_ns_total) if before else (0, 0)
        # Between two looks it is taken to have held the mean of what they saw.
        block_ns += (held + blocks) * elapsed_ns // 2
        row = TenantRow(tenant, running, waiting, blocks, block_ns, self._tokens[tenant])
        if row != before:
            self._rows.pop(tenant, None)
            self._rows[tenant] = row  # Last in order: the latest to change.
            self._hook.set_tenant(*row)

    def _forget(self) -> None:
        idle = [row.name for row in self._rows.values() if not (row.running or row.waiting or row.kv_blocks)]
        for name in idle[: max(0, len(idle) - MAX_TENANTS)]:
            del self._rows[name], self._tokens[name]
