"""What `inspect` and `cost` say of inner rules and of many steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.command import tintc


@pytest.mark.slow
def test_inspect_lists_states(tmp_path: Path) -> None:
    path = tmp_path / "sim"
    done = tintc("compile", "tiny-opt", "-o", path, "--optimizer", "adam", "--steps", 9)
    assert done.code == 0, done.err
    facts = tintc("inspect", path, "--json").document
    slots = facts["updated_slots"]
    for view in ((), ("--params",)):
        said = tintc("inspect", path, *view, columns=200).out
        for kind, count in (("first", slots), ("second", slots), ("count", 1)):
            assert f"{count} slots" in next(
                row for row in said.splitlines() if f"state {kind}" in row
            )


@pytest.mark.slow
def test_cost_counts_every_step_of_a_loop() -> None:
    options = ("--layers", 1, "--momentum", 0.9, "--json")
    six, seven, many = (
        tintc("cost", "tiny-opt", "--steps", steps, *options).document for steps in (6, 7, 200)
    )
    for name in ("flops", "direct_flops"):
        assert many[name] - seven[name] == 193 * (seven[name] - six[name]) > 0
    assert many["peak_bytes"] == six["peak_bytes"]
    assert many["parameters"]["passes"] == {"forward": 201, "backward": 200, "descent": 200}
