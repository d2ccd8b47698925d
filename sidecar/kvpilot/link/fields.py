"""The step record's field catalogue.

A manifest lists the fields that an engine really fills, a subset of this table in any order; readers find
fields by name and ignore names they do not know. A field absent from the manifest is *missing*, never zero.

Every field is eight bytes: `u64` for counts, `f64` where fractions matter. Names ending in `_total` are
cumulative since the engine started, so that any two records give exact rates however far apart; the rest
are levels.
"""

from typing import Literal, NamedTuple

FieldType = Literal["u64", "f64"]

HORIZONS = (16, 64, 256, 1024)
"""Steps ahead for which engines predict the blocks that running requests will hold."""
QUANTILES = ("p10", "p50", "p90")
KV_BITS = (32, 16, 8, 4)
"""What engines store KV elements in."""


class Field(NamedTuple):
    """One column of the step record."""

    name: str
    type: FieldType
    unit: str
    meaning: str


_FIELDS = (
    Field("time_ns", "u64", "ns", "Engine's monotonic clock when the step ended."),
    Field("duration_ns", "u64", "ns", "How long the step took."),
    Field("steps_total", "u64", "steps", "Steps since start; an idle loop is not a step."),
    Field("prefill_tokens_total", "u64", "tokens", "Prompt tokens computed."),
    Field("decode_tokens_total", "u64", "tokens", "Output tokens emitted."),
    Field("drafted_tokens_total", "u64", "tokens", "Draft tokens proposed."),
    Field("accepted_tokens_total", "u64", "tokens", "Draft tokens accepted."),
    Field("draft_rounds_total", "u64", "rounds", "Sequences times steps in which drafts were verified."),
    Field("rejected_rounds_total", "u64", "rounds", "Draft rounds in which a draft was rejected."),
    Field("decode_sequences_total", "u64", "sequences", "Sum over steps of sequences that decoded."),
    Field("context_tokens_total", "u64", "tokens", "Sum over steps of KV positions that decodes read."),
    Field("chunk_positions_total", "u64", "tokens^2", "Sum over prompt chunks of length x last position."),
    Field("running", "u64", "requests", "Requests that hold KV memory."),
    Field("waiting", "u64", "requests", "Requests accepted and not admitted."),
    Field("waiting_prompt_tokens", "u64", "tokens", "Prompt tokens of waiting requests."),
    Field("kv_limited_steps_total", "u64", "steps", "Steps in which KV memory kept a request waiting."),
    Field("budget_limited_steps_total", "u64", "steps", "Steps whose token budget was used up."),
    Field("kv_blocks_free", "u64", "blocks", "KV blocks that nothing holds."),
    Field("kv_blocks_cached", "u64", "blocks", "Unreferenced KV blocks kept for reuse."),
    Field("kv_blocks_shared", "u64", "blocks", "KV blocks with more than one reference."),
    Field("kv_blocks_pinned", "u64", "blocks", "KV blocks of pinned prompts: never reclaimed."),
    *(
        Field(f"kv_{bits}bit_blocks", "u64", "blocks", f"KV blocks in use that store tokens in {bits} bits.")
        for bits in KV_BITS
    ),
    Field("blocks_step", "u64", "steps", "Value of steps_total when cached and shared blocks were counted."),
    Field("tail_waste_tokens", "u64", "tokens", "Allocated KV token slots that hold no token yet."),
    Field("evicted_tokens_total", "u64", "tokens", "Tokens whose KV requests that opted in gave up."),
    Field("preemptions_total", "u64", "requests", "Running requests sent back to the queue."),
    Field("recomputed_tokens_total", "u64", "tokens", "Tokens computed again after a preemption."),
    Field("finished_total", "u64", "requests", "Requests that finished normally."),
    Field("rejected_total", "u64", "requests", "Requests refused by the engine itself."),
    Field("cancelled_total", "u64", "requests", "Requests whose client went away."),
    Field("failed_total", "u64", "requests", "Requests that ended in an error."),
    Field("oom_total", "u64", "events", "Steps that ran out of device memory."),
    Field("prefix_tokens_queried_total", "u64", "tokens", "Prompt tokens looked up in the prefix cache."),
    Field("prefix_tokens_hit_total", "u64", "tokens", "Prompt tokens found in the prefix cache."),
    Field("prefix_mismatches_total", "u64", "events", "Cached blocks that were not what their key said."),
    Field("device_free_bytes", "u64", "bytes", "Device memory nobody holds, between steps."),
    Field("device_reserved_bytes", "u64", "bytes", "Device memory the engine's allocator holds."),
    Field("device_allocated_bytes", "u64", "bytes", "Device memory in live tensors, between steps."),
    Field("host_available_bytes", "u64", "bytes", "Memory that machine and container limits leave."),
    Field("controls_sequence", "u64", "-", "Sequence of the controls page in force; 0 before the first."),
    Field("controls_ignored_total", "u64", "leases", "Leases ignored: foreign, malformed, unknown knob."),
    Field("demand_step", "u64", "steps", "Value of steps_total when the demand fields were last computed."),
    *(
        Field(f"demand_{horizon}_{q}_blocks", "f64", "blocks", f"Blocks held in {horizon} steps, {q}.")
        for horizon in HORIZONS
        for q in QUANTILES
    ),
)  # fmt: skip

STEP_FIELDS: dict[str, Field] = {field.name: field for field in _FIELDS}

HOST_FIELD = "host_available_bytes"
"""Provided where the hook can read it; ten times a second at most."""

HOOK_FIELDS = ("controls_sequence", "controls_ignored_total", HOST_FIELD)
"""Fields that the step hook fills by itself, as it does the knob echoes; an engine never passes them."""

KNOB_PREFIX = "knob."
"""`knob.<name>` (f64) is the value of a knob in force during the step: one field for each knob."""


def knob_field(knob: str, unit: str = "") -> Field:
    """The echo field of `knob`."""
    return Field(KNOB_PREFIX + knob, "f64", unit, f"Value of {knob} in force during the step.")
