"""Prompts are exact, seeded and plain."""

import json
import random
from itertools import islice

import pytest

from kvengine.model import domains
from kvengine.model.domains import DOMAINS, DomainTextMissing, log_lines, prompt, source_files


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("n_tokens", [1, 17, 500, 1900, 100_000])
def test_a_prompt_has_exactly_the_tokens_asked_for(domain: str, n_tokens: int) -> None:
    text = prompt(domain, n_tokens, seed=3)
    assert len(text.encode("ascii")) == n_tokens
    assert text == prompt(domain, n_tokens, seed=3)


@pytest.mark.parametrize("domain", DOMAINS)
def test_seeds_give_different_prompts(domain: str) -> None:
    assert len({prompt(domain, 400, seed) for seed in range(20)}) == 20


def test_log_lines_are_json_in_time_order() -> None:
    times = [json.loads(line)["time"] for line in islice(log_lines(random.Random(1)), 200)]
    assert times == sorted(times)


def test_prompts_come_from_files_the_trainer_does_not_read() -> None:
    held_out, training = set(source_files(held_out=True)), set(source_files(held_out=False))
    assert held_out
    assert len(training) > len(held_out)
    assert not held_out & training


def test_an_unknown_domain_and_a_missing_library_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="choose one of json, python"):
        prompt("poetry", 10, 1)
    domains._library.cache_clear()
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    with pytest.raises(DomainTextMissing, match="no standard library source in /nowhere"):
        prompt("python", 10, 1)
    domains._library.cache_clear()
