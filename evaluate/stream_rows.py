"""The rows of a streaming report: totals, what changed, and the curve over the position in the
text, each with its interval by bootstrap over documents.

Legend: D documents, P chunks of the longest one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tintc.evaluate.language import DYNAMIC, UNMODIFIED, Run
from tintc.evaluate.losses import perplexity
from tintc.evaluate.statistics import bootstrap_interval
from tintc.evaluate.stream_documents import Passage
from tintc.evaluate.stream_settings import Settings

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A run, what it is called, and the result of each passage."""

    label: str
    run: Run
    results: Sequence[dict[str, Any]]

    def sums(self, chunks: int) -> Numbers:
        """(D, P): summed losses of each chunk; 0 behind a document's end, infinite from where
        losses were not finite.
        """
        found = np.zeros((len(self.results), chunks))
        for row, result in enumerate(self.results):
            found[row, : len(result["losses"])] = result["losses"]
            if "overflow" in result:
                found[row, result["overflow"] :] = math.inf
        return found


def rows_of(
    measured: Sequence[Measured], passages: Sequence[Passage], settings: Settings
) -> list[dict[str, Any]]:
    """One row a run; the first is the unmodified model, which the others are compared with.

    nll: summed -log p of all targets, in nats. perplexity: exp of it over `targets`.
    bits_per_byte: bits over the bytes of the targets. change: of the perplexity, in per cent; gain:
    what it is lower by; share: of the gain of dynamic evaluation by the config's own rule, of the
    same parameters of norms if there are several. Each has an `_interval` of 95 %.
    curve: see `_curve`. seconds: of a document, median. overflow: the first document and chunk
    whose losses were not finite.
    """
    targets = _targets(passages, settings.cut.chunk)
    before = measured[0].sums(targets.shape[1])
    size = sum(passage.bytes for passage in passages)
    rows = []
    for each in measured:
        after, config = each.sums(targets.shape[1]), each.run.config
        total, count = float(after.sum()), float(targets.sum())
        against = _reference(each.run, measured)
        gained = None if against is None else against.sums(targets.shape[1]).sum(1)
        changed = {} if each.run.name == UNMODIFIED else _compared(after, before, targets, gained)
        rows.append(
            {
                "learner": each.run.name,
                "name": each.label,
                "config": None if config is None else config.to_dict(),
                "rule": None if config is None else config.rule,
                "inner_lr": None if config is None else config.inner_lr,
                "n": len(passages),
                "nll": total,
                "targets": int(count),
                "perplexity": perplexity(total / count),
                "bits_per_byte": total / math.log(2) / size if size else math.nan,
                **changed,
                "seconds": statistics.median(result["seconds"] for result in each.results),
                "curve": _curve(after, before, targets, settings),
                **_overflow(each, passages),
            }
        )
    return rows


def _reference(run: Run, measured: Sequence[Measured]) -> Measured | None:
    """The dynamic evaluation that a run is compared with."""
    found = [each for each in measured if each.run.name == DYNAMIC]
    if run.config is None or not found:
        return None
    norms = run.config.norm_update
    same = [each for each in found if each.run.config and each.run.config.norm_update == norms]
    return (same or found)[0]


def _overflow(measured: Measured, passages: Sequence[Passage]) -> dict[str, Any]:
    for passage, result in zip(passages, measured.results, strict=True):
        if "overflow" in result:
            return {"overflow": {"document": passage.number, "chunk": result["overflow"]}}
    return {}


def _targets(passages: Sequence[Passage], chunk: int) -> Numbers:
    """(D, P): how many each chunk of each passage has."""
    chunks = max(math.ceil(passage.targets / chunk) for passage in passages)
    left = np.array([passage.targets for passage in passages])[:, None] - chunk * np.arange(chunks)
    return np.clip(left, 0, chunk).astype(np.float64)


def _change(after: Numbers, before: Numbers, targets: Numbers) -> Any:
    """Of the perplexity, in per cent, of documents along the last axis."""
    count = targets.sum(-1)
    return 100 * np.expm1((after.sum(-1) - before.sum(-1)) / count)


def _gain(after: Numbers, before: Numbers, targets: Numbers) -> Any:
    """What the perplexity is lower by."""
    count = targets.sum(-1)
    return np.exp(before.sum(-1) / count) - np.exp(after.sum(-1) / count)


def _share(after: Numbers, before: Numbers, targets: Numbers, reference: Numbers) -> Any:
    """Of the gain of others."""
    return _gain(after, before, targets) / _gain(reference, before, targets)


def _compared(
    after: Numbers, before: Numbers, targets: Numbers, reference: Numbers | None
) -> dict[str, Any]:
    columns = [after.sum(1), before.sum(1), targets.sum(1)]
    found: dict[str, Any] = {}
    compared: list[tuple[str, Any, list[Numbers]]] = [
        ("change", _change, columns),
        ("gain", _gain, columns),
    ]
    if reference is not None and float(_gain(reference, *columns[1:])) > 0:
        compared.append(("share", _share, [*columns, reference]))
    for name, value, given in compared:
        with np.errstate(over="ignore"):
            found[name] = float(value(*given))
        found[f"{name}_interval"] = list(bootstrap_interval(given, value))  # type: ignore[arg-type]
    return found


def _curve(
    after: Numbers, before: Numbers, targets: Numbers, settings: Settings
) -> list[dict[str, Any]]:
    """Parts of the text by position, of whole chunks: from the first to the last target of each,
    perplexities of the unmodified model (before) and of the run (after) on the documents that
    reach it, and the change. up_to: the same of everything up to its end.
    """
    chunks, parts = targets.shape[1], settings.buckets
    edges = sorted({round(part * chunks / parts) for part in range(parts + 1)})
    found = []
    for start, end in pairwise(edges):
        found.append(
            {
                "first": start * settings.cut.chunk + 1,
                "last": min(end * settings.cut.chunk, int(targets.sum(1).max())),
                **_part(after[:, start:end], before[:, start:end], targets[:, start:end]),
                "up_to": _part(after[:, :end], before[:, :end], targets[:, :end]),
            }
        )
    return found


def _part(after: Numbers, before: Numbers, targets: Numbers) -> dict[str, Any]:
    """Of some columns."""
    there = targets.sum(1) > 0
    columns = [each[there].sum(1) for each in (after, before, targets)]
    count = float(columns[2].sum())
    with np.errstate(over="ignore"):
        return {
            "documents": int(there.sum()),
            "targets": int(count),
            "before": perplexity(float(columns[1].sum()) / count),
            "after": perplexity(float(columns[0].sum()) / count),
            "change": float(_change(*columns)),
            "change_interval": list(bootstrap_interval(columns, _change)),
        }
