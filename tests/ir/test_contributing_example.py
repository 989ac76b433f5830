"""CONTRIBUTING's worked example: its blocks, applied to a copy of the source as the text says, make
an operator with which a model trains on both back ends.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("ir", "passes", "runtime", "compiler", "evaluate", "tintc")
TITLE = re.compile(r"# (?P<file>\S+\.py)(?:, behind: (?P<line>.+))?\n")

INCOMPLETE = """
import importlib
for module in ("tintc.passes.lowering", "tintc.runtime.backends.transformer.emit"):
    try:
        importlib.import_module(module)
    except AssertionError as error:
        print(error)
"""

TRAINS = """
import torch
import torch.nn.functional as F
from torch import nn

from tintc.compiler.driver import lower
from tintc.compiler.frontend.capture import capture
from tintc.ir.config import SimulatorConfig
from tintc.runtime.simulator import Simulator


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.norm(x)
        return x - (torch.relu(self.up(y)) - self.down(y))


torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(19, 8), nn.Sequential(Block(), Block()), nn.Linear(8, 19))
model = model.double()
captured = capture(model)
program = lower(captured, SimulatorConfig.exact(inner_lr=0.1))
names = [str(node.target) for node in program.graph.nodes]
assert names.count("tint.difference.default") >= 4, names
ids = torch.randint(19, (1, 7))
loss = F.cross_entropy(model(ids)[0, :-1], ids[0, 1:], reduction="sum")
wanted = {
    name: parameter - 0.1 * gradient
    for (name, parameter), gradient in zip(
        model[1].named_parameters("1"),
        torch.autograd.grad(loss, list(model[1].parameters())),
        strict=True,
    )
}
for backend in ("fused", "transformer"):
    simulator = Simulator(program, captured.tensors, backend=backend)
    with torch.no_grad():
        state = simulator.updated_state_dict(ids, torch.ones_like(ids), index=0)
    errors = {name: float((state[name] - value).abs().max()) for name, value in wanted.items()}
    assert max(errors.values()) < 1e-12, (backend, errors)
    assert all(not torch.equal(state[name], model.state_dict()[name]) for name in wanted)
    print(backend, "trained", len(wanted))
"""


def blocks() -> list[tuple[str, str | None, str]]:
    """(file, line behind which it goes or None for its end, code) of each block, in order."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text.split("## Add an operator\n")[1].split("\n## ")[0]
    found = []
    for block in re.findall(r"```python\n(.*?)```", section, re.DOTALL):
        title = TITLE.match(block)
        assert title, f"a block without a file: {block}"
        found.append((title["file"], title["line"], block[title.end() :]))
    return found


def apply(folder: Path, file: str, line: str | None, code: str) -> None:
    path = folder / file
    text = path.read_text()
    if line is None:
        path.write_text(f"{text}\n\n{code}")
    else:
        before, found, after = text.partition(line + "\n")
        assert found, f"{file} has no line {line}"
        path.write_text(before + found + code + after)


def run(folder: Path, script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    for room in ROOMS:
        shutil.copytree(ROOT / room, tmp_path / room, symlinks=True)
    return tmp_path


def test_the_blocks_make_an_operator(copied: Path) -> None:
    definition, *rest = blocks()
    assert len(rest) == 4
    apply(copied, *definition)
    assert run(copied, INCOMPLETE).splitlines() == [
        "tint.difference has no backward rule",
        "tint.difference has no transformer rule",
    ]
    for block in rest:
        apply(copied, *block)
    assert run(copied, TRAINS).splitlines() == ["fused trained 12", "transformer trained 12"]
