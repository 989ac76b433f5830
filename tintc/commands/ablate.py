"""tintc ablate: what each approximation costs, in the update and in the perplexity after it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tintc.commands import console
from tintc.commands.evaluate import finish, other_text, resumable
from tintc.evaluate import ablation, reports
from tintc.evaluate.ablation_grid import grid, select
from tintc.evaluate.auxiliary import Auxiliary
from tintc.evaluate.store import Store
from tintc.evaluate.text import Text, pieces, read_text, spread, token_ids
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import InputError, UsageError


def run(
    source: str,
    data: str,
    choose: str | None,
    sizes: dict[str, int],
    budget: dict[str, Any],
    settings: dict[str, Any],
    how: dict[str, Any],
    output: Path | None,
    *,
    as_json: bool,
) -> None:
    """Prints and keeps the table of `runtime.evaluate.ablation.run`. sizes: length, and how many
    sequences are evaluated and chosen on.
    """
    for name, value in sizes.items():
        if value < (4 if name == "length" else 1):
            raise UsageError(f"{name} is {value}; expected at least {4 if name == 'length' else 1}")
    base = SimulatorConfig.exact(**budget)
    select(
        grid(base), settings.get("only", ())
    )  # an unknown name is refused before anything is loaded
    folder = None if output is None else reports.prepare_directory(output.expanduser())
    text = read_text(data, cache_dir=how["cache_dir"])
    other = other_text(data, choose, how["cache_dir"], settings["inner_lr"])
    dtype = how.pop("dtype") or torch.float32
    start = time.monotonic()
    with console.work() as show:
        ready = {dtype: Auxiliary(source, progress=show, dtype=dtype, **how)}
        model = ready[dtype].identity
        evaluated, chosen_on = _sequences(
            ready[dtype], text, other, sizes, choosing=settings["inner_lr"] is None
        )

        def auxiliary(wanted: torch.dtype) -> Auxiliary:
            return ready.pop(wanted, None) or Auxiliary(source, dtype=wanted, **how)

        names = {
            "name": text.name,
            "sha256": text.sha256,
            **({} if other is None else {"chosen_on": other.name}),
        }
        wanted = ablation.Settings(base=base, dtype=dtype, model=model, data=names, **settings)
        store = Store(
            None if folder is None else folder / reports.UNITS,
            {"model": {k: v for k, v in model.items() if k != "dtype"}},
        )
        with resumable(store, folder):
            report = ablation.run(auxiliary, chosen_on, evaluated, wanted, store, show)
    finish(report, store, folder, start, as_json)


def _sequences(
    auxiliary: Auxiliary, text: Text, other: Text | None, sizes: dict[str, int], *, choosing: bool
) -> tuple[Tensor, Tensor]:
    """(N, T) to evaluate and (C, T) to choose rates on, spread over different text."""
    length, longest = sizes["length"], auxiliary.facts.longest
    if longest is not None and length > longest:
        raise UsageError(f"length is {length}; this model takes {longest} tokens")
    whole = pieces(token_ids(auxiliary.tokenizer, text), length, text.name)
    if not choosing:
        chosen_on, rest = whole[:0], whole
    elif other is None:
        first = max(1, len(whole) // 4)
        chosen_on, rest = whole[:first], whole[first:]
    elif other.sha256 == text.sha256:
        raise InputError(
            f"{other.name} is the evaluated text itself; expected other text to choose learning "
            "rates on"
        )
    else:
        chosen_on, rest = pieces(token_ids(auxiliary.tokenizer, other), length, other.name), whole
    if not len(rest):
        raise InputError(
            f"{text.name} has {len(whole)} sequence of {length} tokens; expected more text, or "
            "other text with --choose"
        )
    return rest[spread(len(rest), sizes["limit"])], chosen_on[
        spread(len(chosen_on), sizes["choosing"])
    ]
