"""The drafter without a model: what followed the same few tokens the last time is drafted again.

The longest of the sequence's own endings, of `LONGEST` down to `SHORTEST` tokens, that occurs in it before is
looked up, and its latest occurrence continued. Stateless: O(length) a sequence and step, by searching bytes.
Each draft is certain (its q is 1), so the verdict is the target's own probability of it, and no distribution
is kept. Nothing is drawn: the request's generator is left as it is.
"""

from array import array
from collections.abc import Sequence

import torch

from kvengine.request import Request
from kvengine.spec.draft import Proposal

LONGEST, SHORTEST = 6, 2


def propose(requests: Sequence[Request], wanted: Sequence[int], device: torch.device | str) -> Proposal:
    """Up to `wanted[i]` drafts after `requests[i].tokens`; none where nothing like its end came before."""
    drafted = [continuation(request.tokens, count) for request, count in zip(requests, wanted, strict=True)]
    width = max(map(len, drafted))
    rows = [tokens + [0] * (width - len(tokens)) for tokens in drafted]
    tokens = torch.tensor(rows, dtype=torch.long, device=device)
    return Proposal(tokens, None, [len(tokens) for tokens in drafted])


def continuation(tokens: Sequence[int], count: int) -> list[int]:
    """What followed the latest earlier occurrence of the end of `tokens`; at most `count` tokens."""
    data = array("I", tokens)
    text, width = data.tobytes(), data.itemsize
    for length in range(min(LONGEST, len(tokens) - 1), SHORTEST - 1, -1):
        end = text[-length * width :]
        found = text.rfind(end, 0, len(text) - width)
        while found > 0 and found % width:
            found = text.rfind(end, 0, found + len(end) - 1)
        if found >= 0:
            first = found // width + length
            return list(tokens[first : first + count])
    return []
