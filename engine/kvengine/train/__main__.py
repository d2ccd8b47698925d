"""`python -m kvengine.train`: train the shipped target and draft from nothing.

About eight minutes of one CPU core. The target learns both domains; its last phase reads whole windows of the
model's full length, so that long contexts mean something. The draft learns log lines only, from the target's
own distribution: it is good where it was taught and poor elsewhere, which gives the pilot a real decision to
make.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch

from kvengine.model.vocabulary import VOCAB_SIZE
from kvengine.train import checkpoint
from kvengine.train.corpus import Corpus
from kvengine.train.dense import DenseLlama, Shape
from kvengine.train.held_out import near_and_far
from kvengine.train.loop import Phase, train

MAX_TOKENS = 2048
TARGET = Shape(
    hidden_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=344,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=MAX_TOKENS,
)
DRAFT = Shape(
    hidden_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
    intermediate_size=176,
    vocab_size=VOCAB_SIZE,
    max_position_embeddings=MAX_TOKENS,
)
TARGET_DOMAINS = ("json", "python", "python")
TARGET_PHASES = (
    Phase(600, 8, 160, 1.0, 0.5),
    Phase(200, 3, 512, 0.5, 0.4),
    Phase(250, 1, MAX_TOKENS, 0.4, 0.02),
)
DRAFT_DOMAINS = ("json",)
DRAFT_PHASES = (
    Phase(600, 8, 160, 1.0, 0.6),
    Phase(150, 3, 512, 0.6, 0.5),
    Phase(250, 1, MAX_TOKENS, 0.5, 0.02),
)
WEIGHTS = Path(__file__).parents[1] / "weights"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kvengine.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="folder that gets target/ and draft/")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--only", choices=("target", "draft"), help="train one; the draft needs a target in --out"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    corpus, held_out = Corpus(held_out=False), Corpus(held_out=True)
    if arguments.only != "draft":
        torch.manual_seed(arguments.seed)
        target = DenseLlama(TARGET)
        train(target, corpus, TARGET_DOMAINS, TARGET_PHASES, arguments.seed, say=_say("target"))
        _finish(target, arguments.out / "target", held_out)
    if arguments.only != "target":
        torch.manual_seed(arguments.seed)
        teacher = checkpoint.load(arguments.out / "target")
        draft = DenseLlama(DRAFT)
        train(draft, corpus, DRAFT_DOMAINS, DRAFT_PHASES, arguments.seed, say=_say("draft"), teacher=teacher)
        _finish(draft, arguments.out / "draft", held_out)


def _say(name: str) -> Callable[[str], None]:
    return lambda line: print(f"{name}: {line}", flush=True)


def _finish(model: DenseLlama, folder: Path, held_out: Corpus) -> None:
    size_bytes = checkpoint.save(model, folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{folder}: {parameters:,} parameters, {size_bytes:,} bytes")
    for domain in TARGET_DOMAINS[:2]:
        near, far = near_and_far(model, held_out, domain, windows=24, seed=0)
        print(f"  {domain}: {near:.3f} nats/byte at 100-160, {far:.3f} at 1500-2000 ({far / near - 1:+.1%})")


if __name__ == "__main__":
    main()
