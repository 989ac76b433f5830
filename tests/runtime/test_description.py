"""`repr` and the notebook's view of a simulator: five lines, true, and escaped."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch

from tests.support.models import opt, simulate
from tintc.ir.builder import outputs
from tintc.ir.config import SimulatorConfig
from tintc.ir.node_meta import info
from tintc.runtime.showing.phases import PHASES, as_svg, count_phases
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
    table = ["table", "caption", *["tr", "th", "td"] * 4]
    assert reader.tags[: len(table) + 1] == [*table, "svg"]
    assert set(reader.tags[len(table) + 1 :]) == {"rect", "text", "path"}
    words = re.sub(r"\s+", " ", " ".join(repr(found).split()))
    assert " ".join(" ".join(reader.text).split()).startswith(words)


def counts_of(found: Simulator) -> dict[str, dict[str, int]]:
    """Operators by place and phase: rows of several blocks are that of each."""
    rows = count_phases(found.program, found.config.unrolled_steps)
    counts: dict[str, dict[str, int]] = {}
    for row in rows:
        numbers = [int(number) for number in re.findall(r"\d+", row.label)]
        places = [str(n) for n in range(numbers[0], numbers[-1] + 1)] if numbers else [row.label]
        counts |= {place: dict(zip(PHASES, row.counts, strict=True)) for place in places}
    return counts


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (SimulatorConfig.paper(), "operators of the step and of the last forward pass"),
        (
            SimulatorConfig.exact(steps=3, layers=1),
            "operators of 3 steps and of the last forward pass",
        ),
        (
            SimulatorConfig.exact(steps=7),
            "operators of a step, of which 7 run in a loop, and the last pass",
        ),
    ],
)
def test_graph_of_phases(config: SimulatorConfig, said: str) -> None:
    """Every operator of a phase is counted, in the block whose path it has."""
    found = a_simulator(config=config)
    counts, last = counts_of(found), config.unrolled_steps
    assert list(counts) == ["in front", "0", "1", "behind"]
    nodes = [info(n) for n in found.program.graph.nodes if n.op == "call_function"]
    phased = [n for n in nodes if n.phase is not None]
    assert sum(sum(each.values()) for each in counts.values()) == len(phased)
    for number in ("0", "1"):
        own = [n for n in phased if f".layers.{number}." in f"{n.module}."]
        for phase in ("forward", "backward", "descent"):
            of_phase = [n for n in own if n.phase == phase and n.step != last]
            assert counts[number][phase] == len(of_phase)
    if config.layers == 1:
        assert counts["0"] == {**dict.fromkeys(PHASES, 0), "forward": counts["0"]["forward"]}
    svg = ElementTree.fromstring(as_svg(count_phases(found.program, last), said))
    assert said in [text.text for text in svg.iter("text")]
    assert said in found._repr_html_()
    assert {e.get("fill") for e in svg.iter()} == {"currentColor", None}


def test_blocks_that_are_alike_are_one_row() -> None:
    program = simulate(opt(layers=5), SimulatorConfig.exact()).program
    labels = [row.label for row in count_phases(program, 1)]
    assert labels == ["in front", "block 0", "blocks 1 to 3, each", "block 4", "behind"]
