"""FLOPs and bytes of nodes and phases, against torch's own counter and against formulas."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel

import tintc
from tests.support.artifacts import artifact
from tests.support.flops import counting
from tests.support.nano import nano
from tests.support.pages import column, content
from tests.support.speeds import SPEEDS
from tintc.compiler.cost import estimate
from tintc.compiler.lower_bound import lower_bound
from tintc.compiler.node_costs import graph_costs
from tintc.ir.call_sizes import call_sizes
from tintc.ir.choices import Choices
from tintc.ir.config import SimulatorConfig
from tintc.ir.program import Program
from tintc.page.site import write_site
from tintc.page.stage_costs import stage_costs, stage_parts
from tintc.runtime import compiled as calls
from tintc.runtime.simulator import Simulator
from tintc.runtime.specialize import programs
from tintc.runtime.specialize.optimize import optimize as optimized

HIDDEN, FFN, VOCAB, LAYERS = 6, 10, 19, 2  # of `nano`
TOKENS, SEGMENT = 12, 5  # it has 12 positions; half of them trained, of which one is a target only


@cache
def simulator(preset: str = "paper", backend: str = "fused", **changes: Any) -> Simulator:
    config = SimulatorConfig.preset(preset, **{"inner_lr": 0.01, **changes})
    return tintc.compile(nano(), config, backend=backend)


class TestNodes:
    @pytest.mark.slow
    def test_products_by_their_formula(self) -> None:
        costs = stage_costs(simulator(), "lowered")
        assert costs["blocks_0_up"].flops == 2 * SEGMENT * HIDDEN * FFN
        assert costs["blocks_0_up_backward"].flops == 2 * SEGMENT * HIDDEN * FFN
        assert costs["blocks_0_up_step1"].flops == 2 * TOKENS * HIDDEN * FFN
        assert costs["blocks_0_attention_step1"].flops == 2 * 2 * TOKENS**2 * HIDDEN
        assert costs["logits_step1"].flops == 2 * TOKENS * HIDDEN * VOCAB

    def test_bytes_by_their_formula(self) -> None:
        """A residual reads two activations and writes one; a read of a slot is a view."""
        costs = stage_costs(simulator(), "lowered")
        residual = next(c for n, c in costs.items() if "residual" in n and n.endswith("step1"))
        assert residual.bytes == 3 * TOKENS * HIDDEN * 8  # float64
        assert costs["blocks_0_up_weight_1"].bytes == 0

    def test_the_same_whole_with_onednn(self) -> None:
        """oneDNN's products, of which torch counts nothing, cost what they stand for."""
        model = nano(dtype=torch.float32)
        compiled = tintc.compile(model, SimulatorConfig.paper(inner_lr=0.01))
        sizes = call_sizes(compiled.program.facts)
        with_it = sum(c.flops for c in stage_costs(compiled, "optimized").values())
        rest = [name for name in compiled.optimizations if name != "onednn_products"]
        compiled.optimizations = rest
        plain = graph_costs(compiled.optimized(), compiled.dtype, sizes)
        assert with_it == sum(cost.flops for cost in plain.values())

    @pytest.mark.parametrize("speed", ["blas", "onednn", "slow_memory"])
    def test_costs_are_of_the_program_that_is_shown(self, speed: str) -> None:
        """Whatever it was chosen by."""
        compiled = tintc.compile(
            nano(dtype=torch.float32),
            SimulatorConfig.paper(inner_lr=0.01),
            calibration=SPEEDS[speed],
        )
        records, costs = stage_parts(compiled, "emitted")
        assert set(costs) == {record.name for record in records if record.kind == "call"}

    def test_a_stage_is_made_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        made: list[Choices] = []

        def counted(program: Program, choices: Choices) -> fx.Graph:
            made.append(choices)
            return optimized(program, choices)

        monkeypatch.setattr(calls, "optimized_graph", counted)
        monkeypatch.setattr(programs, "optimize", counted)
        found = tintc.compile(nano(), SimulatorConfig.paper(inner_lr=0.01), check="none")
        stage_parts(found, "optimized")
        assert len(made) == 1
        stage_parts(found, "emitted")
        assert len(made) == 2

    def test_shapes_of_emitted_nodes(self) -> None:
        graph = content("graph-emitted")
        shapes = dict(zip(column(graph, "name_s"), column(graph, "shape_s"), strict=True))
        assert all(shape != "()" for name, shape in shapes.items() if name.startswith("unflatten"))


class TestPhases:
    def test_sum_is_what_torch_counts(self) -> None:
        """A real call, counted by torch, without kernels that it knows nothing of."""
        compiled = tintc.compile(
            nano(), SimulatorConfig.exact(inner_lr=0.01), optimize=False, check="none"
        ).requires_grad_(False)
        ids = torch.arange(TOKENS)[None] % VOCAB
        mask = (torch.arange(TOKENS) <= SEGMENT)[None].long()
        # torch counts no fused attention of a CPU, which is written out instead
        counter = counting()
        with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            compiled(ids, mask)
        costs = stage_costs(compiled, "optimized")
        assert sum(cost.flops for cost in costs.values()) == counter.get_total_flops()

    @pytest.mark.parametrize(
        ("preset", "backend", "changes"),
        [
            ("paper", "fused", {}),
            ("exact", "fused", {"steps": 3}),
            ("exact", "transformer", {}),
            ("paper", "fused", {"layers": 1}),
            ("exact", "fused", {"steps": 6}),
        ],
    )
    @pytest.mark.slow
    def test_sum_is_the_calls(
        self, preset: str, backend: str, changes: dict[str, Any], tmp_path: Path
    ) -> None:
        compiled = simulator(preset, backend, **changes)
        found = write_site(compiled, tmp_path / "site")
        cost = content("cost", found.path)
        total = sum(row["flops"] for row in cost["phases"])
        # a loop over steps computes once more, each time, what does not learn
        assert total == pytest.approx(cost["flops"], rel=0.02 if compiled.config.looped else 1e-12)
        assert cost["lower_bound"]["flops"] <= cost["flops"]
        assert cost["direct_flops"] > 0
        assert sum(row["count"] for row in cost["auxiliary"]) == cost["parameters"]["auxiliary"]

    def test_lanes_and_kinds(self) -> None:
        cost = content("cost")
        lanes = list(dict.fromkeys(row["lane"] for row in cost["phases"] if row["lane"]))
        assert lanes == ["step 0 forward", "step 0 backward", "step 0 descent", "last forward"]
        kinds = {row["name"]: row["kind"] for row in cost["auxiliary"]}
        assert kinds["model.decoder.layers.0.fc1.weight"] == "linear"
        assert kinds["model.decoder.layers.0.final_layer_norm.bias"] == "norm"
        assert kinds["model.decoder.embed_tokens.weight"] == "embedding"
        assert cost["call"] == {"batch": 1, "tokens": 64, "trained": 32}


class TestLowerBound:
    def test_by_hand(self) -> None:
        """The paper's gradients of `nano`, product by product: nothing passes through q and k, and
        its matrices are so small that factors cost less than gradients.
        """

        def pairs(tokens: int) -> int:
            return tokens * (tokens + 1) // 2

        def forward(tokens: int) -> int:
            layers = 2 * tokens * (4 * HIDDEN**2 + 2 * HIDDEN * FFN)
            attention = 2 * 2 * pairs(tokens) * HIDDEN
            return LAYERS * (layers + attention) + 2 * tokens * HIDDEN * VOCAB

        layers = 2 * SEGMENT * (2 * HIDDEN**2 + 2 * HIDDEN * FFN)
        values = 2 * pairs(SEGMENT) * HIDDEN
        backward = LAYERS * (layers + values) + 2 * SEGMENT * HIDDEN * VOCAB
        # one product of every token of the last pass with every training token's factor, or 2 S I O
        updates = LAYERS * sum(
            min(2 * SEGMENT * rows * columns, 2 * TOKENS * SEGMENT * min(rows, columns))
            for rows, columns in ((HIDDEN, HIDDEN),) * 2 + ((HIDDEN, FFN),) * 2
        )
        compiled = simulator()
        sizes = call_sizes(compiled.program.facts)
        found = lower_bound(compiled.program, stage_costs(compiled, "lowered"), sizes)
        assert found == forward(SEGMENT) + forward(TOKENS) + backward + updates

    @pytest.mark.parametrize("batch", [1, 3])
    @pytest.mark.parametrize(
        "changes", [{}, {"momentum": 0.5, "steps": 2}, {"train": ["*.up.*"]}, {"optimizer": "muon"}]
    )
    def test_no_program_is_below(self, changes: dict[str, Any], batch: int) -> None:
        compiled = simulator("exact", "fused", **{k: _hashable(v) for k, v in changes.items()})
        sizes = call_sizes(compiled.program.facts, batch=batch)
        costs = graph_costs(compiled.program.graph, compiled.dtype, sizes)
        bound = lower_bound(compiled.program, costs, sizes)
        for optimize in (True, False):
            whole = estimate(compiled.program, "fused", compiled.dtype, optimize=optimize, **sizes)
            assert 0 < bound <= whole.flops

    def test_of_the_tiny_artifact(self) -> None:
        cost = content("cost")
        assert cost["lower_bound"]["flops"] < cost["flops"] < cost["direct_flops"] * 1.5
        assert "causal mask" in cost["lower_bound"]["text"]
        loaded = tintc.load(artifact())
        sizes = call_sizes(loaded.program.facts)
        assert cost["flops"] == estimate(loaded.program, "fused", loaded.dtype, **sizes).flops


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
