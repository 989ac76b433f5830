"""What `import tintc` offers, and that it costs nothing until it is used."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import tintc
from tests.support.command import process
from tests.support.models import opt
from tintc import save


def test_names() -> None:
    assert tintc.__all__ == sorted(
        tintc.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name)
    )
    for name in tintc.__all__:
        assert getattr(tintc, name) is not None
    with pytest.raises(AttributeError, match="module 'tintc' has no attribute 'nothing'"):
        _ = tintc.nothing  # type: ignore[attr-defined]


def test_errors_are_value_errors_with_exit_codes() -> None:
    errors = {name: getattr(tintc, name) for name in tintc.__all__ if name.endswith("Error")}
    assert all(
        issubclass(error, tintc.TintcError) and issubclass(error, ValueError)
        for error in errors.values()
    )
    assert {name: error.exit_code for name, error in errors.items()} == {
        "ArtifactError": 1,
        "InputError": 2,
        "MemoryLimitError": 4,
        "NumericalError": 5,
        "SourceError": 1,
        "TintcError": 1,
        "UnsupportedModelError": 3,
        "UsageError": 2,
    }


def test_import_is_light() -> None:
    code = """
import sys, tintc
tintc.SimulatorConfig.exact(steps=3)
assert not {"torch", "transformers", "numpy"} & set(sys.modules), "imported too early"
tintc.load
assert "torch" in sys.modules
"""
    done = process(code=code)
    assert done.returncode == 0, done.stderr


def test_module_runs_as_a_program() -> None:
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-m", "tintc", "--version"],
        capture_output=True,
        text=True,
        cwd=root,
        timeout=60,
        check=True,
    )
    assert done.stdout == f"tintc {tintc.__version__}\n"


@pytest.mark.slow
def test_the_documented_snippet(tmp_path: Path) -> None:
    """Line by line what the README promises, on the bundled model."""
    config = tintc.SimulatorConfig.paper(inner_lr=1e-4, steps=1, layers=None)
    sim = tintc.compile("tiny-opt", config)
    assert isinstance(sim, tintc.Simulator)
    assert isinstance(sim, torch.nn.Module)
    text = (
        "The storm reached the coast in the morning and moved inland. By the evening the storm had "
        "left the coast."
    )
    input_ids = sim.tokenizer(text, return_tensors="pt")["input_ids"]
    train_mask = (torch.arange(input_ids.shape[1]) < input_ids.shape[1] // 2).long()[None]
    labels = input_ids.masked_fill(train_mask.bool(), -100)

    out = sim(
        input_ids,
        train_mask,
        loss_mask=None,
        attention_mask=None,
        position_ids=None,
        labels=labels,
        return_initial=True,
    )
    assert isinstance(out, tintc.SimulatorOutput)
    assert out.logits.shape == (*input_ids.shape, 4096)
    assert out.initial_logits is not None
    assert out.initial_logits.shape == out.logits.shape
    assert out.loss is not None
    assert out.initial_loss is not None
    assert float(out.loss.detach()) != float(out.initial_loss.detach())
    plain = sim(input_ids, train_mask)
    assert plain.initial_logits is plain.loss is plain.initial_loss is None

    state = sim.updated_state_dict(input_ids, train_mask, index=0)
    model = AutoModelForCausalLM.from_pretrained(
        Path(tintc.__file__).parent / "data" / "tiny-opt", dtype=torch.float32
    )
    model.load_state_dict(state)
    assert torch.allclose(model(input_ids).logits, out.logits, atol=1e-4)

    loaded = tintc.load(save(sim, tmp_path / "sim"), device="cpu", dtype=torch.float32)
    assert torch.equal(
        loaded(input_ids, train_mask, labels=labels, return_initial=True).logits, out.logits
    )


def test_presets() -> None:
    assert tintc.SimulatorConfig.paper() == tintc.SimulatorConfig()
    assert tintc.SimulatorConfig.exact().is_exact
    assert tintc.SimulatorConfig.exact(norm_update="bias").norm_update == "bias"


def test_loading_and_calling_load_no_compiler(tmp_path: Path) -> None:
    """Neither transformers nor what torch traces with: 120 MB and seconds at every start."""
    tintc.save(tintc.compile(opt()), tmp_path / "sim")
    code = f"""
import sys, torch, tintc
simulator = tintc.load({str(tmp_path / "sim")!r})
with torch.inference_mode():
    simulator(torch.arange(12)[None] % 7 + 3, torch.tensor([[1] * 6 + [0] * 6]))
heavy = {{"transformers", "torch._dynamo", "sympy", "networkx"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = process(code=code)
    assert done.returncode == 0, done.stderr
