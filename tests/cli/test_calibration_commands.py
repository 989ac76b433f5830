"""tintc env --calibrate, and the choices that tintc inspect prints."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.artifacts import artifact
from tests.support.command import tintc
from tests.support.speeds import only
from tintc.ir.calibration import Calibration
from tintc.runtime import calibrating, calibration


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measure(device: str, dtype: torch.dtype, **more: Any) -> Calibration:
        known = only("blas")
        return Calibration("cpu", known.points, known.bandwidth, more["about"])

    monkeypatch.setattr(calibrating, "measure", measure)
    monkeypatch.setattr(calibration, "_KNOWN", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_shows_and_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tintc("env", "--json").document["calibration"][0] == "fixed"
    monkeypatch.delenv("TINTC_CALIBRATION")
    before = tintc("env", "--json").document
    assert before["calibration"][0] == "cpu, measured at the first call"
    assert "calibrations" not in before
    done = tintc("env", "--calibrate", "--json").document
    assert Path(done["calibration"][0]).is_file()
    (found,) = done["calibrations"]
    assert (found["bandwidth"], len(found["points"])) == (1e9, len(only("blas").points))
    shown = tintc("env", "--calibrate").out
    assert "a copy moves 1 GB/s" in shown
    assert "256 x 64 x 64" in shown and " blas" in shown


def test_where_nothing_can_be_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    message = tintc("env", "--calibrate").refused(1)
    assert "cannot be written, so choices stay the fixed ones" in message
    assert "set XDG_CACHE_HOME" in message


def test_inspect_says_what_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    path = artifact()
    line = " ".join(tintc("inspect", path, "--stage", "optimized").out.splitlines()[-6:])
    assert "calibration fixed; products: " in line
    found = tintc("inspect", path, "--stage", "optimized", "--json").document
    assert found["choices"]["measured"] is False
    assert "choices" not in tintc("inspect", path, "--stage", "lowered", "--json").document
    monkeypatch.delenv("TINTC_CALIBRATION")
    found = tintc("inspect", path, "--stage", "optimized", "--json").document
    assert found["choices"]["products"]["onednn"] == 0
    assert found["choices"]["calibration"]["threads"] == str(torch.get_num_threads())
    assert not [node for node in found["nodes"] if "onednn" in node["operator"]]
