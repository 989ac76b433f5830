"""Examples do what they say without an argument."""

import ast
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.docs.snippets import ROOT


@pytest.mark.slow
def test_the_inner_rate_converges(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["learn_inner_lr.py"])
    runpy.run_path(str(ROOT / "examples" / "learn_inner_lr.py"), run_name="__main__")
    lines = re.findall(r"inner_lr (\S+), perplexity (\S+)", capsys.readouterr().out)
    rates, perplexities = ([float(line[i]) for line in lines] for i in (0, 1))
    assert max(rates[-5:]) < 1.02 * min(rates[-5:])
    assert perplexities[-1] == min(perplexities) < perplexities[0]


def displayed(cell: str, names: dict[str, Any]) -> Any:
    """What a notebook shows of a cell: the value of a last line that is an expression."""
    body = ast.parse(cell).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "cell", "exec"), names)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


@pytest.mark.slow
def test_the_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its cells in order, without a kernel. Everything that it shows has HTML, but what `close`
    returns, and it is kept without outputs.
    """
    monkeypatch.chdir(ROOT / "examples")  # where a kernel would start
    found = json.loads(Path("fine_tune_a_paragraph.ipynb").read_text(encoding="utf-8"))
    assert (found["nbformat"], found["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in found["cells"] if cell["cell_type"] == "code"]
    assert all(not c["outputs"] and c["execution_count"] is None for c in cells)
    assert len({cell["id"] for cell in found["cells"]}) == len(found["cells"])
    names: dict[str, Any] = {}
    shown = {}
    for cell in cells:
        value = displayed("".join(cell["source"]), names)
        if value is not None:
            shown[cell["id"]] = value._repr_html_()
    assert list(shown) == ["compile", "show", "page"]
    assert "<svg" in shown["compile"] and "blocks 1 to 2, each" in shown["compile"]
    assert "237 predicted: mean loss 4.272 -&gt; 4.244 nats" in shown["show"]
    assert f'<iframe src="{names["page"].url}"' in shown["page"]
    assert names["page"].closed
    assert re.search(r"mean loss \S+ before, \S+ after", capsys.readouterr().out)
