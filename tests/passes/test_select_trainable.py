import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.decoders import HIDDEN, Block, FeedForward, MaskedAttention
from tests.support.models import gpt2, opt, randomized
from tests.support.stages import Stage, assert_golden, assert_same_numbers, printed, stage
from tests.support.toys import toy
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UnsupportedModelError, UsageError
from tintc.ir.node_meta import info


def trained(at: Stage) -> set[str]:
    return {str(info(n).slot) for n in at.graph.nodes if info(n).trainable}


BLOCK = ("attention.out.weight", "down.bias", "down.weight", "norm_1.bias", "up.bias", "up.weight")
SPLIT = tuple(
    f"attention.qkv.{name}[{a}:{a + 6}]" for name in ("weight", "bias") for a in (0, 6, 12)
)
GAINS = ("norm_1.weight", "norm_2.weight")


@pytest.mark.parametrize("layers", [1, 2, 3, None])
@pytest.mark.parametrize("update", ["all", "bias"])
def test_top_blocks_and_final_norm(layers: int | None, update: str) -> None:
    config = SimulatorConfig.exact(layers=layers, norm_update=update)
    found = stage("select_trainable", config, layers=3)
    names = BLOCK + SPLIT + (GAINS if update == "all" else ())
    expected = {f"blocks.{i}.{name}" for i in range(3 - (layers or 3), 3) for name in names}
    expected |= {"ln_f.bias", "ln_f.weight"} if update == "all" else {"ln_f.bias"}
    assert trained(found) == expected
    assert (found.context.facts.blocks, found.context.facts.trained_blocks) == (3, layers or 3)


@pytest.mark.parametrize(("model", "stack", "norm"), [
    (opt(vocab=19), "model.decoder.layers.1.", "model.decoder.final_layer_norm."),
    (gpt2(vocab=19), "transformer.h.1.", "transformer.ln_f."),
], ids=["opt", "gpt2"])  # fmt: skip
def test_models(model: nn.Module, stack: str, norm: str) -> None:
    found = trained(stage("select_trainable", SimulatorConfig.exact(layers=1), model=model))
    assert all(slot.startswith((stack, norm)) for slot in found)
    wanted = {name for name, _ in model.named_parameters() if name.startswith((stack, norm))}
    assert {slot.split("[")[0] for slot in found} == wanted


def test_more_layers_than_blocks_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"layers is 4; expected 1 to 2, the blocks of this model in blocks"
    ):
        stage("select_trainable", SimulatorConfig.paper(layers=4))


def test_no_stack_of_blocks_is_one_block() -> None:
    found = stage("select_trainable", model=toy(lambda m, x, ids: x + m.linear(m.norm(x))))
    assert found.context.facts.block_parts == (("norm", "linear"),)
    assert trained(found) == {"linear.weight", "linear.bias", "norm.weight", "norm.bias"}
    with pytest.raises(UsageError, match=r"layers is 2; expected 1 to 1, the blocks of this model"):
        stage(
            "select_trainable",
            SimulatorConfig.exact(layers=2),
            model=toy(lambda m, x, ids: x + m.linear(m.norm(x))),
        )


def test_a_model_without_layers_has_nothing_to_train() -> None:
    with pytest.raises(UnsupportedModelError, match="nothing to train: the top 0 of 0 blocks"):
        stage("select_trainable", model=toy(lambda m, x, ids: x.tanh()))


class Stack(nn.Module):
    """Blocks without attention, run last to first, and one layer that stands before them."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(19, 6), nn.Linear(6, 19)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in reversed(self.blocks):
            x = x + F.relu(block(x))
        return self.head(x)


def test_top_means_last_to_run() -> None:
    found = stage(
        "select_trainable", SimulatorConfig.exact(layers=1), model=randomized(Stack()).double()
    )
    assert trained(found) == {"blocks.0.weight", "blocks.0.bias"}


class SumsOutside(nn.Module):
    """The residual sums stand in the model's own forward, so the final norm reads a value of no
    block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(19, 6), nn.Linear(6, 19)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.ln_f = nn.LayerNorm(6)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = x + F.relu(block(x))
        return self.head(self.ln_f(x))


def test_the_final_norm_learns_wherever_the_last_residual_sum_stands() -> None:
    found = stage(
        "select_trainable",
        SimulatorConfig.exact(layers=1),
        model=randomized(SumsOutside()).double(),
    )
    assert trained(found) == {"blocks.1.weight", "blocks.1.bias", "ln_f.weight", "ln_f.bias"}


class TiedInside(nn.Module):
    """The token table is also the weight of a block's layer."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.tokens, self.head = nn.Embedding(6, 6), nn.Linear(6, 19)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        if tied:
            self.blocks[1].weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = x + F.relu(block(x))
        return self.head(x)


def test_a_trained_weight_that_is_also_an_embedding_is_refused() -> None:
    """Descent would update the slot and leave the embedding: not what autograd does to a tied
    weight.
    """
    with pytest.raises(
        UnsupportedModelError,
        match=r"tokens\.weight is trained in tokens\.weight and read by tokens .* in another way",
    ):
        stage("select_trainable", model=randomized(TiedInside(True)).double())
    assert "blocks.1.weight" in trained(
        stage("select_trainable", model=randomized(TiedInside(False)).double())
    )


def test_changes_no_operator() -> None:
    assert stage("select_trainable").operators() == stage("refuse_unsupported").operators()
    assert_same_numbers("select_trainable")


def test_golden(update_golden: bool) -> None:
    assert_golden(
        "select_trainable", printed(stage("select_trainable", layers=1).graph), update_golden
    )


class Listed(nn.Module):
    """Whatever lists of blocks `layers` holds, one after the other."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.tokens, self.layers = nn.Embedding(19, HIDDEN), layers
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 19)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.tokens(input_ids)
        for layer in self.layers.modules():
            if isinstance(layer, Block):
                x = layer(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def block() -> Block:
    return Block(MaskedAttention(), FeedForward(), nn.LayerNorm, False)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_stack_inside_a_sequential(count: int) -> None:
    """What counts are the blocks, not the one child that holds them all."""
    layers = nn.ModuleList([nn.Identity(), nn.ModuleList(block() for _ in range(3))])
    found = stage("select_trainable", SimulatorConfig.exact(layers=count), model=Listed(layers))
    facts = found.context.facts
    assert (facts.blocks, facts.trained_blocks, facts.block_path) == (3, count, "layers.1")
