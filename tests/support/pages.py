"""Sites of small simulators, written once a process; read only."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import tintc
from tests.support.artifacts import artifact, workshop
from tests.support.models import randomized
from tests.support.nano import Attention
from tintc.ir.config import SimulatorConfig
from tintc.page.site import Site, write_site
from tintc.runtime.simulator import Simulator


@lru_cache(maxsize=1)
def site() -> Site:
    """Of the tiny artifact, with the model and the pair."""
    return write_site(artifact(), workshop() / "site")


def content(name: str, root: Path | None = None) -> Any:
    """A data file of a site."""
    file = (root or site().path) / "data" / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8"))


def column(graph: dict[str, Any], name: str) -> list[Any]:
    """A column of a graph; of texts, the texts, None for none."""
    values = graph["nodes"][name]
    if not name.endswith("_s"):
        return list(values)
    return [None if value < 0 else graph["strings"][value] for value in values]


HOSTILE = (
    "<img src=x onerror=window['ran']=1>",
    "\"quotes' and \\ backslash",
    "line\nbreak\ttab",
    "</script><script>window['ran']=1</script>",
    "\u202egreek \u03b1\u03b2 \U0001f600",
    "a/b",
)


class _Odd(nn.Module):
    """A decoder whose modules have names that nobody would choose."""

    def __init__(self, hidden: int = 6, vocab: int = 19) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, hidden)
        self.odd = nn.ModuleDict({name: nn.Linear(hidden, hidden) for name in HOSTILE})
        self.odd[HOSTILE[0] + " attention"] = Attention(hidden, 2)
        self.head = nn.Linear(hidden, vocab, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        for layer in self.odd.values():
            x = x + layer(x)
        return self.head(x)


@lru_cache(maxsize=1)
def hostile() -> Simulator:
    """A simulator of it, called by such a name too."""
    config = SimulatorConfig.exact(inner_lr=0.01, train=["*"])
    simulator = tintc.compile(randomized(_Odd()), config)
    simulator.source["name"] = HOSTILE[0]
    return simulator
