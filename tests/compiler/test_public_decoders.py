"""Decoders as public code bases write them: logits and one exact step equal torch.autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import tintc
from tests.compiler.test_islands import RATE, stepped
from tests.support.models import randomized
from tests.support.more_decoders import MORE, LastAlone
from tests.support.public_decoders import DECODERS, V
from tests.support.tolerances import error

LIMIT = 1e-9
BLOCKS = {  # of the others 3 or, of `more_decoders`, 2
    "sublayers in turn": 2,
    "value residuals": 4,
    "a block without attention": 3,
    "registers in front": 1,  # all between is one island
}
# Not trained though they are inside of blocks: values of the first block are not mixed in there.
UNUSED = {"blocks.1.value_mix", "blocks.2.value_mix"}
OUTSIDE = (
    *("W_", "b_U", "token_emb", "to_logits", "tok_embeddings", "output", "transformer.wte"),
    *("model.embedder", "skip_weights", "embed.", "value_embeds", "smear_gate", "lm_head"),
    *("embedding.", "linear.", "tok.", "tok_scalars", "pos.", "head.", "aside."),
)
DEFAULT = ("last token alone",)


class Logits(nn.Module):
    """The logits of whatever a model returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        out = self.model(ids, ids) if isinstance(self.model, LastAlone) else self.model(ids)
        if isinstance(out, tuple):
            (out,) = (each for each in out if isinstance(each, Tensor) and each.ndim == 3)
        return out["logits"] if isinstance(out, dict) else out


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow)
        for name in (*DECODERS, *MORE)
    ],
)
def test_a_step_equals_autograds(name: str) -> None:
    torch.manual_seed(1)
    model = randomized({**DECODERS, **MORE}[name]()).double().eval()
    config = tintc.SimulatorConfig.exact(inner_lr=RATE)
    simulator = tintc.compile(model, config, check="none")
    assert simulator.program.facts.blocks == BLOCKS.get(name, 3 if name in DECODERS else 2)
    trained = {s.parameter for s in simulator.program.layout.prefix.values() if s.trainable}
    named = {n for n, _ in model.named_parameters() if not n.startswith(OUTSIDE)}
    assert trained == named - UNUSED
    own, names = Logits(model), {f"model.{n}" for n in trained}
    for tokens in (12, 5):
        ids = torch.randint(V, (2, tokens), generator=torch.Generator().manual_seed(0))
        mask = torch.zeros_like(ids)
        mask[:, : 2 * tokens // 3] = 1
        with torch.inference_mode():
            found = simulator(ids, mask, return_initial=True)
            assert found.initial_logits is not None
        for b in range(2):
            weights = stepped(own, names, ids[b], mask[b], 1)
            with torch.no_grad():
                initial = own(ids[b : b + 1])[0]
                final = torch.func.functional_call(own, weights, (ids[b : b + 1],))[0]
            assert error(found.initial_logits[b], initial) < LIMIT
            assert error(found.logits[b], final) < LIMIT
            assert error(initial, final) > 1e-3
