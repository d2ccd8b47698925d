"""What an endpoint picker of the Gateway API inference extension reads of a model server.

The protocol names five figures and lets servers name their metrics; pickers read vLLM's names unless told
otherwise. Missing figures are left out: a picker then treats the endpoint as unknown, not as idle.
"""

from prometheus_client.core import GaugeMetricFamily

from kvpilot.link.manifest import Manifest
from kvpilot.publish.exposition import clean, encoded
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


def picker_page(manifest: Manifest | None, values: dict[str, float | Missing], rank: int) -> bytes:
    """The page, in the Prometheus text format. `values` by signal."""
    if manifest is None:
        return b""
    labels = {"model_name": clean(manifest.model), "engine": str(rank)}
    parts = []
    for asked, signal in _SIGNAL_OF.items():
        value = values.get(signal)
        if isinstance(value, float | int):
            parts.append(_family(asked, labels, value))
    if manifest.blocks:
        shape = {"block_size": str(manifest.block_size), "num_gpu_blocks": str(manifest.blocks)}
        parts.append(_family("BlockSize, NumGPUBlocks", labels | shape, 1.0))
    return b"".join(parts)


def _family(asked: str, labels: dict[str, str], value: float) -> bytes:
    name, meaning = PICKER_NAMES[asked]
    metric = GaugeMetricFamily(name, meaning)
    metric.add_sample(name, labels, value)
    return encoded(metric)
