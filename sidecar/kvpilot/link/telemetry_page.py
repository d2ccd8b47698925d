"""What lies where in a telemetry page.

    header | manifest JSON | ring: two words, records | histograms | class rows | tenant rows | ending
           | tenant counts, where the manifest has columns for them
           | ended requests, where it has columns for those

Everything is planned from the manifest, so writer and reader agree by construction; the header repeats the
offsets for readers that are not ours. Sections start at cache lines.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kvpilot.link.ending import ENDING_FRAME, Ending
from kvpilot.link.histogram import HISTOGRAM_WORDS, ONE, PER_CLASS
from kvpilot.link.manifest import MANIFEST_MAX_BYTES, Manifest
from kvpilot.link.page import HEADER_BYTES, LinkError
from kvpilot.link.records import Frame, StepLayout
from kvpilot.link.requests import MOST_COLUMNS, ring_bytes

RING_RECORDS = 16_384
PAGE_MAX_BYTES = 16 << 20
MAX_CLASSES = 8
MAX_TENANTS = 64
TENANT_NAME_BYTES = 40
WORD = 8
HEAD_BYTES = 64
"""A cache line for two words: sequence of the newest record, time of the last step boundary."""

CLASS_FRAME = Frame("QQ")
TENANT_FRAME = Frame(f"{TENANT_NAME_BYTES}sQQQQQ")

__all__ = ["ClassRow", "Ending", "TelemetryPlan", "TenantRow", "histogram_index", "plan_page"]

_LINE = 64

MAX_TENANT_COLUMNS = 32

ReadAt = Callable[[int, int], bytes]


class ClassRow(NamedTuple):
    """One class's queue."""

    name: str
    waiting: int
    waiting_prompt_tokens: int


class TenantRow(NamedTuple):
    """What one tenant holds. `block_ns_total` is KV blocks times nanoseconds held, since the engine
    started.
    """

    name: str
    running: int
    waiting: int
    kv_blocks: int
    block_ns_total: int
    tokens_total: int


@dataclass(frozen=True, slots=True)
class TelemetryPlan:
    """Where everything lies in a page, in bytes."""

    manifest_json: bytes
    layout: StepLayout
    record_count: int
    ring: int
    histograms: int
    classes: int
    tenants: int
    ending: int
    counts: int
    """0 where there are none."""
    requests: int
    """0 where there are none."""
    page_bytes: int


def plan_page(manifest: Manifest, record_count: int = RING_RECORDS) -> TelemetryPlan:
    """Plan the page of `manifest`. Raises LinkError where it cannot be held in PAGE_MAX_BYTES."""
    if len(manifest.classes) > MAX_CLASSES:
        raise LinkError(f"{len(manifest.classes)} classes: the link holds at most {MAX_CLASSES}")
    if len(manifest.tenant_columns) > MAX_TENANT_COLUMNS:
        raise LinkError(f"{len(manifest.tenant_columns)} columns of tenants: at most {MAX_TENANT_COLUMNS}")
    try:
        body, layout = manifest.to_json(), StepLayout(manifest.fields)
    except ValueError as error:
        raise LinkError(str(error)) from error
    ring = HEADER_BYTES + MANIFEST_MAX_BYTES
    histograms = _aligned(ring + HEAD_BYTES + record_count * layout.size)
    classes = histograms + (MAX_CLASSES * len(PER_CLASS) + 1) * HISTOGRAM_WORDS * WORD
    tenants = _aligned(classes + MAX_CLASSES * CLASS_FRAME.size)
    ending = _aligned(tenants + MAX_TENANTS * TENANT_FRAME.size)
    end = _aligned(ending + ENDING_FRAME.size)
    counts = end if manifest.tenant_columns else 0
    if counts:
        end = _aligned(counts + MAX_TENANTS * counts_frame(manifest.tenant_columns).size)
    if len(manifest.request_columns) > MOST_COLUMNS:
        raise LinkError(f"{len(manifest.request_columns)} columns of requests: at most {MOST_COLUMNS}")
    requests = end if manifest.request_records else 0
    if requests:
        end += ring_bytes(manifest.request_columns, manifest.request_records)
    if end > PAGE_MAX_BYTES:
        raise LinkError(f"{len(layout.names)} fields need {end} bytes: a page holds at most {PAGE_MAX_BYTES}")
    sections = (ring, histograms, classes, tenants, ending, counts, requests)
    return TelemetryPlan(body, layout, record_count, *sections, end)


def counts_frame(columns: Sequence[str]) -> Frame:
    """One tenant's row of counts."""
    return Frame(f"{TENANT_NAME_BYTES}s{'Q' * len(columns)}")


def _aligned(offset: int) -> int:
    return -(-offset // _LINE) * _LINE


def histogram_index(name: str, class_index: int) -> int:
    """Position of a histogram in its section."""
    return MAX_CLASSES * len(PER_CLASS) if name == ONE else PER_CLASS.index(name) * MAX_CLASSES + class_index
