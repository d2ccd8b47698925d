"""What an endpoint picker of the Gateway API inference extension reads of a model server.

The protocol names five figures and lets servers name their metrics; pickers read vLLM's names unless told
otherwise. Missing figures are left out: a picker then treats the endpoint as unknown, not as idle.
"""

from kvpilot.link.manifest import Manifest
from kvpilot.publish.exposition import escape, number
from kvpilot.signals import Missing

PICKER_NAMES = {
    "TotalQueuedRequests": ("vllm:num_requests_waiting", "Requests that wait to be admitted."),
    "TotalRunningRequests": ("vllm:num_requests_running", "Requests that hold KV memory."),
    "KVCacheUtilization": ("vllm:kv_cache_usage_perc", "Share of KV memory in use, 0 to 1."),
    "BlockSize, NumGPUBlocks": (
        "vllm:cache_config_info",
        "1, with the labels block_size (tokens) and num_gpu_blocks.",
    ),
}
_SIGNAL_OF = {
    "TotalQueuedRequests": "requests_waiting",
    "TotalRunningRequests": "requests_running",
    "KVCacheUtilization": "kv_occupancy",
}


def picker_page(manifest: Manifest | None, values: dict[str, float | Missing], rank: int) -> str:
    """The page, in the Prometheus text format. `values` by signal."""
    if manifest is None:
        return ""
    labels = f'model_name="{escape(manifest.model)}",engine="{rank}"'
    lines = []
    for asked, signal in _SIGNAL_OF.items():
        value = values.get(signal)
        if isinstance(value, float | int):
            name, meaning = PICKER_NAMES[asked]
            lines += _family(name, meaning, labels, value)
    if manifest.blocks:
        name, meaning = PICKER_NAMES["BlockSize, NumGPUBlocks"]
        more = f',block_size="{manifest.block_size}",num_gpu_blocks="{manifest.blocks}"'
        lines += _family(name, meaning, labels + more, 1.0)
    return "".join(f"{line}\n" for line in lines)


def _family(name: str, meaning: str, labels: str, value: float) -> list[str]:
    return [f"# HELP {name} {meaning}", f"# TYPE {name} gauge", f"{name}{{{labels}}} {number(value)}"]
