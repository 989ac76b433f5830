"""Examples do what they say without an argument."""

import re
import runpy
import sys

import pytest

from tests.docs.snippets import ROOT


def test_the_inner_rate_converges(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["learn_inner_lr.py"])
    runpy.run_path(str(ROOT / "examples" / "learn_inner_lr.py"), run_name="__main__")
    lines = re.findall(r"inner_lr (\S+), perplexity (\S+)", capsys.readouterr().out)
    rates, perplexities = ([float(line[i]) for line in lines] for i in (0, 1))
    assert max(rates[-5:]) < 1.02 * min(rates[-5:])
    assert perplexities[-1] == min(perplexities) < perplexities[0]
