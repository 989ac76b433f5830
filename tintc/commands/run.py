"""tintc run: train on the first part of a text inside one forward pass, predict the rest, and
continue it, or a prompt, under what was learned.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tintc.commands import console
from tintc.commands.continuing import Continuing, Staged, printed, prompt_of
from tintc.commands.generating import Generating
from tintc.commands.loaded import load_at_rate, tokenizing
from tintc.commands.text import Reading, check_loss, check_rest, outcome, show
from tintc.compiler.adapted_files import load_adapted
from tintc.ir.errors import UsageError
from tintc.runtime.adapted import Adapted
from tintc.runtime.labels import language_loss, mean_loss
from tintc.runtime.simulator import Simulator


def run(
    path: Path,
    asked: Reading,
    generating: Generating,
    device: str | None,
    dtype: torch.dtype | None,
    *,
    as_json: bool,
) -> None:
    """Prints the perplexity of the untrained part before and after, and what the updated weights
    generate.
    """
    text = asked.prompt()
    prompt = generating.read() if generating.is_asked else None
    simulator = load_at_rate(path, asked.inner_lr, device, dtype)
    longest = simulator.program.facts.longest
    ids = torch.tensor([asked.ids(text, tokenizing(simulator), longest, streams=True)])
    start = ids[0].tolist() if prompt is None else prompt_of(simulator, prompt)
    trained = asked.trained(ids.shape[1])
    predicted = check_rest(ids.shape[1], trained, asked.generate)
    adapted = None
    with torch.inference_mode():
        if asked.generate:
            adapted, before, after, seconds = learn(simulator, ids, trained)
        else:
            before, after = _losses(simulator, ids, trained)
        rate = float(simulator.inner_lr.detach())
        check_loss(after, rate)
        result = outcome(
            simulator.config,
            rate,
            tokens=ids.shape[1],
            trained=trained,
            predicted=predicted,
            before=before,
            after=after,
        )
        if adapted is not None and asked.generate:
            if not as_json:
                show(result, as_json)
            result["adapt_seconds"] = seconds
            continuing = Continuing(simulator, generating, asked.generate)
            result |= go_on(continuing, adapted, start, as_json=as_json)
    if as_json or adapted is None:
        show(result, as_json)


def run_adapted(
    path: Path,
    generating: Generating,
    count: int,
    device: str | None,
    dtype: torch.dtype | None,
    *,
    as_json: bool,
) -> None:
    """Continues a prompt under what `tintc adapt` wrote. count: tokens."""
    assert generating.adapted is not None
    prompt = generating.read()
    simulator = load_at_rate(path, None, device, dtype)
    start = prompt_of(simulator, prompt)
    adapted = load_adapted(generating.adapted, simulator)
    if len(adapted) != 1:
        raise UsageError(
            f"{generating.adapted} holds {len(adapted)} adapted sequences, and the prompt is "
            "continued under one; save one of them with adapted.select(i)"
        )
    with torch.inference_mode():
        result = go_on(Continuing(simulator, generating, count), adapted, start, as_json=as_json)
    if as_json:
        console.print_json(result)


def go_on(
    continuing: Continuing, adapted: Adapted, prompt: Sequence[int], *, as_json: bool
) -> dict[str, Any]:
    """What follows a prompt, as JSON values; without --json it is printed as it comes."""
    if as_json:
        with console.stages(continuing.count) as stage:
            found = continuing.one(adapted, prompt, Staged(stage, continuing.count))
    else:
        with printed(continuing) as streamer:
            found = continuing.one(adapted, prompt, streamer)
    speed = continuing.speed()
    if (rate := speed["tokens_per_second"]) is not None:
        logging.getLogger("tintc").info("%d tokens, %.1f a second", found.tokens, rate)
    return {"prompt_tokens": len(prompt), "generated": found.text, **speed}


def _losses(simulator: Simulator, ids: Tensor, trained: int) -> tuple[float, float]:
    """Before and after, of no logits that half precision has rounded."""
    labels = _labels(ids, trained)
    out = simulator.losses(ids, _mask(ids, trained), labels, return_initial=True)
    assert out.initial_losses is not None
    before = mean_loss(out.initial_losses, labels.to(simulator.device))
    return float(before), float(out.loss)


def learn(simulator: Simulator, ids: Tensor, trained: int) -> tuple[Adapted, float, float, float]:
    """What is learned, the same losses without training a second time, and seconds of training."""
    begun = time.perf_counter()
    adapted = simulator.adapt(ids, _mask(ids, trained))
    if simulator.device.type == "cuda":
        torch.cuda.synchronize(simulator.device)
    seconds = time.perf_counter() - begun
    labels = _labels(ids, trained)
    after = adapted(ids, labels=labels).loss
    assert after is not None
    before = language_loss(simulator.predict_initial(ids), labels.to(simulator.device))
    return adapted, float(before), float(after), seconds


def _mask(ids: Tensor, trained: int) -> Tensor:
    mask = torch.zeros_like(ids)
    mask[:, :trained] = 1
    return mask


def _labels(ids: Tensor, trained: int) -> Tensor:
    """Of the predicted tokens. Where nothing is left to predict, all tokens tell whether training
    diverged.
    """
    labels = ids.clone()
    if trained < ids.shape[1]:
        labels[:, :trained] = -100
    labels[:, 0] = -100
    return labels
