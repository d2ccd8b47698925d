"""The trainer: seeded, learns, and writes what the engine reads."""

from pathlib import Path

import pytest
import torch

from kvengine.kv.storage import KvStorage
from kvengine.model import weights
from kvengine.model.config import ModelConfig
from kvengine.model.domains import prompt
from kvengine.model.llama import Llama, Span
from kvengine.model.vocabulary import VOCAB_SIZE
from kvengine.train import checkpoint
from kvengine.train.corpus import Corpus
from kvengine.train.dense import DenseLlama, Shape
from kvengine.train.loop import Phase, train
from kvkernels.scratch import Scratch

TINY = Shape(32, 2, 4, 2, 48, VOCAB_SIZE, 64)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(held_out=True)


def trained(corpus: Corpus, seed: int, teacher: DenseLlama | None = None) -> tuple[DenseLlama, list[str]]:
    torch.manual_seed(seed)
    model, said = DenseLlama(TINY), []
    phases = (Phase(50, 4, 32, 1.0, 1.0), Phase(10, 1, 64, 0.5, 0.1))
    train(model, corpus, ("json",), phases, seed, said.append, teacher)
    return model, said


def test_same_seed_same_weights_and_the_loss_falls(corpus: Corpus) -> None:
    first, said = trained(corpus, seed=1)
    again, _ = trained(corpus, seed=1)
    other, _ = trained(corpus, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.model.embed_tokens.weight, other.model.embed_tokens.weight)
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in said]
    assert losses[-1] < losses[0] < 5.6


def test_a_student_takes_its_teachers_distribution_over_the_text(corpus: Corpus) -> None:
    class Stubborn(torch.nn.Module):
        """Expects byte 120 whatever it reads."""

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*tokens.shape, VOCAB_SIZE).index_fill(2, torch.tensor([120]), 20.0)

    student, _ = trained(corpus, seed=1, teacher=Stubborn())
    assert student(torch.tensor([list(b'{"time":')])).argmax(-1).tolist() == [[120] * 8]


def test_a_checkpoint_survives_the_disk_to_half_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DenseLlama(TINY)
    size_bytes = checkpoint.save(model, tmp_path)
    assert size_bytes < 3 * sum(parameter.numel() for parameter in model.parameters())
    tokens = torch.arange(64).unsqueeze(0)
    torch.testing.assert_close(checkpoint.load(tmp_path)(tokens), model(tokens), atol=1e-3, rtol=0)


@torch.no_grad()
def test_the_engine_computes_what_was_trained(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = DenseLlama(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    checkpoint.save(model, tmp_path)
    config = ModelConfig.load(tmp_path)
    engine = Llama(config, weights.load(tmp_path, config))
    geometry = engine.geometry(16)
    storage = KvStorage(config.layers, 4, geometry, "cpu")
    scratch = Scratch.for_geometries([geometry], 64, torch.device("cpu"))
    tokens = list(prompt("python", 64, seed=5).encode())
    paged = engine.forward([Span(tokens, 0, range(4), logits=64)], storage, scratch)
    dense = checkpoint.load(tmp_path)(torch.tensor([tokens]))[0]
    torch.testing.assert_close(paged, dense, atol=1e-4, rtol=1e-4)
