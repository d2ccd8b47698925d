"""Temperature, top-p and the draw, each row by its own settings."""

import pytest
import torch

from kvengine.model.sampling import probs, sample


def distributions(logits: list[list[float]], temperature: list[float], top_p: list[float]) -> torch.Tensor:
    return probs(torch.tensor(logits), torch.tensor(temperature), torch.tensor(top_p))


def test_rows_keep_their_own_temperature_and_top_p() -> None:
    row = [2.0, 1.0, 0.0, -1.0]
    mixed = distributions([row] * 4, [0.0, 1.0, 0.5, 1.0], [1.0, 1.0, 1.0, 0.7])
    for at, (temperature, top_p) in enumerate([(0.0, 1.0), (1.0, 1.0), (0.5, 1.0), (1.0, 0.7)]):
        torch.testing.assert_close(mixed[at], distributions([row], [temperature], [top_p])[0])
    assert mixed[0].tolist() == [1.0, 0.0, 0.0, 0.0]
    torch.testing.assert_close(mixed[1], torch.tensor(row).softmax(-1))
    torch.testing.assert_close(mixed[2], (torch.tensor(row) / 0.5).softmax(-1))


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(1.0, 4), (0.96, 4), (0.95, 3), (0.81, 3), (0.79, 2), (0.49, 1), (0.01, 1), (0.0, 1)],
)
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p: float, kept: int) -> None:
    weights = torch.tensor([0.05, 0.5, 0.15, 0.3])
    distribution = distributions([weights.log().tolist()], [1.0], [top_p])[0]
    order = [1, 3, 2, 0][:kept]
    assert set(distribution.nonzero().flatten().tolist()) == set(order)
    torch.testing.assert_close(distribution[order], weights[order] / weights[order].sum())


def test_a_vanishing_temperature_is_greedy_not_infinite() -> None:
    assert distributions([[3.0, 3.1]], [1e-30], [1.0])[0].tolist() == [0.0, 1.0]


# 1.0 is no uniform, but what the largest ones become in float32.
@pytest.mark.parametrize("uniform", [0.0, 1e-12, 0.5, 1 - 2**-53, 1.0])
def test_a_token_of_probability_zero_is_never_drawn(uniform: float) -> None:
    weights = torch.zeros(1, 1000)
    weights[0, 400:600] = 1e-3
    token = sample(weights, torch.tensor([uniform], dtype=torch.float64)).item()
    assert 400 <= token < 600


def test_draws_follow_the_distribution() -> None:
    distribution = torch.tensor([0.5, 0.125, 0.0, 0.375]).expand(40_000, 4)
    tokens = sample(distribution, torch.rand(40_000, generator=torch.Generator().manual_seed(1)))
    seen = torch.bincount(tokens, minlength=4) / 40_000
    torch.testing.assert_close(seen, distribution[0], atol=0.01, rtol=0)


def test_a_rows_draw_does_not_depend_on_its_batch() -> None:
    logits = torch.randn(32, 259, generator=torch.Generator().manual_seed(1))
    temperature, top_p = torch.linspace(0, 2, 32), torch.linspace(0.1, 1, 32)
    uniforms = torch.rand(32, generator=torch.Generator().manual_seed(2))
    together = sample(probs(logits, temperature, top_p), uniforms)
    for i in range(32):
        one = slice(i, i + 1)
        assert sample(probs(logits[one], temperature[one], top_p[one]), uniforms[one]) == together[i]
