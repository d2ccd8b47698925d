"""Speculation is lossless: what verify emits is distributed as the target's own sampling, to chi-square.

The same test run on three classic mistakes must fail, or it proves nothing. (The fourth, draft KV that is not
rolled back, shows only with a model: see the executor's greedy equality test.)
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kvengine.model.sampling import one_hot, sample
from kvengine.spec.verify import leading, verify

V, K, N = 8, 3, 400_000
CRITICAL_63 = 103.4  # chi-square, 63 degrees of freedom, alpha = 1e-3
Verdict = tuple[Tensor, Tensor]
Verify = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Verdict]


def residual_from_p(p: Tensor, q: Tensor, tokens: Tensor, counts: Tensor, uniforms: Tensor) -> Verdict:
    """Mutant: after a rejection draws from p in place of max(p - q, 0)."""
    accepted, _ = verify(p, q, tokens, counts, uniforms)
    return accepted, sample(p[torch.arange(len(p)), accepted], uniforms[:, -1])


def inverted_ratio(p: Tensor, q: Tensor, tokens: Tensor, counts: Tensor, uniforms: Tensor) -> Verdict:
    """Mutant: accepts with probability q/p."""
    drafts = tokens.unsqueeze(-1)
    p_token, q_token = p[:, :-1].gather(-1, drafts).squeeze(-1), q.gather(-1, drafts).squeeze(-1)
    accepted = leading(uniforms[:, :-1] * p_token < q_token, counts)
    residual = verify(p, q, tokens, counts, uniforms)[1]
    return accepted, residual


def no_bonus(p: Tensor, q: Tensor, tokens: Tensor, counts: Tensor, uniforms: Tensor) -> Verdict:
    """Mutant: after a full acceptance the last draft is emitted again in place of a bonus token."""
    accepted, following = verify(p, q, tokens, counts, uniforms)
    full = accepted == counts
    return accepted, torch.where(full, tokens[:, -1], following)


def certain(p: Tensor, q: Tensor, tokens: Tensor, counts: Tensor, uniforms: Tensor) -> Verdict:
    """Drafts without a distribution: the rule knows that each was certain."""
    return verify(p, None, tokens, counts, uniforms)


def certain_residual_from_p(
    p: Tensor, q: Tensor, tokens: Tensor, counts: Tensor, uniforms: Tensor
) -> Verdict:
    """Mutant: after a certain draft fell, it may be drawn all the same."""
    accepted, _ = verify(p, None, tokens, counts, uniforms)
    return accepted, sample(p[torch.arange(len(p)), accepted], uniforms[:, -1])


def chi_square_of_first_two(rule: Verify, counts: Tensor, drawn: bool = True) -> float:
    """Statistic of the joint of the first two tokens of N chains, from one Markov target and draft.

    Not `drawn`: the draft always proposes its likeliest token, as an n-gram drafter does.
    """
    generator = torch.Generator().manual_seed(7)
    target, draft = (torch.softmax(torch.randn(V, V, generator=generator), -1) for _ in range(2))
    k = int(counts.max())
    tokens, previous = torch.empty(N, k, dtype=torch.long), torch.zeros(N, dtype=torch.long)
    p, q = torch.empty(N, k + 1, V), torch.empty(N, k, V)
    for i in range(k):
        p[:, i], q[:, i] = target[previous], draft[previous]
        uniforms = torch.rand(N, generator=generator)
        previous = tokens[:, i] = sample(q[:, i], uniforms) if drawn else q[:, i].argmax(-1)
    p[:, k] = target[previous]
    accepted, following = rule(p, q, tokens, counts, torch.rand(N, k + 1, generator=generator))
    first = torch.where(accepted > 0, tokens[:, 0], following)
    second = torch.where(accepted > 1, tokens[:, 1 % k], following)
    # A chain that emitted only one token goes on with plain sampling.
    plain = sample(target[first], torch.rand(N, generator=generator))
    second = torch.where(accepted == 0, plain, second)
    seen = torch.bincount(first * V + second, minlength=V * V).double()
    expected = (target[0].unsqueeze(1) * target).flatten().double() * N
    return float(((seen - expected) ** 2 / expected).sum())


def test_emitted_tokens_follow_the_target_distribution() -> None:
    assert chi_square_of_first_two(verify, torch.full((N,), K)) < CRITICAL_63


@pytest.mark.parametrize("counts", [torch.full((N,), K), torch.arange(N) % (K + 1)], ids=["all", "fewer"])
def test_certain_drafts_follow_the_target_distribution(counts: Tensor) -> None:
    assert chi_square_of_first_two(certain, counts, drawn=False) < CRITICAL_63


def test_a_certain_draft_that_fell_is_not_drawn_again() -> None:
    statistic = chi_square_of_first_two(certain_residual_from_p, torch.full((N,), K), drawn=False)
    assert statistic > 10 * CRITICAL_63


def test_sequences_that_drafted_fewer_follow_it_too() -> None:
    counts = torch.arange(N) % (K + 1)
    assert chi_square_of_first_two(verify, counts) < CRITICAL_63


# The dropped bonus shows in the first two tokens only when one draft is the whole draft.
@pytest.mark.parametrize(("mutant", "k"), [(residual_from_p, K), (inverted_ratio, K), (no_bonus, 1)])
def test_classic_mistakes_are_caught(mutant: Verify, k: int) -> None:
    assert chi_square_of_first_two(mutant, torch.full((N,), k)) > 10 * CRITICAL_63


def test_one_draft_is_correct_where_its_mutant_is_not() -> None:
    assert chi_square_of_first_two(verify, torch.full((N,), 1)) < CRITICAL_63


def test_greedy_keeps_drafts_up_to_the_first_that_differs() -> None:
    choices = torch.tensor([[1, 2, 0, 1], [1, 2, 0, 1], [0, 2, 0, 1], [1, 2, 0, 1]])
    drafts = torch.tensor([[1, 2, 0], [1, 0, 0], [1, 2, 0], [1, 2, 0]])
    counts = torch.tensor([3, 3, 3, 1])
    accepted, following = verify(one_hot(choices, 3), one_hot(drafts, 3), drafts, counts, torch.rand(4, 4))
    assert accepted.tolist() == [3, 1, 0, 1]
    assert following.tolist() == [1, 2, 0, 2]


def test_nothing_drafted_is_plain_sampling() -> None:
    p = torch.tensor([[[0.0, 0.25, 0.75]]])
    nothing = torch.zeros(1, dtype=torch.long)
    for uniform, token in ((0.0, 1), (0.2499, 1), (0.25, 2), (0.999999, 2)):
        accepted, following = verify(
            p, torch.empty(1, 0, 3), torch.empty(1, 0).long(), nothing, torch.tensor([[uniform]])
        )
        assert (accepted.item(), following.item()) == (0, token)


def test_draft_equal_to_the_target_is_always_accepted() -> None:
    p = torch.softmax(torch.randn(64, 5, 50, generator=torch.Generator().manual_seed(1)), -1)
    tokens = sample(p[:, :4], torch.rand(64, 4, generator=torch.Generator().manual_seed(2)))
    almost_one = torch.full((64, 5), 1 - 2**-24)
    accepted, _ = verify(p, p[:, :4], tokens, torch.full((64,), 4), almost_one)
    assert accepted.tolist() == [4] * 64
