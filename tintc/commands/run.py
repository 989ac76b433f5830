"""tintc run: train on the first part of a text inside one forward pass, and predict the rest."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tintc.commands import console
from tintc.commands.loaded import load_at_rate
from tintc.commands.prompt import Prompt
from tintc.commands.text import Reading, check_loss, check_rest, losses, show
from tintc.ir.errors import InputError
from tintc.runtime.simulator import Simulator


def run(
    path: Path,
    asked: Reading,
    device: str | None,
    dtype: torch.dtype | None,
    *,
    as_json: bool,
) -> None:
    """Prints the perplexity of the untrained part before and after, and what the updated weights
    generate.
    """
    prompt = asked.prompt()
    simulator = load_at_rate(path, asked.inner_lr, device, dtype)
    ids = _tokens(simulator, prompt, asked)
    trained = round(asked.train_fraction * ids.shape[1])
    train_mask = torch.zeros_like(ids)
    train_mask[:, :trained] = 1
    predicted = check_rest(ids.shape[1], trained, asked.generate)
    # Where nothing is left to predict, all tokens tell whether training diverged.
    labels = ids.masked_fill(train_mask.bool(), -100) if predicted else ids.clone()
    labels[:, 0] = -100
    with torch.inference_mode():
        out = simulator(ids, train_mask, labels=labels, return_initial=True)
        assert out.loss is not None
        assert out.initial_loss is not None
        before, after = float(out.initial_loss), float(out.loss)
        check_loss(after, float(simulator.inner_lr.detach()))
        continuation = (
            _with_a_bar(simulator, ids, train_mask, asked.generate) if asked.generate else None
        )
    result: dict[str, Any] = {
        "tokens": ids.shape[1],
        "trained_tokens": trained,
        "predicted_tokens": predicted,
        "inner_lr": float(simulator.inner_lr.detach()),
        "steps": simulator.config.steps,
        "rule": simulator.config.rule,
        **(losses(before, after) if predicted else losses(None, None)),
    }
    if continuation is not None:
        result["generated"] = continuation
    show(result, as_json)


def _tokens(simulator: Simulator, prompt: Prompt, asked: Reading) -> Tensor:
    tokenizer = simulator.tokenizer
    if tokenizer is None:
        raise InputError(
            "this artifact has no tokenizer (its source had none); call the simulator from Python "
            "with token ids"
        )

    def tokenize(text: str) -> list[int]:
        found: list[int] = tokenizer(text, verbose=False)["input_ids"]
        return found

    return torch.tensor([asked.ids(prompt, tokenize, simulator.program.facts.longest)])


def _with_a_bar(simulator: Simulator, ids: Tensor, train_mask: Tensor, count: int) -> str:
    with console.stages(count) as stage:
        return generate(simulator, ids, train_mask, count, stage)


def generate(
    simulator: Simulator,
    ids: Tensor,
    train_mask: Tensor,
    count: int,
    stage: Callable[[str], None],
) -> str:
    """Greedy continuation under the updated weights, until `count` tokens, the end token or the
    last position. stage: called in front of each.
    """
    updates = simulator.updates(ids, train_mask)
    limit, end = simulator.program.facts.longest or math.inf, simulator.tokenizer.eos_token_id
    start = ids.shape[1]
    if start + count > limit:
        warnings.warn(
            f"this simulator takes {limit} tokens: there is room for {limit - start} of {count} "
            "generated tokens",
            stacklevel=2,
        )
    while ids.shape[1] < min(start + count, limit):
        stage(f"generating token {ids.shape[1] - start + 1}")
        token = simulator.predict(updates, ids)[:, -1:].argmax(-1).to(ids.device)
        if end is not None and int(token) == end:
            break
        ids = torch.cat([ids, token], 1)
    return str(simulator.tokenizer.decode(ids[0, start:], skip_special_tokens=True))
