"""Which blocks a sequence gives up, and what is refused: no pool, no model."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvengine.kv.eviction.choose import budget, surplus
from kvengine.kv.eviction.policy import Eviction, EvictionError, Offer
from kvengine.protocol import BadRequest, CompletionBody, parse

EXAMPLE = Eviction("h2o", sink=50, recent=300, heavy=50)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"policy": "lru"}, "policy 'lru' is unknown: choose one of window, streaming, h2o, fastgen"),
        ({"policy": "window", "recent": 0}, "recent is 0: must be at least 1"),
        ({"policy": "window", "sink": -1}, "sink is -1"),
        ({"policy": "window", "recent": 32, "heavy": 8}, "heavy is 8: policy 'window' keeps no heavy"),
        ({"policy": "h2o", "heavy": 8}, "heavy is 8 and recent is not given"),
        ({"policy": "fastgen"}, "recent is not given"),
        ({"policy": "fastgen", "recent": 32, "recovery": 1.5}, "recovery is 1.5: a share"),
        ({"policy": "streaming", "by_head": True}, "every head keeps the same"),
    ],
)
def test_an_eviction_that_means_nothing_is_refused_in_one_line(asked: dict, words: str) -> None:
    with pytest.raises(EvictionError, match=words.replace("(", r"\(")):
        Eviction(**asked)


def test_the_request_body_carries_it() -> None:
    body = b'{"prompt": "x", "kvpilot_evict": {"policy": "h2o", "sink": 50, "recent": 300, "heavy": 50}}'
    asked = parse(CompletionBody, body).kvpilot_evict
    assert asked is not None
    assert asked.eviction == EXAMPLE
    assert Eviction.from_wire(EXAMPLE.to_wire()) == EXAMPLE
    assert parse(CompletionBody, b'{"prompt": "x"}').kvpilot_evict is None
    for bad, words in [
        (b'{"policy": "lru"}', "unknown: choose one of"),
        (b'{"policy": "window", "window": 3}', "kvpilot_evict.window"),
        (b'{"sink": 3}', "kvpilot_evict.policy"),
        (b'"window"', "kvpilot_evict"),
    ]:
        with pytest.raises(BadRequest, match=words) as refused:
            parse(CompletionBody, b'{"prompt": "x", "kvpilot_evict": ' + bad + b"}")
        assert "\n" not in str(refused.value)


def test_what_an_engine_cannot_do_is_refused_with_the_numbers() -> None:
    plain = Offer(16)
    assert plain.refusal(Eviction("window", recent=16)) is None
    assert plain.refusal(Eviction("window")) is None
    assert "recent is 15 tokens and a block holds 16" in str(plain.refusal(Eviction("window", recent=15)))
    assert "--heavy-hitters" in str(plain.refusal(EXAMPLE))
    assert Offer(16, heavy_hitters=True).refusal(EXAMPLE) is None
    codes = Offer(16, precision="int8", stores_values=False)
    assert "pool is int8" in str(codes.refusal(Eviction("streaming", recent=32)))
    assert codes.refusal(Eviction("window", recent=32)) is None
    assert "latest 64 tokens" in str(Offer(16, sliding_window=64).refusal(Eviction("window")))


def test_two_thousand_become_four_hundred() -> None:
    """50 sink, 300 recent and 50 heavy tokens are 25 blocks of 16: 3, 19 and 3."""
    kept = budget(EXAMPLE, 2000, 16)
    assert (kept.sink, kept.recent, kept.total) == (3, 19, 25)
    mass = [float(number % 7) for number in range(125)]
    going = surplus(EXAMPLE, kept, list(range(125)), lambda _block: True, mass)
    staying = sorted(set(range(125)) - set(going))
    assert len(going) == 100
    assert staying[:3] == [0, 1, 2]
    assert staying[-19:] == list(range(106, 125))
    assert {mass[number] for number in staying[3:-19]} == {6.0}


def test_nothing_goes_before_the_knob_asks_and_then_its_share() -> None:
    pressed = Eviction("window", sink=4)
    assert budget(pressed, 1000, 16) is None
    kept = budget(pressed, 1000, 16, ratio=0.25)
    assert kept.total == 16
    assert budget(pressed, 1000, 16, ratio=0.001).total == 2, "its sinks and the block being filled"
    both = Eviction("window", sink=4, recent=320)
    assert budget(both, 1000, 16).total == 21
    assert budget(both, 1000, 16, ratio=0.2).total == 13
    assert budget(both, 1000, 16, ratio=0.9).total == 21


POLICY = st.sampled_from(["window", "streaming", "h2o"])


@given(
    policy=POLICY,
    sink=st.integers(0, 40),
    recent=st.none() | st.integers(8, 90),
    heavy=st.integers(0, 60),
    count=st.integers(1, 40),
    ratio=st.floats(0.05, 1),
    data=st.data(),
)
def test_what_goes_is_never_sink_recent_or_another_s(
    policy: str, sink: int, recent: int | None, heavy: int, count: int, ratio: float, data: st.DataObject
) -> None:
    """Nor more than has to, nor less than can; and never a heavier block before a lighter one."""
    asked = Eviction(policy, sink, recent, heavy if policy == "h2o" and recent is not None else 0)
    kept = budget(asked, count * 8, 8, ratio)
    if kept is None:
        return
    assert kept.sink + 1 <= kept.total
    assert kept.sink + kept.recent <= kept.total
    own = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    mass = data.draw(st.lists(st.floats(0, 9), min_size=count, max_size=count))
    blocks = list(range(100, 100 + count))
    going = surplus(asked, kept, blocks, lambda block: own[block - 100], mass)
    assert going == sorted(set(going))
    assert all(own[number] for number in going)
    assert all(kept.sink <= number < count - kept.recent for number in going)
    assert len(going) <= max(0, count - kept.total)
    if policy == "streaming":
        assert going in ([], list(range(kept.sink, kept.sink + len(going))))
        return
    free = [number for number in range(kept.sink, count - kept.recent) if own[number]]
    assert len(going) == min(max(0, count - kept.total), len(free))
    if policy == "h2o":
        left = [mass[number] for number in free if number not in going]
        assert not going or not left or max(mass[number] for number in going) <= min(left)
    else:
        assert going == free[: len(going)]
