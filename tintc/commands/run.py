"""tintc run: train on the first part of a text inside one forward pass, and predict the rest."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from tintc.commands import console
from tintc.compiler.artifact import load
from tintc.compiler.errors import InputError, NumericalError, UsageError
from tintc.runtime.simulator import Simulator


def run(
    path: Path,
    *,
    text: str | None,
    file: str | None,
    train_fraction: float,
    generate: int,
    max_tokens: int | None,
    inner_lr: float | None,
    device: str | None,
    dtype: torch.dtype | None,
    as_json: bool,
) -> None:
    """Prints the perplexity of the untrained part before and after, and what the updated weights generate."""
    if not 0 <= train_fraction < 1:
        raise UsageError(f"train-fraction is {train_fraction:g}; expected 0 or more and below 1: the rest is what is predicted")
    if inner_lr is not None and not math.isfinite(inner_lr):
        raise UsageError(f"inner-lr is {inner_lr:g}; expected a finite number")
    text = _read(text, file)
    simulator = load(path, device=device, dtype=dtype)
    if inner_lr is not None:
        simulator.inner_lr.data.fill_(inner_lr)
    ids = _tokens(simulator, text, max_tokens)
    trained = round(train_fraction * ids.shape[1])
    train_mask = torch.zeros_like(ids)
    train_mask[:, :trained] = 1
    labels = ids.masked_fill(train_mask.bool(), -100)
    labels[:, 0] = -100
    if not (labels != -100).any():
        raise InputError(f"the text has {ids.shape[1]} tokens, {trained} of them trained: nothing is left to predict; pass more text")
    with torch.inference_mode():
        out = simulator(ids, train_mask, labels=labels, return_initial=True)
        assert out.loss is not None
        assert out.initial_loss is not None
        before, after = float(out.initial_loss), float(out.loss)
        if not math.isfinite(after):
            raise NumericalError(
                f"the loss after the inner training is {after:g} at learning rate {float(simulator.inner_lr.detach()):g}: "
                "the updated weights are too large; pass a smaller --inner-lr"
            )
        continuation = _generate(simulator, ids, train_mask, generate) if generate else None
    result: dict[str, Any] = {
        "tokens": ids.shape[1],
        "trained_tokens": trained,
        "predicted_tokens": int((labels != -100).sum()),
        "inner_lr": float(simulator.inner_lr.detach()),
        "steps": simulator.config.steps,
        "loss_before": before,
        "loss_after": after,
        "perplexity_before": _perplexity(before),
        "perplexity_after": _perplexity(after),
    }
    if continuation is not None:
        result["generated"] = continuation
    _print(result, as_json)


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 709 else math.inf  # e^709 is the largest power that a float holds


def _read(text: str | None, file: str | None) -> str:
    if (text is None) == (file is None):
        raise UsageError("pass one of --text TEXT, --file FILE, or - to read standard input")
    name = "--text" if file is None else "standard input" if file == "-" else file
    try:
        if file is not None:
            data = sys.stdin.buffer.read() if file == "-" else Path(file).expanduser().read_bytes()
            text = data.decode("utf-8-sig")
        assert text is not None
        text.encode("utf-8")  # what a shell passes may hold bytes that are no UTF-8
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise InputError(f"cannot read {name}: {reason}") from error
    if not text.strip():
        raise InputError("the text is empty; expected a few sentences")
    return text.strip()


def _tokens(simulator: Simulator, text: str, max_tokens: int | None) -> Tensor:
    if simulator.tokenizer is None:
        raise InputError("this artifact has no tokenizer (its source had none); call the simulator from Python with token ids")
    ids: Tensor = simulator.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    limit = simulator.program.facts.longest
    if max_tokens is not None:
        ids = ids[:, :max_tokens]
    if limit is not None and ids.shape[1] > limit:
        raise InputError(f"the text has {ids.shape[1]} tokens; this simulator takes {limit}: pass --max-tokens {limit} to cut it")
    if ids.shape[1] < 2:
        raise InputError(f"the text has {ids.shape[1]} token; expected at least 2")
    return ids


def _generate(simulator: Simulator, ids: Tensor, train_mask: Tensor, count: int) -> str:
    """Greedy continuation under the updated weights, until `count` tokens, the end token or the last position."""
    updates = simulator.updates(ids, train_mask)
    limit, end = simulator.program.facts.longest or math.inf, simulator.tokenizer.eos_token_id
    start = ids.shape[1]
    if start + count > limit:
        warnings.warn(f"this simulator takes {limit} tokens: there is room for {limit - start} of {count} generated tokens", stacklevel=2)
    with console.stages(count) as stage:
        while ids.shape[1] < min(start + count, limit):
            stage(f"generating token {ids.shape[1] - start + 1}")
            token = simulator.predict(updates, ids)[:, -1:].argmax(-1).to(ids.device)
            if end is not None and int(token) == end:
                break
            ids = torch.cat([ids, token], 1)
    return str(simulator.tokenizer.decode(ids[0, start:], skip_special_tokens=True))


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        console.print_json(result)
        return
    before, after = result["perplexity_before"], result["perplexity_after"]
    table = Table.grid(padding=(0, 2))
    table.add_row("[bold]tokens[/bold]", f"{result['tokens']}: {result['trained_tokens']} trained, {result['predicted_tokens']} predicted")
    steps = f"{result['steps']} step{'s' if result['steps'] > 1 else ''}"
    change = f"  ({100 * (after / before - 1):+.2f} %)" if after < 100 * before else ""
    table.add_row("[bold]inner training[/bold]", f"{steps} at learning rate {result['inner_lr']:g}")
    table.add_row("[bold]perplexity before[/bold]", f"{before:.3f}" if before < 1e6 else f"{before:.3g}")
    table.add_row("[bold]perplexity after[/bold]", (f"{after:.3f}" if after < 1e6 else f"{after:.3g}") + change)
    console.print_table(table, fold=True)
    if "generated" in result:
        console.out.print(result["generated"], markup=False)
