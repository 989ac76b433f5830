"""`no_casts` takes Hugging Face code's narrow floats out of models as they run and as they are
captured.
"""

import pytest
import torch
from torch import Tensor, fx

from tests.support.families import FAMILIES, VOCAB
from tests.support.models import tokens
from tests.support.variants import ROUNDED_ALIBI
from tintc.compiler.casts import NARROW, no_casts
from tintc.compiler.frontend.capture import Captured, capture

BUILDERS = {
    name: FAMILIES[name].build for name in ("llama", "gemma", "gpt_neox", "bloom", "falcon")
} | ROUNDED_ALIBI


def narrow_values(captured: Captured) -> set[torch.dtype]:
    """Of the graph and of those inside it, such as a rotary table's under no_grad."""
    inner = [
        module.graph
        for module in captured.graph.owning_module.modules()
        if isinstance(module, fx.GraphModule)
    ]
    values = [node.meta.get("val") for graph in (captured.graph, *inner) for node in graph.nodes]
    return {value.dtype for value in values if isinstance(value, Tensor) and value.dtype in NARROW}


@pytest.mark.parametrize("name", BUILDERS)
def test_a_running_model(name: str) -> None:
    model, ids = BUILDERS[name](), tokens(2, 9, VOCAB)
    with torch.inference_mode():
        plain = model(ids).logits
        with no_casts():
            wide = model(ids).logits
        assert torch.equal(model(ids).logits, plain)
    noise = float((wide - plain).abs().max() / wide.abs().max())
    assert wide.dtype == torch.float64
    assert (1e-9 < noise < 1e-6) if name not in ROUNDED_ALIBI else (1e-5 < noise < 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_a_captured_model(name: str) -> None:
    model = BUILDERS[name]()
    assert narrow_values(capture(model)) >= (
        {torch.bfloat16} if name in ROUNDED_ALIBI else {torch.float32}
    )
    with no_casts():
        assert not narrow_values(capture(model))
    assert torch.get_default_dtype() == torch.float32


def test_off_and_float32_outside() -> None:
    with no_casts(False):
        assert torch.ones(2, dtype=torch.float64).float().dtype == torch.float32
    with no_casts():
        assert (
            torch.ones(2).float().dtype
            == torch.softmax(torch.ones(2), -1, dtype=torch.float32).dtype
            == torch.float64
        )
        assert torch.arange(3).to(torch.int64).dtype == torch.int64
    assert torch.ones(2).dtype == torch.float32
