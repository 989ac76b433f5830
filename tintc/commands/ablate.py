"""tintc ablate: what each approximation costs, in the update and in the perplexity after it."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tintc.commands import console
from tintc.commands.evaluate import access_of, finish, other_text, resumable
from tintc.compiler.gradient_statistics import chosen_statistics
from tintc.evaluate import ablation, reports
from tintc.evaluate.ablation_grid import grid, select
from tintc.evaluate.ablation_settings import Asked
from tintc.evaluate.auxiliary import Auxiliary
from tintc.evaluate.store import Store
from tintc.evaluate.text import Text, pieces, read_text, spread, token_ids
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import InputError, UsageError


def run(
    source: str,
    data: str,
    choose: str | None,
    asked: Asked,
    base: SimulatorConfig,
    how: dict[str, Any],
    output: Path | None,
    *,
    as_json: bool,
) -> None:
    """Prints and keeps the table of `tintc.evaluate.ablation.run`."""
    asked.check()
    select(grid(base), asked.only)  # an unknown name is refused before anything is loaded
    found = chosen_statistics(source, how["statistics"], base)
    # Everyone divides by the same, those of exact gradients: variants differ in the gradient alone.
    shared = found and dataclasses.replace(found, of_gradients=False)
    folder = None if output is None else reports.prepare_directory(output.expanduser())
    text = read_text(data, access=access_of(how))
    other = other_text(data, choose, access_of(how), asked.inner_lr)
    how = {**how, "dtype": how["dtype"] or torch.float32, "statistics": shared}
    start = time.monotonic()
    with console.work() as show:
        ready = {how["dtype"]: Auxiliary(source, progress=show, **how)}
        first = ready[how["dtype"]]

        def auxiliary(wanted: torch.dtype) -> Auxiliary:
            return ready.pop(wanted, None) or Auxiliary(source, **{**how, "dtype": wanted})

        settings = ablation.Settings(
            **vars(asked.options()),
            base=base,
            dtype=how["dtype"],
            model=first.identity,
            data=_names(text, other),
        )
        evaluated, chosen_on = _sequences(first, text, other, asked)
        del first  # it is let go of when its variants are done
        store = Store(
            None if folder is None else folder / reports.UNITS,
            {"model": {k: v for k, v in settings.model.items() if k != "dtype"}},
        )
        with resumable(store, folder):
            report = ablation.run(auxiliary, chosen_on, evaluated, settings, store, show)
    finish(report, store, folder, start, as_json)


def _names(text: Text, other: Text | None) -> dict[str, Any]:
    chosen_on = {} if other is None else {"chosen_on": other.name}
    return {"name": text.name, "sha256": text.sha256, **chosen_on}


def _sequences(
    auxiliary: Auxiliary, text: Text, other: Text | None, asked: Asked
) -> tuple[Tensor, Tensor]:
    """(N, T) to evaluate and (C, T) to choose rates on, spread over different text."""
    length, longest = asked.tokens, auxiliary.facts.longest
    if longest is not None and length > longest:
        raise UsageError(f"tokens is {length}; this model takes {longest}")
    whole = pieces(token_ids(auxiliary.tokenizer, text), length, text.name)
    if asked.inner_lr is not None:
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
    evaluated = rest[spread(len(rest), asked.limit)]
    return evaluated, chosen_on[spread(len(chosen_on), asked.choosing)]
