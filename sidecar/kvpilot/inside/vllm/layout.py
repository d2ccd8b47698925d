"""How this scheduler keeps KV blocks and queues: where to look, and what cannot be seen."""

from typing import Any


class Layout:
    """Looked at once, when the scheduler is new."""

    def __init__(self, scheduler: Any) -> None:
        self.pool = scheduler.kv_cache_manager.block_pool
        managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        sizes = {int(manager.block_size) for manager in managers}
        self.block_size = min(sizes) if sizes else int(scheduler.cache_config.block_size)
        """Tokens of one block."""
        self.tables: tuple[dict[str, list[Any]], ...] = ()
        """By request id: the blocks it holds, one table for each group of layers."""
        self.blocks_unclear = self._unclear(managers, sizes)
        """Why blocks cannot be told from tokens; None where they can."""
        if self.blocks_unclear is None:
            self.tables = tuple(manager.req_to_blocks for manager in managers)
        self.caching = bool(self.pool.enable_caching)

    @staticmethod
    def _unclear(managers: Any, sizes: set[int]) -> str | None:
        from vllm.v1 import kv_cache_interface

        full = getattr(kv_cache_interface, "is_full_attention_spec", None)
        if full is None:

            def full(spec: Any) -> bool:
                return type(spec).__name__ in ("FullAttentionSpec", "MLAAttentionSpec")

        if not managers or not all(full(manager.kv_cache_spec) for manager in managers):
            return "this model's layers do not all keep every token"
        if len(sizes) != 1:
            return "this model's groups of layers have blocks of several sizes"
        return None
