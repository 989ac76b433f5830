"""`verify` agrees where it should, and notices a simulator that computes something else."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn

import tintc
from tests.support.artifacts import artifact
from tests.support.grid import grid
from tests.support.models import FAMILIES, gpt2, opt, simulate
from tests.support.rules import ALONE, RATE
from tintc.compiler.verification import TOLERANCE, verify
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import SourceError, UsageError
from tintc.runtime.simulator import Simulator


class TestAgrees:
    @grid(family=FAMILIES, steps=[1, 3], layers=[1, None])
    def test_exact(self, family: str, steps: int, layers: int | None) -> None:
        found = verify(
            compiled(
                FAMILIES[family](), SimulatorConfig.exact(inner_lr=0.01, steps=steps, layers=layers)
            ),
            tokens=13,
        )
        assert found.agrees
        assert found.exact
        assert found.reference == f"autograd through {FAMILIES[family]().__class__.__name__}"
        assert (
            max(found.initial_logits_error, found.logits_error, found.updated_logits_error)
            <= TOLERANCE
        )
        assert max(update.worst for update in found.updates) <= TOLERANCE

    @pytest.mark.parametrize("rule", ["clipped momentum", "scaled adam", "muon with momentum"])
    @pytest.mark.slow
    def test_rules(self, rule: str) -> None:
        """At the rate that the simulator has now; what is not its rule is noticed."""
        config = SimulatorConfig.exact(inner_lr=1.0, steps=2, **ALONE[rule])
        simulator = simulate(gpt2(), config)
        simulator.inner_lr.data.fill_(RATE)
        found = verify(simulator, tokens=13)
        assert found.agrees and found.exact and found.logits_error <= TOLERANCE
        other = dataclasses.replace(config, decay=0.2)
        simulator.program = dataclasses.replace(simulator.program, config=other)
        assert not verify(simulator, tokens=13).agrees

    @pytest.mark.parametrize("steps", [1, 3])
    @pytest.mark.parametrize("family", FAMILIES)
    def test_approximations_are_measured(self, family: str, steps: int) -> None:
        found = verify(
            compiled(FAMILIES[family](), SimulatorConfig.paper(inner_lr=0.01, steps=steps)),
            tokens=13,
        )
        assert found.agrees
        assert not found.exact
        assert found.initial_logits_error <= TOLERANCE
        assert found.updated_logits_error <= TOLERANCE
        assert found.logits_error > 1e-4
        cosines = [layer.cosine for layer in found.layers()]
        assert all(cosine is not None and 0.1 < cosine <= 1 + 1e-12 for cosine in cosines)

    @pytest.mark.parametrize("model", [opt, gpt2])
    def test_source_without_a_config(self, model: Callable[[], Any]) -> None:
        class Plain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = model()

            def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
                return self.inner(input_ids, use_cache=False).logits

        found = verify(
            tintc.compile(Plain(), SimulatorConfig.exact(inner_lr=0.01, steps=3)), tokens=9
        )
        assert found.agrees
        assert found.reference == "autograd through the compiled first forward pass"

    def test_trained_inner_lr(self) -> None:
        simulator = compiled(opt(), SimulatorConfig.exact(inner_lr=0.01))
        simulator.inner_lr.data.fill_(0.03)
        assert verify(simulator, tokens=9).agrees

    @pytest.mark.parametrize("tokens", [2, 3, 16])
    def test_any_length(self, tokens: int) -> None:
        assert verify(
            compiled(opt(positions=16), SimulatorConfig.exact(inner_lr=0.01)), tokens=tokens
        ).agrees

    def test_seed(self) -> None:
        simulator = compiled(opt(), SimulatorConfig.paper(inner_lr=0.01))
        first, again, other = (
            verify(simulator, tokens=9, seed=seed).to_dict() for seed in (0, 0, 1)
        )
        assert first == again != other

    def test_loaded_artifact(self) -> None:
        assert verify(tintc.load(artifact("exact"), dtype=torch.float64), tokens=20).agrees

    def test_the_simulator_stays_as_it_was(self) -> None:
        simulator = compiled(opt(), SimulatorConfig.exact(inner_lr=0.1))
        before = copy.deepcopy(simulator.state_dict())
        verify(simulator, tokens=9)
        assert all(
            torch.equal(before[name], value) for name, value in simulator.state_dict().items()
        )
        assert all(p.requires_grad and p.grad is None for p in simulator.parameters())


def compiled(model: Any, config: SimulatorConfig) -> Simulator:
    """A simulator whose source has the model's config, as the driver makes it."""
    simulator = simulate(model, config)
    simulator.source = {"kind": "module", "config": model.config.to_dict()}
    return simulator


def change(
    simulator: Simulator,
    operator: str,
    call: Callable[[fx.Graph, fx.Node], fx.Node],
    which: int = 0,
) -> None:
    """Puts `call`'s node in the place of one lowered node."""
    graph = simulator.program.graph
    nodes = [node for node in graph.nodes if str(node.target) == f"tint.{operator}.default"]
    node = nodes[which]
    with graph.inserting_after(node):
        new = call(graph, node)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def scaled(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """twice the node, as a residual sum with itself."""
    return graph.call_function(torch.ops.tint.residual.default, (node, node))


PERTURBED = [
    "linear_descent",
    "linear_backward",
    "bias_descent",
    "norm_backward",
    "activation_backward",
    "norm_descent",
]


class TestDisagrees:
    @grid(together=1, family=FAMILIES, operator=PERTURBED)
    def test_wrong_gradient(self, family: str, operator: str) -> None:
        simulator = compiled(FAMILIES[family](), SimulatorConfig.exact(inner_lr=0.01))
        change(simulator, operator, scaled, which=1)
        found = verify(simulator, tokens=13)
        assert not found.agrees
        assert found.initial_logits_error <= TOLERANCE

    @pytest.mark.parametrize(
        "config", [SimulatorConfig.exact(inner_lr=0.01), SimulatorConfig.paper(inner_lr=0.01)]
    )
    @pytest.mark.parametrize("which", [0, -1], ids=["first", "last"])
    def test_wrong_forward(self, which: int, config: SimulatorConfig) -> None:
        """Under any config: the last forward pass is wrong even though the first is right."""
        simulator = compiled(opt(), config)
        change(simulator, "linear_forward", scaled, which=which)
        assert not verify(simulator, tokens=13).agrees

    def test_small_difference(self) -> None:
        """The epsilon of one norm is twice what it should be, in the update of its gain only."""
        simulator = compiled(opt(), SimulatorConfig.exact(inner_lr=0.01))

        def slightly(graph: fx.Graph, node: fx.Node) -> fx.Node:
            gamma, dy, x, eps, *rest = node.args
            assert isinstance(eps, float)
            return graph.call_function(
                torch.ops.tint.norm_descent.default, (gamma, dy, x, eps * 2, *rest)
            )

        change(simulator, "norm_descent", slightly)
        found = verify(simulator, tokens=13)
        assert not found.agrees
        assert found.logits_error < 1e-3

    def test_other_weights_than_the_source_s_config(self) -> None:
        simulator = compiled(opt(activation="relu"), SimulatorConfig.exact(inner_lr=0.01))
        simulator.source["config"]["activation_function"] = "tanh"
        found = verify(simulator, tokens=13)
        assert not found.agrees
        assert found.initial_logits_error > TOLERANCE

    def test_nan(self) -> None:
        simulator = compiled(opt(), SimulatorConfig.paper(inner_lr=1e300))
        assert not verify(simulator, tokens=13).agrees


class TestFigures:
    def test_layers_add_up(self) -> None:
        found = verify(compiled(opt(layers=3), SimulatorConfig.paper(inner_lr=0.01)), tokens=13)
        layers = found.layers()
        assert [layer.name for layer in layers] == [
            *(f"model.decoder.layers.{i}" for i in range(3)),
            "model.decoder.final_layer_norm",
        ]
        for layer in layers:
            parts = [update for update in found.updates if update.name.startswith(layer.name + ".")]
            assert layer.exact_norm**2 == pytest.approx(sum(part.exact_norm**2 for part in parts))
            assert layer.worst == max(part.worst for part in parts)
        assert sum(len(layer.name) > 0 for layer in layers) == 4

    def test_what_is_not_trained_has_no_cosine(self) -> None:
        found = verify(compiled(opt(), SimulatorConfig.paper(inner_lr=0.01)), tokens=13)
        queries = [update for update in found.updates if "q_proj" in update.name]
        assert queries
        assert all(update.cosine is None and update.relative_error == 1 for update in queries)

    def test_bad_arguments(self) -> None:
        simulator = compiled(opt(positions=16), SimulatorConfig.exact())
        for tokens in (1, 17):
            with pytest.raises(UsageError, match=f"tokens is {tokens}; expected 2 to 16"):
                verify(simulator, tokens=tokens)
        with pytest.raises(UsageError, match=r"expected torch\.float64"):
            verify(simulator.float(), tokens=9)


class TestConfigsOfAnybody:
    """The config comes with an artifact, which anybody may have written."""

    @pytest.mark.parametrize(
        "change",
        [
            {"model_type": "nobody"},
            {"model_type": None},
            {"hidden_size": 24, "word_embed_proj_dim": 24},
            {"num_hidden_layers": 5},
            {"hidden_size": "wide"},
            {"num_attention_heads": 0},
            {"attn_implementation": "someone/some-kernel"},
            {"_attn_implementation": "flash_attention_2"},
        ],
    )
    def test_is_refused_in_one_line_or_verified(self, change: dict[str, Any]) -> None:
        simulator = compiled(opt(), SimulatorConfig.exact())
        simulator.source["config"] |= change
        if any(name.endswith("attn_implementation") for name in change):
            assert verify(simulator, tokens=13).agrees
            return
        with pytest.raises(SourceError) as caught:
            verify(simulator, tokens=13)
        assert "\n" not in str(caught.value)
