"""tintc.runtime.calibration: measured once, kept, and measured anew where what is kept is none."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.support.models import opt, simulate
from tests.support.speeds import only
from tintc.ir.calibration import Calibration, fixed
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UsageError
from tintc.runtime import calibrating, calibration
from tintc.runtime.calibration import cache_file, calibration_of, kept_in, key_of, renewed, state

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[torch.dtype]:
    """The types that were measured; nothing takes any time."""
    done: list[torch.dtype] = []

    def measure(device: str, dtype: torch.dtype, **more: Any) -> Calibration:
        done.append(dtype)
        known = only("onednn" if len(done) % 2 else "blas")
        return Calibration("cpu", known.points, known.bandwidth, more["about"])

    monkeypatch.setattr(calibrating, "measure", measure)
    monkeypatch.setattr(calibration, "_KNOWN", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TINTC_CALIBRATION")
    return done


def of_another_process() -> Calibration:
    calibration._KNOWN.clear()
    return calibration_of(CPU, torch.float32)


def test_once(measured: list[torch.dtype], tmp_path: Path) -> None:
    first = calibration_of(CPU, torch.float32)
    assert calibration_of("cpu", torch.float32) is first
    again = of_another_process()
    assert (again.points, again.bandwidth) == (first.points, first.bandwidth)
    assert measured == [torch.float32]
    path = cache_file(CPU, torch.float32)
    assert path.is_relative_to(tmp_path / "tintc")
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert again.about["from"] == state(CPU, torch.float32) == str(path)


def test_for_each_type_and_number_of_threads(measured: list[torch.dtype]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        calibration_of(CPU, dtype)
    torch.set_num_threads(2)  # the next test has one again
    calibration_of(CPU, torch.float32)
    assert measured == [torch.float32, torch.bfloat16, torch.float32]
    assert set(key_of(CPU, torch.float32)) == {"device", "processor", "dtype", "threads", "torch"}


def test_renewed(measured: list[torch.dtype]) -> None:
    first = calibration_of(CPU, torch.float32)
    second = renewed(CPU, torch.float32)
    assert second.one_kernel != first.one_kernel
    assert of_another_process().one_kernel == second.one_kernel
    assert len(measured) == 2


def spoiled(how: str, text: str) -> bytes:
    given = json.loads(text)
    if how == "cut":
        return text[: len(text) // 2].encode()
    if how == "no text":
        return b"\xff\xfe\x00"
    if how == "too large":
        return b" " * (1 << 21)
    if how == "a rate":
        given["points"][0]["rate"] *= 2
    if how == "no points":
        given["points"] = []
    if how == "another machine":
        given["key"]["processor"] = "another"
    if how == "another format":
        given["format"] = 99
    if how == "not finite":
        given["bandwidth"] = float("inf")
    if how == "another kernel":
        given["points"][0]["kernel"] = "mine"
    if how in ("another machine", "another format", "another kernel"):
        given["digest"] = calibration._digest(given)  # by somebody who knows how
    return json.dumps(given).encode()


@pytest.mark.parametrize(
    "how",
    [
        *("cut", "no text", "too large", "a rate", "no points", "another machine"),
        *("another format", "not finite", "another kernel"),
    ],
)
def test_what_is_no_calibration_is_measured_anew(how: str, measured: list[torch.dtype]) -> None:
    calibration_of(CPU, torch.float32)
    path = cache_file(CPU, torch.float32)
    path.write_bytes(spoiled(how, path.read_text()))
    assert kept_in(path, key_of(CPU, torch.float32)) is None
    of_another_process()
    of_another_process()
    assert len(measured) == 2


def test_nothing_is_measured_where_nothing_can_be_kept(
    measured: list[torch.dtype], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert calibration_of(CPU, torch.float32) is fixed("cpu")
    assert measured == []


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration_of(CPU, torch.float32)
    path = cache_file(CPU, torch.float32)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert renewed(CPU, torch.float32) is fixed("cpu")
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_relative_cache_directory_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("HOME", "/home/of")
    assert cache_file(CPU, torch.float32).is_relative_to("/home/of/.cache/tintc")


class TestForced:
    def test_off(self, measured: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TINTC_CALIBRATION", "off")
        assert calibration_of(CPU, torch.float32) is fixed("cpu")
        assert (measured, state(CPU, torch.float32)) == ([], "fixed")

    def test_by_a_file(self, measured: list[torch.dtype], monkeypatch: pytest.MonkeyPatch) -> None:
        first = calibration_of(CPU, torch.float32)
        path = cache_file(CPU, torch.float32)
        monkeypatch.setenv("TINTC_CALIBRATION", str(path))
        for dtype in (torch.float32, torch.float64):  # whatever it was measured for
            assert calibration_of(CPU, dtype).points == first.points
        assert calibration_of("cuda", torch.float32) is fixed("cuda")
        assert len(measured) == 1

    def test_by_a_file_that_is_none(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TINTC_CALIBRATION", str(tmp_path / "none.json"))
        with pytest.raises(UsageError, match=r"none.json', which is no calibration; expected off"):
            calibration_of(CPU, torch.float32)

    def test_of_a_simulator(
        self, measured: list[torch.dtype], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        simulator = simulate(opt(dtype=torch.float32), SimulatorConfig.paper())
        mine = only("blas")
        simulator.calibration = mine  # type: ignore[assignment]
        assert simulator.calibration is mine
        simulator.calibration = "off"  # type: ignore[assignment]
        assert simulator.calibration is fixed("cpu")
        assert measured == []
        simulator.calibration = "auto"  # type: ignore[assignment]
        assert simulator.calibration.about["from"] == str(cache_file(CPU, torch.float32))
        simulator.calibration = cache_file(CPU, torch.float32)  # type: ignore[assignment]
        assert simulator.calibration.measured
        with pytest.raises(UsageError, match=r"calibration is '.*mine', which is no"):
            simulator.calibration = tmp_path / "mine"  # type: ignore[assignment]
        simulator.optimizations = ()
        assert simulator.calibration is fixed("cpu")  # nobody asks


class TestMeasured:
    """The measurement itself, of small products."""

    @pytest.fixture(autouse=True)
    def _really(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.undo()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    def test_every_shape_by_every_kernel(self, dtype: torch.dtype) -> None:
        shapes = [(1, 8, 8), (4, 8, 16), (16, 16, 8)]
        found = calibrating.measure("cpu", dtype, shapes)
        offered = calibrating.kernels("cpu", dtype)
        assert "blas" in offered and (dtype == torch.float32 or "onednn" not in offered)
        assert {(p.kernel, p.rows, p.inner, p.columns) for p in found.points} == {
            (kernel, *shape) for kernel in offered for shape in shapes
        }
        assert found.bandwidth > 1e6 and all(point.rate > 0 for point in found.points)

    def test_ends_in_time(self) -> None:
        """What would take too long is left out."""
        start = time.perf_counter()
        found = calibrating.measure(
            "cpu", torch.float32, [(8, 8, 8), (2048, 8192, 65536)], seconds=0.5
        )
        assert time.perf_counter() - start < 3
        assert {point.rows for point in found.points} == {8}

    def test_weights_take_turns(self) -> None:
        """No two calls in a row multiply with the same memory; one that is larger than all has it
        alone.
        """
        weights = calibrating._Weights("cpu", torch.float32)
        starts = [weights.next(1024, 1024).data_ptr() for _ in range(40)]
        assert len(set(starts[:32])) == 32 == calibrating._WEIGHTS // 2**22
        assert starts[32:] == starts[:8]
        assert weights.next(8192, 8192).shape == (8192, 8192)

    def test_is_no_part_of_what_counts_a_call(self) -> None:
        with FlopCounterMode(display=False) as counter:
            calibrating.measure("cpu", torch.float64, [(8, 8, 8)], seconds=0.1)
        assert counter.get_total_flops() == 0
