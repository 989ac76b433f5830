"""`repr` and the notebook's view of a simulator: five lines, true, and escaped."""

import re
from html.parser import HTMLParser

import pytest
import torch

from tests.support.models import opt, simulate
from tintc.ir.builder import outputs
from tintc.ir.config import SimulatorConfig
from tintc.runtime.simulator import Simulator

SOURCE = {"name": "opt & <b>friends</b>", "kind": "hub", "revision": "abc123"}


def a_simulator(backend: str = "fused", config: SimulatorConfig | None = None) -> Simulator:
    config = config or SimulatorConfig.paper(inner_lr=0.01, steps=3, layers=1)
    found = simulate(opt(dtype=torch.float32), config, backend=backend)
    found.source = dict(SOURCE)
    return found


def test_five_lines() -> None:
    found = a_simulator()
    slots, updated = found.program.layout.prefix, outputs(found.program.graph)["updates"]
    numbers = sum(slots[name].numbers for name in updated)
    assert repr(found).splitlines() == [
        "Simulator of opt & <b>friends</b> (hub, abc123)",
        "  back end  fused, float32 on cpu",
        f"  trains    1 of 2 blocks, {numbers:,} parameters in {len(updated)} slots",
        "  steps     3 x inner_lr 0.01, paper gradients",
        f"  prefix    {len(slots)} slots, weights as they are",
    ]


def test_the_transformer_says_its_sizes() -> None:
    found = a_simulator("transformer")
    layout = found.program.layout
    lines = repr(found).splitlines()
    assert len(lines) == 5
    assert lines[1] == "  back end  transformer, float32 on cpu"
    assert lines[4] == (
        f"  prefix    {len(layout.prefix)} slots in {layout.pages} pages, "
        f"K = {layout.prefix_tokens}, D_sim = {layout.sim_hidden}, H_sim = {layout.sim_heads}, "
        "shared: none"
    )


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (SimulatorConfig.exact(), "exact gradients"),
        (SimulatorConfig.paper(sim_heads=2), "paper gradients"),
        (
            SimulatorConfig.paper(loss_gradient="quadratic", norm_update="all"),
            "paper gradients but loss_gradient quadratic, norm_update all",
        ),
        (
            SimulatorConfig.exact(attention_gradient="value"),
            "exact gradients but attention_gradient value",
        ),
    ],
)
def test_gradients(config: SimulatorConfig, said: str) -> None:
    line = repr(a_simulator(config=config)).splitlines()[3]
    assert line == f"  steps     1 x inner_lr 0.0001, {said}"


def test_follows_the_rate_and_the_type() -> None:
    found = a_simulator().double()
    found.inner_lr.data.fill_(0.25)
    assert "float64 on cpu" in repr(found)
    assert "3 x inner_lr 0.25" in repr(found)
    assert "meta" in repr(found.to("meta"))


def test_without_a_source() -> None:
    found = simulate(opt(), SimulatorConfig.paper())
    assert repr(found).splitlines()[0] == "Simulator of a model of unknown source"
    found.source = {"name": "two\nlines", "kind": "module", "revision": None}
    assert repr(found).splitlines()[0] == "Simulator of two lines (module)"


def test_inside_another_module() -> None:
    inside = repr(torch.nn.Sequential(a_simulator()))
    assert "Simulator of opt" in inside
    assert len(inside.splitlines()) == 7


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_html() -> None:
    found = a_simulator()
    written = found._repr_html_()
    reader = _Reader()
    reader.feed(written)
    assert "<b>" not in written
    assert "opt &amp; &lt;b&gt;friends&lt;/b&gt;" in written
    assert reader.tags == ["table", "caption", *["tr", "th", "td"] * 4]
    words = re.sub(r"\s+", " ", " ".join(repr(found).split()))
    assert " ".join(" ".join(reader.text).split()) == words
