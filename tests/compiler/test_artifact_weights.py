"""An artifact's weights are mapped: loading needs no memory of its own, processes share the pages,
and nobody's writing reaches the file.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tintc
from tests.support.artifacts import artifact, copy_of
from tests.support.models import opt, simulate
from tintc.compiler.artifact_files import INNER_LR
from tintc.compiler.artifact_weights import LINE, read_weights, write_weights
from tintc.ir.config import SimulatorConfig

LINUX = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="reads /proc")

# Prints bytes: of the weights, and by how much loading and reading them raised the peak of the
# process and what is its own.
CHILD = """
import json, sys
import psutil
import tintc, tintc.compiler.artifact, torch
from tintc.runtime.simulator import Simulator

def peak():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

def own():
    return psutil.Process().memory_full_info().uss

torch.ones(8).sum()
before = peak(), own()
simulator = tintc.load(sys.argv[1])
weights = simulator.prefix.tensors().values()
for weight in weights:
    weight.detach().flatten()[::256].sum()  # reads every page
print(json.dumps([sum(w.nbytes for w in weights), peak() - before[0], own() - before[1]]))
"""


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return copy_of(artifact(), tmp_path / "saved")


def mappings(file: Path) -> list[range]:
    """Where this process maps a file."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    ends = [line.split()[0].split("-") for line in lines if line.endswith(str(file))]
    return [range(int(start, 16), int(end, 16)) for start, end in ends]


def odd_tensors() -> dict[str, torch.Tensor]:
    """Of every kind that a simulator has, of sizes that are no whole lines among them."""
    torch.manual_seed(0)
    return {
        "a.odd": torch.randn(5, 7),
        "b.lines": torch.randn(32, 16),
        "c.half": torch.randn(9, 3).bfloat16(),
        "d.half_lines": torch.randn(64, 32).half(),
        "e.turned": torch.randn(16, 48).t(),
        "f.ids": torch.arange(3),
        "g.lines": torch.randn(16),
        INNER_LR: torch.tensor(0.25, dtype=torch.float64),
    }


@LINUX
def test_loading_needs_no_memory_beside_the_weights_and_processes_share_them(
    tmp_path: Path,
) -> None:
    model = opt(vocab=20_000, hidden=512, heads=4, ffn=512, dtype=torch.float32)
    folder = tintc.save(simulate(model, SimulatorConfig()), tmp_path / "big")
    here = tintc.load(folder)
    assert all(torch.isfinite(weight).all() for weight in here.prefix.tensors().values())
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder)], capture_output=True, text=True, check=True
    )
    weights, peak, own = json.loads(ran.stdout)
    assert weights > 40e6
    assert peak <= 1.15 * weights + 10e6  # the graph, and what loading imports
    assert own <= 0.15 * weights + 10e6  # the pages are this process's too


@LINUX
def test_every_weight_of_whole_lines_is_used_where_the_file_is_mapped(saved: Path) -> None:
    simulator = tintc.load(saved)
    places = mappings(saved / "weights.safetensors")
    weights = {n: w for n, w in simulator.prefix.tensors().items() if w.nbytes % LINE == 0}
    assert weights
    for name, weight in weights.items():
        assert weight.data_ptr() % LINE == 0, name
        assert any(weight.data_ptr() in place for place in places), name


def test_what_is_written_to_weights_stays_in_memory(saved: Path) -> None:
    file = saved / "weights.safetensors"
    before, untouched = sha256(file), tintc.load(saved)
    simulator = tintc.load(saved)
    weights = list(simulator.prefix.parameters())
    ids = torch.arange(12).view(1, -1)
    simulator(ids, torch.ones_like(ids), labels=ids).loss.backward()
    torch.optim.SGD(weights, lr=1.0).step()
    with torch.no_grad():
        for weight in weights:
            weight.add_(1)
    assert not any(map(torch.equal, weights, untouched.prefix.parameters()))
    simulator.half().zero_grad()
    simulator.float().to(torch.float64)
    assert sha256(file) == before
    again = tintc.load(saved).prefix.tensors()
    kept = untouched.prefix.tensors()
    assert all(torch.equal(weight, kept[name]) for name, weight in again.items())


def test_a_loaded_simulator_outlives_its_artifact(saved: Path) -> None:
    simulator = tintc.load(saved)
    ids = torch.arange(12).view(1, -1)
    with torch.inference_mode():
        before = tintc.load(saved)(ids, torch.ones_like(ids)).logits
    other = tintc.load(saved)
    with torch.no_grad():
        for weight in other.prefix.parameters():
            weight.mul_(2)
    tintc.save(other, saved, force=True)
    for file in sorted(saved.rglob("*"), reverse=True):
        file.unlink() if file.is_file() else file.rmdir()
    with torch.inference_mode():
        assert torch.equal(simulator(ids, torch.ones_like(ids)).logits, before)


class TestFile:
    def test_safetensors_reads_it(self, tmp_path: Path) -> None:
        file, tensors = tmp_path / "weights.safetensors", odd_tensors()
        write_weights(tensors, file)
        found = load_file(file)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert torch.equal(found[name], tensor), name

    def test_comes_back(self, tmp_path: Path) -> None:
        file, tensors = tmp_path / "weights.safetensors", odd_tensors()
        write_weights(tensors, file)
        found = read_weights(file, "cpu", None)
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        assert all(tensor.data_ptr() % LINE == 0 for tensor in found.values())

    def test_one_that_safetensors_wrote_is_copied_where_it_has_to_be(self, tmp_path: Path) -> None:
        file = tmp_path / "weights.safetensors"
        tensors = {name: tensor.contiguous() for name, tensor in odd_tensors().items()}
        save_file(tensors, file)
        found = read_weights(file, "cpu", None)
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        assert all(tensor.data_ptr() % LINE == 0 for tensor in found.values())

    def test_another_type_is_of_weights_alone(self, tmp_path: Path) -> None:
        file = tmp_path / "weights.safetensors"
        write_weights(odd_tensors(), file)
        found = read_weights(file, "cpu", torch.bfloat16)
        assert found["a.odd"].dtype == found["d.half_lines"].dtype == torch.bfloat16
        assert (found["f.ids"].dtype, found[INNER_LR].dtype) == (torch.int64, torch.float64)
