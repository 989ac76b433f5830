import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracle.compare import assert_equals_reference
from tests.support.models import randomized, simulate, tokens
from tests.support.nano import Nano, nano
from tests.support.stages import assert_golden, assert_same_numbers, printed, stage
from tests.support.tolerances import error
from tintc.ir.config import SimulatorConfig
from tintc.ir.node_meta import info


def updates(config: SimulatorConfig, layers: int = 2) -> set[str]:
    found = stage("build_descent", config, layers=layers)
    return set(found.graph.output_node().args[0]["updates"])


def test_every_trained_slot_is_updated() -> None:
    config = SimulatorConfig.exact()
    trained = {
        info(n).slot for n in stage("build_descent", config).graph.nodes if info(n).trainable
    }
    assert updates(config) == trained


def test_value_attention_updates_no_query_and_no_key() -> None:
    found = updates(SimulatorConfig.exact(attention_gradient="value"))
    assert not [slot for slot in found if "qkv" in slot and "[12:18]" not in slot]
    assert [slot for slot in found if "qkv" in slot]


def test_gains_only_when_asked() -> None:
    gains = {
        "blocks.0.norm_1.weight",
        "blocks.0.norm_2.weight",
        "blocks.1.norm_1.weight",
        "blocks.1.norm_2.weight",
        "ln_f.weight",
    }
    assert (
        updates(SimulatorConfig.exact()) - updates(SimulatorConfig.exact(norm_update="bias"))
        == gains
    )


def test_leaves_forward_and_backward_alone() -> None:
    before, after = stage("build_backward"), stage("build_descent")
    kept = [
        line
        for line in printed(after.graph).splitlines()
        if "[descent" not in line and not line.startswith("output")
    ]
    assert kept == [
        line for line in printed(before.graph).splitlines() if not line.startswith("output")
    ]
    assert all(info(n).gradient is None for n in after.graph.nodes)
    assert_same_numbers("build_descent")


class SharedBlock(nn.Module):
    def __init__(self, norm: nn.Module, shared: nn.Module) -> None:
        super().__init__()
        self.own, self.norm, self.shared = nn.Linear(6, 6), norm, shared

    def forward(self, x: Tensor) -> Tensor:
        return x + F.gelu(self.shared(torch.tanh(self.own(self.norm(x)))))


class Shared(nn.Module):
    """Both blocks use one feed-forward layer and one norm."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(19, 6), nn.Linear(6, 19)
        norm, shared = nn.LayerNorm(6), nn.Linear(6, 6)
        self.blocks = nn.ModuleList(SharedBlock(norm, shared) for _ in range(2))
        self.ln_f = nn.LayerNorm(6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.ln_f(x))


@pytest.mark.parametrize("steps", [1, 3])
def test_updates_of_a_shared_slot_add_up(steps: int) -> None:
    """All use the weights from before the step; the shared layer gets the sum of both gradients, as
    autograd gives it.
    """
    model, ids, inner_lr = randomized(Shared()).double(), tokens(2, 8, 19), 0.01
    simulator = simulate(model, SimulatorConfig.exact(inner_lr=inner_lr, steps=steps))
    for b in range(2):
        tuned = copy.deepcopy(model)
        trained = [
            value for name, value in tuned.named_parameters() if name.startswith(("blocks", "ln_f"))
        ]
        optimizer = torch.optim.SGD(trained, lr=inner_lr)
        for _ in range(steps):
            optimizer.zero_grad()
            F.cross_entropy(tuned(ids[b : b + 1])[0, :-1], ids[b, 1:], reduction="sum").backward()
            optimizer.step()
        state = simulator.updated_state_dict(ids, torch.ones_like(ids), index=b)
        assert {
            name: e
            for name, value in tuned.state_dict().items()
            if (e := error(state[name], value)) > 1e-11
        } == {}


@pytest.mark.parametrize("preset", ["exact", "paper"])
@pytest.mark.parametrize("layers", [1, None])
def test_the_hand_written_decoder_equals_autograd(preset: str, layers: int | None) -> None:
    model: Nano = nano(vocab=23, hidden=10, ffn=17, layers=3)
    config = SimulatorConfig.preset(preset, inner_lr=0.003, steps=2, layers=layers)
    ids = tokens(3, 9, 23)
    assert_equals_reference(
        model,
        config,
        input_ids=ids,
        train_mask=(torch.arange(9) < torch.tensor([[4], [9], [6]])).long(),
    )


def test_golden(update_golden: bool) -> None:
    assert_golden("build_descent", printed(stage("build_descent", layers=1).graph), update_golden)
