"""FLOPs of direct fine-tuning against what torch counts when the Hugging Face model is trained.

torch.utils.flop_counter sees the model's own forward pass over the trained tokens, the backward
pass to the trained weights, and the forward pass that predicts.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.support.every import lowered, model_of
from tests.support.families import VOCAB
from tests.support.models import tokens
from tintc.compiler.autograd_rule import InnerRule, summed_loss
from tintc.compiler.frontend.sources import load_without_weights
from tintc.compiler.reports.cost import cost_report
from tintc.compiler.reports.direct import direct_flops
from tintc.ir.call_sizes import call_sizes
from tintc.ir.config import SimulatorConfig


def counted_by_torch(
    model: nn.Module, names: set[str], ids: torch.Tensor, trained: int, steps: int
) -> int:
    """FLOPs of the loop that one would write. Attention is written out: torch counts no fused one
    on a CPU.
    """
    weights = {name: model.get_parameter(name).detach().requires_grad_() for name in names}
    frozen = {name: p.detach() for name, p in model.named_parameters() if name not in names}

    def logits(changed: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.func.functional_call(
            model, {**frozen, **changed}, (ids,), {"use_cache": False}
        ).logits
        return found

    rule = InnerRule(SimulatorConfig(inner_lr=0.1, steps=steps))
    state = rule.start(weights)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for _ in range(steps):
            loss = summed_loss(logits(weights, ids[:, : trained - 1])[0], ids[0, 1:trained])
            weights = rule.step(loss, weights, state)
        with torch.no_grad():
            logits(weights, ids)
    return int(counter.get_total_flops())


def weights_of_blocks(model: nn.Module, blocks: str, layers: int | None) -> set[str]:
    """All of the top blocks. blocks: name of their list."""
    count = len(model.get_submodule(blocks))
    first = count - (layers or count)
    tops = tuple(f"{blocks}.{i}." for i in range(first, count))
    return {name for name, _ in model.named_parameters() if name.startswith(tops)}


BLOCKS = {
    "opt": "model.decoder.layers",
    "llama": "model.layers",
    "gpt_neo": "transformer.h",
    "gpt_neox": "gpt_neox.layers",
}


@pytest.mark.parametrize("config", [{}, {"steps": 2, "layers": 1}], ids=["one", "two-top"])
@pytest.mark.parametrize("name", BLOCKS)
def test_is_what_torch_counts(name: str, config: dict[str, int]) -> None:
    model = model_of(name)
    names = weights_of_blocks(model, BLOCKS[name], config.get("layers"))
    expected = counted_by_torch(
        model, names, tokens(1, 24, VOCAB), trained=18, steps=config.get("steps", 1)
    )
    program = lowered(name, False, SimulatorConfig.paper(**config))
    sizes = call_sizes(program.facts, tokens=24, train_fraction=0.75)
    assert direct_flops(program, sizes) == expected
    assert direct_flops(program, {**sizes, "batch": 3}) == 3 * expected


@pytest.mark.parametrize(
    "rule", [{"optimizer": "muon", "momentum": 0.9}, {"optimizer": "adam"}, {"clip_norm": 0.5}]
)
def test_the_rule_s_own_products(rule: dict[str, Any]) -> None:
    """Those of muon: each matrix of the blocks is made orthogonal in five iterations of three
    products of its smaller side, (m, n) by (n, m) and twice (m, m) by (m, n) or (m, m).
    """
    plain, ruled = (
        lowered("opt", False, SimulatorConfig.exact(steps=3, **fields)) for fields in ({}, rule)
    )
    sizes = {**call_sizes(plain.facts, tokens=24, train_fraction=0.75), "batch": 2}
    expected = 0
    for name, weight in model_of("opt").named_parameters():
        if rule.get("optimizer") == "muon" and ".layers." in name and weight.ndim == 2:
            m, n = sorted(weight.shape)
            expected += 5 * (2 * m * m * n + 2 * m * m * m + 2 * m * m * n)
    found = direct_flops(ruled, sizes) - direct_flops(plain, sizes)  # type: ignore[arg-type]
    assert found == 3 * 2 * expected


@pytest.mark.slow
def test_opt_125m() -> None:
    """On the meta device, where nothing is computed."""
    model = load_without_weights("shape:opt-125m").model
    names = weights_of_blocks(model, BLOCKS["opt"], None)
    ids = torch.zeros(1, 256, dtype=torch.int64, device="meta")
    facts = cost_report("shape:opt-125m", SimulatorConfig.paper())
    assert facts["direct_flops"] == counted_by_torch(model, names, ids, trained=128, steps=1)
    # A loop that also reads the last trained token, which is a target only, takes more.
    assert round(counted_by_torch(model, names, ids, trained=129, steps=1) / 1e9, 2) == 152.48
