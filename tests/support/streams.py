"""A tiny model that streams a few short documents, and the same by autograd and torch.optim
(tests/oracle/streaming.py).
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import torch
import transformers
from torch import Tensor

from tests.oracle.streaming import streamed
from tests.support.artifacts import TEXT, source_directory
from tintc.compiler.casts import no_casts
from tintc.evaluate import stream
from tintc.evaluate.auxiliary import Auxiliary
from tintc.evaluate.speed.benchmark import updated_parameters
from tintc.evaluate.store import Store
from tintc.evaluate.stream_documents import Passage, longest
from tintc.evaluate.stream_settings import Settings
from tintc.evaluate.text import Text
from tintc.ir.config import SimulatorConfig
from tintc.runtime.stream_settings import StreamSettings

CHUNK, CONTEXT, RATE = 5, 7, 0.02
SEA = "The sea is deep, and the boats go out in the morning; häßlich grüßt ✓ the tide."
DOCUMENTS = (TEXT, "A short one.", SEA, "The hills are above the town, the town is below.")
STORY = Text("story", "".join(DOCUMENTS), DOCUMENTS)
OTHER = Text("other", "".join(DOCUMENTS[::-1]), (f"Once more: {TEXT}", "It is wide and long."))
SETTINGS = Settings(
    cut=StreamSettings(CHUNK, CONTEXT),
    inner_lr=RATE,
    limit=3,
    presets=("exact", "paper"),
    buckets=3,
)
CUT = [each.name for each in dataclasses.fields(StreamSettings)]


@cache
def auxiliary() -> Auxiliary:
    return Auxiliary(str(source_directory()), dtype=torch.float64)


@cache
def huggingface() -> Any:
    return transformers.OPTForCausalLM.from_pretrained(
        source_directory(), dtype=torch.float64
    ).eval()


def settings(**changes: Any) -> Settings:
    cut = {name: changes.pop(name) for name in CUT if name in changes}
    return dataclasses.replace(SETTINGS, cut=dataclasses.replace(SETTINGS.cut, **cut), **changes)


def run(chosen: Settings = SETTINGS, store: Store | None = None, **options: Any) -> dict[str, Any]:
    text, other = options.pop("text", STORY), options.pop("other", None)
    return stream.run(auxiliary(), text, other, chosen, store or Store(None, {}), **options)


def by_name(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in report["rows"]}


def numbers(report: dict[str, Any]) -> Any:
    """The report without its times."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in report["rows"]]
    return {**report, "rows": rows, "settings": {**report["settings"], "batch": None}}


def passages(limit: int = 3, tokens: int | None = None) -> list[Passage]:
    return longest(auxiliary().tokenizer, list(enumerate(DOCUMENTS)), limit, tokens)


def by_autograd(config: SimulatorConfig, documents: list[Tensor], **options: Any) -> list[Tensor]:
    """Losses of the documents of one row."""
    trained = updated_parameters(auxiliary().simulator(config))
    with no_casts():
        found = streamed(
            huggingface(), config, documents, trained, chunk=CHUNK, context=CONTEXT,
            longest=auxiliary().facts.longest, **options,
        )  # fmt: skip
    return found.losses


def total(losses: list[Tensor]) -> float:
    return float(torch.cat(losses).sum())
