"""tintc adapt: train on a text inside one forward pass, or chunk by chunk, and write what was
learned.

Legend: T tokens of a window.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tintc.commands import console
from tintc.commands.adapt_options import AdaptStream, Learning, Saving
from tintc.commands.loaded import load_at_rate, tokenizing
from tintc.commands.run import learn
from tintc.commands.text import (
    change,
    check_loss,
    losses,
    mean_of_rest,
    perplexity,
    rounded,
)
from tintc.compiler.adapted_checkpoint import model_without_weights
from tintc.compiler.adapted_manifest import ADAPTED, KIND
from tintc.compiler.adapted_writer import SavedAdapted, save_adapted
from tintc.compiler.artifact_files import check_target
from tintc.compiler.peft_adapter import check_installed
from tintc.ir.precision import wide_dtype
from tintc.ir.rule_values import rule_text
from tintc.runtime.adapted import Adapted
from tintc.runtime.reading import Rows
from tintc.runtime.simulator import Simulator
from tintc.runtime.stream_settings import StreamSettings
from tintc.runtime.streaming import Stream

Show = Callable[[str, int, int], None]


def run(
    path: Path,
    asked: Learning,
    saving: Saving,
    reads: AdaptStream,
    device: str | None,
    dtype: torch.dtype | None,
    *,
    as_json: bool,
) -> None:
    """Prints what was written, and the loss of the trained tokens before and after."""
    rank, settings = saving.rank_number(), reads.settings()
    text, target = asked.prompt(), saving.output.expanduser()
    check_target(target, force=saving.force, manifest=ADAPTED, kind=KIND)
    simulator = load_at_rate(path, asked.inner_lr, device, dtype)
    _check_format(simulator, saving.format)
    longest = simulator.program.facts.longest
    if reads.stream:
        settings.check(longest)
    limit = None if reads.stream else longest
    ids = torch.tensor([asked.ids(text, tokenizing(simulator), limit, streams=True)])
    rate = float(simulator.inner_lr.detach())
    with console.work() as show, torch.no_grad():
        if reads.stream:
            adapted, found = _streamed(simulator, ids, settings, show)
        else:
            trained = max(round(asked.train_fraction * ids.shape[1]), 2)
            adapted, found = _at_once(simulator, ids, trained, show)
        check_loss(found["loss_after"], rate)
        show("writing", 1, 1)
        saved = save_adapted(adapted, target, saving.format, rank=rank, force=saving.force)
    result = {
        "output": str(saving.output),
        "format": saved.format,
        "bytes": sum(file.stat().st_size for file in target.rglob("*") if file.is_file()),
        "tokens": ids.shape[1],
        "inner_lr": rate,
        "steps": simulator.config.steps,
        "rule": simulator.config.rule,
        **found,
    }
    if saved.format == "peft":
        result["weights"] = [asdict(row) for row in saved.rows]
    if as_json:
        console.print_json(result)
    else:
        _show(result, saved)


def _check_format(simulator: Simulator, format: Literal["tintc", "hf", "peft"]) -> None:
    """What a format refuses of any text is refused before hours of reading one."""
    if format == "hf":
        model_without_weights(simulator)
    elif format == "peft":
        check_installed()


def _at_once(
    simulator: Simulator, ids: Tensor, trained: int, show: Show
) -> tuple[Adapted, dict[str, Any]]:
    """In one call, on the first tokens."""
    show(f"training on {trained} tokens", 0, 1)
    ids = ids[:, :trained]  # the others change nothing of what is learned
    adapted, before, after, seconds = learn(simulator, ids, trained)
    return adapted, {
        "trained_tokens": trained,
        "adapt_seconds": seconds,
        **losses(*(mean_of_rest(each, trained) for each in (before, after))),
    }


def _streamed(
    simulator: Simulator, ids: Tensor, settings: StreamSettings, show: Show
) -> tuple[Adapted, dict[str, Any]]:
    """Chunk by chunk. Losses are those of every token but the first: of the unmodified model, of
    each token before it was trained on, and of all under what was learned at last.
    """
    stream = Stream(simulator, 1, settings)
    rows = Rows(stream, [ids[0]], Stream(simulator, 1, settings, learns=False))
    targets, chunks = ids.shape[1] - 1, math.ceil((ids.shape[1] - 1) / settings.chunk)
    before, read = [], []
    begun = time.perf_counter()
    while not rows.is_done:
        show(f"chunk {stream.chunks + 1}", stream.chunks, chunks)
        for piece in rows.step():
            assert piece.unmodified is not None
            before.append(float(piece.unmodified.double().sum()))
            read.append(float(piece.losses.double().sum()))
    seconds = time.perf_counter() - begun
    adapted = stream.adapted()
    after = _of_windows(adapted, ids, settings, show)
    loss_read = math.fsum(read) / targets
    return adapted, {
        "trained_tokens": ids.shape[1],
        "chunks": stream.chunks,
        **asdict(settings),
        "adapt_seconds": seconds,
        **losses(math.fsum(before) / targets, after),
        "loss_while_reading": loss_read,
        "perplexity_while_reading": perplexity(loss_read),
    }


def _of_windows(adapted: Adapted, ids: Tensor, settings: StreamSettings, show: Show) -> float:
    """Mean loss of all tokens but the first, each behind as many tokens as a stream shows it."""
    total, tokens = [], ids.shape[1]
    for first in range(1, tokens, settings.chunk):
        show("scoring what was learned", first, tokens)
        stop = min(first + settings.chunk, tokens)
        seen = ids[:, max(first - 1 - settings.context, 0) : stop - 1]
        found = adapted(seen, logits_to_keep=stop - first).logits[0]
        wide = found.to(wide_dtype(found.dtype))
        labels = ids[0, first:stop].to(wide.device)
        total.append(float(F.cross_entropy(wide, labels, reduction="sum")))
    return math.fsum(total) / (tokens - 1)


def _show(result: dict[str, Any], saved: SavedAdapted) -> None:
    before, after = result["perplexity_before"], result["perplexity_after"]
    trained = f"{result['tokens']}: {result['trained_tokens']} trained"
    if "chunks" in result:
        trained += f", in {result['chunks']} chunks"
    changed = f"  ({found})" if (found := change(before, after)) else ""
    rows = {
        "tokens": trained,
        "inner training": f"{console.steps(result['steps'])} at learning rate "
        f"{result['inner_lr']:g}",
        **({"inner rule": rule_text(result["rule"])} if result["rule"] else {}),
        "perplexity before": f"{rounded(before)}, loss {result['loss_before']:.4f}",
    }
    if "chunks" in result:
        rows["while reading"] = rounded(result["perplexity_while_reading"])
    rows["perplexity after"] = f"{rounded(after)}, loss {result['loss_after']:.4f}{changed}"
    rows["wrote"] = f"{result['output']}, format {saved.format}, {console.number(result['bytes'])}B"
    if saved.format == "peft":
        rows["weights"] = summary(saved)
    console.print_table(console.named(rows))


def summary(saved: SavedAdapted) -> str:
    """Matrices with their ranks and the largest error, and what went in by other means."""
    parts = []
    ranks = [row.rank for row in saved.rows if row.rank is not None]
    if ranks:
        largest = max((row for row in saved.rows if row.rank is not None), key=lambda r: r.error)
        span = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        parts.append(
            f"{len(ranks)} matrices of rank {span}, relative error at most {largest.error:.2g} "
            f"({largest.name})"
        )
    others: dict[str, int] = {}
    for row in saved.rows:
        if row.rank is None:
            others[row.how] = others.get(row.how, 0) + 1
    parts += [f"{count} by {how}" for how, count in others.items()]
    return ", ".join(parts)
