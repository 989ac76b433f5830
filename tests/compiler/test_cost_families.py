"""`tintc cost` takes whatever `compile` takes, and counts the same."""

from pathlib import Path

import pytest
import torch
import transformers

from tests.support.every import lowered, model_of, simulator_of
from tests.support.families import FAMILIES
from tests.support.variants import VARIANTS
from tintc import parameter_report
from tintc.compiler.cost import estimate
from tintc.compiler.frontend.capture import capture
from tintc.compiler.frontend.sources import load_without_weights
from tintc.compiler.reports.cost import cost_report
from tintc.ir.call_sizes import call_sizes
from tintc.ir.config import SimulatorConfig

CONFIG = SimulatorConfig()
# Numbers made inside forward (gpt_neo), in buffers (falcon), and computed from both.
SAMPLE = ["gpt_neo", "falcon", "bloom", "gemma2"]


def described(name: str, folder: Path) -> str:
    """A directory that holds the family's config and no weights."""
    model_of(name).config.to_json_file(folder / "config.json", use_diff=False)
    return str(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", [*FAMILIES, *VARIANTS])
def test_counts_what_compile_has(name: str, tmp_path: Path) -> None:
    facts = cost_report(described(name, tmp_path), CONFIG, tokens=16)
    program = lowered(name, False, CONFIG)
    assert facts["parameters"] == parameter_report(simulator_of(name, False, CONFIG))
    sizes = call_sizes(program.facts, tokens=16)
    assert facts["flops"] == estimate(program, "fused", torch.float32, **sizes).flops


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLE)
def test_constants_have_their_numbers_and_weights_none(name: str, tmp_path: Path) -> None:
    loaded = load_without_weights(described(name, tmp_path), dtype=torch.float64)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(tmp_path), dtype=torch.float64
    )
    found, expected = capture(loaded.model).constants, capture(model).constants
    assert found.keys() == expected.keys()
    for label, value in expected.items():
        torch.testing.assert_close(found[label], value, rtol=0, atol=0)
    weights = dict(loaded.model.named_parameters())
    assert weights.keys() == dict(model.named_parameters()).keys()
    assert all(value.is_meta for value in weights.values())
