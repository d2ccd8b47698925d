"""How many drafts were verified in a step, and how many of them hit."""

from typing import Any, NamedTuple


class Drafted(NamedTuple):
    """Sums over one step's requests; `rejected` counts requests of which at least one draft was."""

    rounds: int
    drafts: int
    accepted: int
    rejected: int


def drafted_by_all(drafts: int, counts: list[int], most: int) -> Drafted | None:
    """For a batch in which every request has drafts, `drafts` in sum, and got `counts` tokens, one of which
    is no draft. None where they do not all have as many drafts as possible, `most`.
    """
    rounds = len(counts)
    if drafts != most * rounds:
        return None
    return Drafted(rounds, drafts, sum(counts) - rounds, rounds - counts.count(most + 1))


def drafted(drafts: dict[str, list[int]], counts: list[int], index: dict[str, int], invalid: Any) -> Drafted:
    """`drafts` by request; `counts`: tokens sampled for each request of the batch, at its place in `index`;
    one is no draft. `invalid`: drafts by request that only fill up.

    A request without a token is left out: its round was for nothing.
    """
    rounds = verified = accepted = rejected = 0
    for request_id, tokens in drafts.items():
        count = counts[index[request_id]]
        if count:
            length = len(tokens) - (invalid.get(request_id, 0) if invalid else 0)
            rounds += 1
            verified += length
            accepted += count - 1
            rejected += count <= length
    return Drafted(rounds, verified, accepted, rejected)
