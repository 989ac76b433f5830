"""A tiny random model in float64 with a real tokenizer, and small tasks."""

from __future__ import annotations

import json
import random
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from tests.support.models import opt
from tintc.evaluate.auxiliary import Auxiliary
from tintc.evaluate.prompts import Tokens

VOCAB, POSITIONS = 4096, 160
_WORDS = [
    "a",
    "the",
    "film",
    "story",
    "is",
    "was",
    "it",
    "and",
    "but",
    "long",
    "dull",
    "warm",
    "funny",
    "flat",
    "cast",
    "music",
    "scene",
]


@lru_cache(maxsize=1)
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(str(resources.files("tintc") / "data" / "tiny-opt"))


def model() -> nn.Module:
    found: nn.Module = opt(vocab=VOCAB, hidden=12, heads=3, ffn=20, layers=2, positions=POSITIONS)
    return found


@lru_cache(maxsize=1)
def auxiliary() -> Auxiliary:
    return Auxiliary(model(), tokenizer=tokenizer())


def log_likelihood(module: nn.Module, context: Tokens, label: Tokens) -> float:
    """log p(label | context) of the Hugging Face model, one prompt alone."""
    with torch.no_grad():
        logits = module(torch.tensor([context + label]), use_cache=False).logits[0]
    log_p = logits.double().log_softmax(-1)
    return sum(float(log_p[len(context) + place - 1, token]) for place, token in enumerate(label))


def loss_of(module: nn.Module, tokens: Tokens, targets: Tokens) -> Tensor:
    """Sum of the cross-entropies of some tokens of one text alone."""
    logits = module(torch.tensor([tokens]), use_cache=False).logits[0]
    log_p = logits.double().log_softmax(-1)
    return -torch.stack([log_p[target - 1, tokens[target]] for target in targets]).sum()


def fine_tuned(texts: list[tuple[Tokens, Tokens]], rate: float, steps: int) -> nn.Module:
    """The model after SGD on (tokens, targets) texts, each seeing only itself; embeddings and head
    stay.
    """
    module = model()
    trained = [
        parameter
        for name, parameter in module.named_parameters()
        if ".layers." in name or "final_layer_norm" in name
    ]
    optimizer = torch.optim.SGD(trained, lr=rate)
    for _ in range(steps):
        module.zero_grad()
        sum((loss_of(module, *text) for text in texts), torch.zeros(())).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return module


def write_task(
    root: Path,
    name: str = "sst2",
    *,
    train: int = 40,
    test: int = 16,
    labels: int = 2,
    seed: int = 0,
) -> Path:
    """A task of random texts whose labels mean nothing."""
    generator = random.Random(seed)
    (root / name).mkdir(parents=True)
    for split, count in (("train", train), ("test", test)):
        lines = [
            {
                "text": " ".join(generator.choices(_WORDS, k=generator.randint(2, 9))),
                "label": index % labels,
            }
            for index in range(count)
        ]
        (root / name / f"{split}.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
    return root
