"""A real vLLM scheduler in this process, and a model runner that invents tokens: no weights, no device.

`Plane.step()` does what vLLM's engine core does around one step, synchronously or with steps under way.
"""

import json
import random
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    # What vLLM's own dependencies say while they are imported is not ours to fail on.
    warnings.simplefilter("ignore")
    from vllm import SamplingParams
    from vllm.config import SchedulerConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, DraftTokenIds, ModelRunnerOutput
    from vllm.v1.request import Request, RequestStatus
    from vllm.v1.structured_output import StructuredOutputManager

__all__ = [
    "BLOCK",
    "AsyncScheduler",
    "Make",
    "Plane",
    "RequestStatus",
    "Scheduler",
    "SchedulerConfig",
    "build_scheduler",
]

BLOCK = 16
init_none_hash(get_hash_fn_by_name("sha256"))


@dataclass(frozen=True)
class Make:
    """How a scheduler is built; the names are vLLM's own."""

    drafts: int = 0
    asynchronous: bool = False
    blocks: int = 64
    max_num_seqs: int = 8
    max_num_batched_tokens: int = 256
    max_model_len: int = 512
    caching: bool = True
    scheduler_cls: Any = None
    draft_table: Any = None
    extra: tuple[tuple[str, Any], ...] = ()


def model_folder(folder: Path) -> Path:
    """A model's configuration; nothing else is ever read."""
    place = folder / "model"
    place.mkdir(exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 4096,
        "torch_dtype": "float32",
    }
    (place / "config.json").write_text(json.dumps(config))
    return place


def engine_config(make: Make, folder: Path) -> VllmConfig:
    speculation = None
    if make.drafts:
        speculation = {
            "method": "ngram",
            "num_speculative_tokens": make.drafts,
            "prompt_lookup_max": 4,
            "prompt_lookup_min": 2,
        }
        if make.draft_table:
            speculation["num_speculative_tokens_per_batch_size"] = make.draft_table
    arguments = EngineArgs(
        model=str(model_folder(folder)),
        skip_tokenizer_init=True,
        max_model_len=make.max_model_len,
        max_num_seqs=make.max_num_seqs,
        max_num_batched_tokens=make.max_num_batched_tokens,
        enable_prefix_caching=make.caching,
        block_size=BLOCK,
        enforce_eager=True,
        speculative_config=speculation,
        async_scheduling=False,
        scheduler_cls=make.scheduler_cls,
        **dict(make.extra),
    )
    config = arguments.create_engine_config()
    # N-gram drafting forces synchronous scheduling; the scheduler itself does not mind.
    config.scheduler_config.async_scheduling = make.asynchronous
    config.cache_config.num_gpu_blocks = make.blocks
    return config


def build_scheduler(make: Make, folder: Path) -> Any:
    """As vLLM's engine core does it: it asks the configuration for the class."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _build(make, folder)


def _build(make: Make, folder: Path) -> Any:
    config = engine_config(make, folder)
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=config.model_config.dtype)
    cache = KVCacheConfig(make.blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    kind = config.scheduler_config.get_scheduler_cls()
    return kind(
        vllm_config=config,
        kv_cache_config=cache,
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        hash_block_size=BLOCK,
        log_stats=True,
    )


class Plane:
    """One scheduler and its invented model. `accept(request_id, drafts)` says how many drafts hit."""

    def __init__(self, make: Make, folder: Path, seed: int = 0) -> None:
        self.make = make
        self.scheduler = build_scheduler(make, folder)
        self.accept: Callable[[str, int], int] = lambda _request_id, _drafts: 0
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, str] = {}
        self.history: list[Any] = []
        """Every SchedulerOutput, in order."""
        self.aborted = 0
        self._under_way: deque[tuple[Any, ModelRunnerOutput]] = deque()
        self._drafted: list[DraftTokenIds] = []
        self._random = random.Random(seed)
        self._hasher = get_request_block_hasher(BLOCK, get_hash_fn_by_name("sha256"))

    def ask(
        self,
        request_id: str,
        prompt: int | list[int],
        output: int = 8,
        trace_headers: Mapping[str, str] | None = None,
        resumable: bool = False,
        **sampling: Any,
    ) -> Request:
        """A request arrives; its prompt given as tokens, or how many of them."""
        tokens = (
            [self._random.randrange(4, 500) for _ in range(prompt)] if isinstance(prompt, int) else prompt
        )
        parameters = SamplingParams(max_tokens=output, ignore_eos=True, **sampling)
        request = Request(
            request_id,
            tokens,
            parameters,
            None,
            trace_headers=trace_headers,
            block_hasher=self._hasher,
            resumable=resumable,
        )
        self.scheduler.add_request(request)
        return request

    def abort(self, *ids: str) -> None:
        self.aborted += len(self.scheduler.finish_requests(list(ids), RequestStatus.FINISHED_ABORTED))

    def step(self) -> Any:
        """One pass of the engine core's loop; returns what was scheduled, if anything was."""
        scheduled = None
        if self.scheduler.has_requests():
            scheduled = self.scheduler.schedule()
            self.history.append(scheduled)
            self._under_way.append((scheduled, self._run(scheduled)))
            if self.make.asynchronous and len(self._under_way) < 2 and scheduled.total_num_scheduled_tokens:
                return scheduled
        if self._under_way:
            self._land(*self._under_way.popleft())
        return scheduled

    def drain(self, most: int = 2000) -> None:
        """Step until nothing is left to do."""
        for _ in range(most):
            if not self.scheduler.has_requests() and not self._under_way:
                return
            self.step()
        raise AssertionError(f"not done after {most} steps")

    def _run(self, scheduled: Any) -> ModelRunnerOutput:
        """What a model would have answered. A request samples once its last known token is computed."""
        if not scheduled.total_num_scheduled_tokens:
            return EMPTY_MODEL_RUNNER_OUTPUT
        ids = list(scheduled.num_scheduled_tokens)
        sampled = []
        drafted: tuple[list[str], list[list[int]]] = ([], [])
        for request_id in ids:
            request = self.scheduler.requests[request_id]
            if request.is_prefill_chunk:
                sampled.append([])
                continue
            drafts = len(scheduled.scheduled_spec_decode_tokens.get(request_id, ()))
            hits = min(self.accept(request_id, drafts), drafts)
            sampled.append([self._token(request_id) for _ in range(hits + 1)])
            drafted[0].append(request_id)
            drafted[1].append([self._random.randrange(4, 500)] * scheduled.num_spec_tokens_to_schedule)
        self._drafted = [DraftTokenIds(*drafted)]
        return ModelRunnerOutput(ids, {request_id: i for i, request_id in enumerate(ids)}, sampled)

    def _token(self, request_id: str) -> int:
        return 4 + hash((request_id, self._random.random())) % 490

    def _land(self, scheduled: Any, output: ModelRunnerOutput) -> None:
        out = self.scheduler.update_from_output(scheduled, output)
        for each in out.values():
            for answer in each.outputs:
                self.outputs.setdefault(answer.request_id, []).extend(answer.new_token_ids)
                if answer.finish_reason is not None:
                    self.finished[answer.request_id] = str(answer.finish_reason)
        if self.make.drafts and not self.make.asynchronous and scheduled.total_num_scheduled_tokens:
            for drafts in self._drafted:
                self.scheduler.update_draft_token_ids(drafts)
