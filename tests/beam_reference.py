"""Beam search as one would write it down: whole texts, every token of the vocabulary, nothing kept."""

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

Follow = Callable[[list[int]], Sequence[tuple[int, float]]]
"""Every token that may follow a text, with its log-probability."""


class Found(NamedTuple):
    output: list[int]
    logprob: float
    score: float
    finish: str


def beam_search(
    follow: Follow,
    prompt: list[int],
    width: int,
    max_tokens: int,
    eos: Collection[int] = (),
    length_penalty: float = 1.0,
    early_stopping: bool | str = False,
) -> list[Found]:
    """The `width` best, best first."""
    beams: list[tuple[float, list[int]]] = [(0.0, prompt)]
    done: list[Found] = []
    for output in range(1, max_tokens + 1):
        grown = [
            (total + logprob, [*text, token])
            for total, text in beams
            for token, logprob in sorted(follow(text), key=lambda one: -one[1])
        ]
        grown.sort(key=lambda one: -one[0])
        beams = []
        for total, text in grown[: 2 * width]:
            if text[-1] in eos:
                done.append(
                    Found(text[len(prompt) :], total, total / (len(text) - 1) ** length_penalty, "stop")
                )
            elif output == max_tokens:
                done.append(Found(text[len(prompt) :], total, total / len(text) ** length_penalty, "length"))
            else:
                beams.append((total, text))
        done = sorted(done, key=lambda one: -one.score)[:width]
        if not beams:
            break
        if len(done) == width:
            total, text = beams[0]
            longest = len(prompt) + max_tokens
            lengths = [longest] if early_stopping == "never" and length_penalty > 0 else [len(text)]
            if early_stopping is True or all(done[-1].score >= total / n**length_penalty for n in lengths):
                break
        beams = beams[:width]
    return done
