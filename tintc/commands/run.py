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
from tintc.commands.showing import Showing
from tintc.commands.text import Reading, check_loss, check_rest, mean_of_rest, outcome, show
from tintc.compiler.adapted_files import load_adapted
from tintc.ir.call_sizes import Predict
from tintc.ir.errors import UsageError
from tintc.runtime.adapted import Adapted
from tintc.runtime.outputs import SimulatorLosses
from tintc.runtime.showing.of_outputs import decoding
from tintc.runtime.simulator import Simulator


def run(
    path: Path,
    asked: Reading,
    generating: Generating,
    showing: Showing,
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
            # where nothing is left to predict, all tokens tell whether training diverged
            whole = bool(showing.names()) or trained == ids.shape[1]
            before, after = _losses(simulator, ids, trained, "all" if whole else "rest")
        rate = float(simulator.inner_lr.detach())
        mean_after = mean_of_rest(after, trained)
        check_loss(mean_after, rate)
        result = outcome(
            simulator.config,
            rate,
            tokens=ids.shape[1],
            trained=trained,
            predicted=predicted,
            before=mean_of_rest(before, trained),
            after=mean_after,
        )
        decode = decoding(simulator.tokenizer)
        told = showing.told(ids[0].tolist(), decode, trained, before, after)
        result |= told.values()
        if adapted is not None and asked.generate:
            if not as_json:
                show(result, as_json)
                told.print()
            result["adapt_seconds"] = seconds
            continuing = Continuing(simulator, generating, asked.generate)
            result |= go_on(continuing, adapted, start, as_json=as_json)
    if as_json or adapted is None:
        show(result, as_json)
    if not as_json and adapted is None:
        told.print()


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


def _losses(
    simulator: Simulator, ids: Tensor, trained: int, predict: Predict
) -> tuple[list[float], list[float]]:
    """Before and after, of tokens 1, 2, ...; with predict `rest` 0 for the trained ones."""
    out = simulator.losses(ids, _mask(ids, trained), ids, return_initial=True, predict=predict)
    return _before_and_after(out)


def _before_and_after(out: SimulatorLosses) -> tuple[list[float], list[float]]:
    assert out.initial_losses is not None
    before, after = (each[0, :-1].tolist() for each in (out.initial_losses, out.losses))
    return before, after


def learn(
    simulator: Simulator, ids: Tensor, trained: int
) -> tuple[Adapted, list[float], list[float], float]:
    """What is learned, the same losses without training a second time, and seconds of training."""
    begun = time.perf_counter()
    adapted = simulator.adapt(ids, _mask(ids, trained))
    if simulator.device.type == "cuda":
        torch.cuda.synchronize(simulator.device)
    seconds = time.perf_counter() - begun
    return adapted, *_before_and_after(adapted.losses(ids, ids, return_initial=True)), seconds


def _mask(ids: Tensor, trained: int) -> Tensor:
    mask = torch.zeros_like(ids)
    mask[:, :trained] = 1
    return mask
