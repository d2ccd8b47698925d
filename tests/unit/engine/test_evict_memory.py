"""What evicting by attention allocates is within what the plan sets aside for it, by torch's profiler."""

from pathlib import Path

import pytest
from test_memory_profile import BLOCK_SIZE, BLOCKS, charged_and_allocated, peak_bytes, requests, shipped

import kvengine
from kvengine.executor.torch import EagerExecutor
from kvengine.kv.eviction.policy import Eviction
from kvengine.memory import MIB, DeviceMemory
from kvengine.model.config import ModelConfig
from kvengine.model.footprint import Footprint
from kvengine.sched.batch import Batch, Slice

WEIGHTS = Path(kvengine.__file__).parent / "weights"
HEAVY = Eviction("h2o", sink=50, recent=300, heavy=50)
BY_HEAD = Eviction("h2o", sink=50, recent=300, heavy=50, by_head=True)
FASTGEN = Eviction("fastgen", sink=50, recent=300, heavy=50, recovery=1.0)


@pytest.fixture(scope="module")
def memory() -> DeviceMemory:
    return DeviceMemory(1024 * MIB)


@pytest.fixture(scope="module")
def engine(memory: DeviceMemory) -> EagerExecutor:
    made = EagerExecutor(shipped("target"), None, memory, BLOCKS, BLOCK_SIZE, heavy_hitters=True)
    made.execute(Batch([Slice(requests(1, 16)[0], 0, 16, samples=True)]))
    return made


@pytest.mark.parametrize(
    ("eviction", "tokens"),
    [(HEAVY, 1200), (BY_HEAD, 600), (FASTGEN, 600)],
    ids=["blocks", "heads", "fastgen"],
)
def test_an_evict_step_is_within_its_charge(engine, memory, eviction: Eviction, tokens: int) -> None:
    (request,) = requests(1, tokens)
    request.eviction = eviction
    charged, allocated = charged_and_allocated(engine, memory, [Slice(request, 0, tokens, samples=True)])
    assert allocated <= charged
    request.tokens.append(1)
    request.computed = tokens
    piece = Slice(request, tokens, 1, samples=True, decode=True)
    charged, allocated = charged_and_allocated(engine, memory, [piece])
    assert allocated <= charged


def test_scores_are_a_part_of_what_stays_exactly() -> None:
    memory = DeviceMemory(1024 * MIB)
    config = ModelConfig.load(WEIGHTS / "target")
    plain, scored = (Footprint(config, None, BLOCK_SIZE, 2048, heavy_hitters=one) for one in (False, True))
    assert (plain.score_bytes_per_token, scored.score_bytes_per_token) == (0, 6 * 4 * 4)
    model = shipped("target")
    sizes = []
    for heavy_hitters in (False, True):
        before = memory.allocated_bytes
        _, kept = peak_bytes(
            lambda one=heavy_hitters: EagerExecutor(model, None, memory, 100, BLOCK_SIZE, heavy_hitters=one)
        )
        sizes.append((kept, memory.allocated_bytes - before))
    assert sizes[1][0] - sizes[0][0] == sizes[1][1] - sizes[0][1] == 100 * BLOCK_SIZE * 6 * 4 * 4
