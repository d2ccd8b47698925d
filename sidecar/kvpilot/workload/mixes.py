"""Named mixes of requests for the synthetic generator, sized like what services published.

chat     1,155 in / 211 out on average (Splitwise's conversations, ISCA '24), every fourth request batch work.
code     2,048 in / 28 out (Splitwise's code trace), all interactive.
mixed    chat beside long batch documents, as one service for both.
reason   short prompts, thousands of tokens of thought: KV memory fills while nothing arrives.
document 15,000 in / 150 out (Mooncake, FAST '25), tenants with long texts of their own in front.
hog      chat in which one tenant sends half of all, with longer prompts than anybody's.
"""

from dataclasses import replace

from kvpilot.workload.generator import ClassMix, Lengths

_PEOPLE = (("acme", 0.3), ("globex", 0.25), ("initech", 0.2), ("hooli", 0.15), ("umbrella", 0.1))
_DOMAINS = (("prose", 0.5), ("python", 0.3), ("json", 0.2))

_CHAT = ClassMix(
    "interactive", 0.75, Lengths(800, 0.85, 16, 8000), Lengths(160, 0.75, 8, 1500), _DOMAINS, _PEOPLE
)
_CHAT_BATCH = ClassMix(
    "batch", 0.25, Lengths(900, 0.8, 64, 8000), Lengths(190, 0.7, 16, 1500), _DOMAINS, _PEOPLE
)
_CODE = ClassMix(
    "interactive",
    0.9,
    Lengths(1500, 0.8, 32, 8000),
    Lengths(22, 0.7, 4, 400),
    (("python", 0.8), ("json", 0.2)),
    _PEOPLE,
)
_DOCUMENTS = ClassMix(
    "batch", 0.25, Lengths(6000, 0.6, 1000, 24_000), Lengths(260, 0.6, 32, 1500), (("prose", 1.0),), _PEOPLE
)
_REASON = ClassMix(
    "interactive", 0.8, Lengths(220, 0.7, 16, 2000), Lengths(1600, 0.7, 100, 8000), _DOMAINS, _PEOPLE
)
_HOG = ClassMix(
    "interactive",
    0.35,
    Lengths(2400, 0.5, 200, 8000),
    Lengths(260, 0.5, 32, 1500),
    _DOMAINS,
    (("hog", 1.0),),
)

MIXES: dict[str, tuple[ClassMix, ...]] = {
    "chat": (_CHAT, _CHAT_BATCH),
    "code": (_CODE, replace(_CODE, name="batch", share=0.1)),
    "mixed": (_CHAT, _DOCUMENTS),
    "reason": (_REASON, replace(_REASON, name="batch", share=0.2)),
    "document": (
        replace(_CHAT, prompt=Lengths(3000, 0.8, 100, 24_000), prefix_tokens=8192),
        replace(_DOCUMENTS, prefix_tokens=8192, prefix_share=0.8),
    ),
    "hog": (_HOG, replace(_CHAT, share=0.45), replace(_CHAT_BATCH, share=0.2)),
}
"""Class shares are of the requests."""
