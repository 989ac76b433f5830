"""`tintc run --show` and `--plot`: each token's losses, against autograd, wherever they are
computed, and everything that cannot be shown refused in a line.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import AutoModelForCausalLM

import tintc as package
from tests.cli.test_export_command import model
from tests.cli.test_export_pair import pair
from tests.cli.test_stream_command import LONG, SIZES, losses_of
from tests.oracle.reference import reference
from tests.support.artifacts import TEXT, artifact, source_directory
from tests.support.command import tintc
from tests.support.tolerances import ONNX
from tintc.commands import console
from tintc.commands.text import change
from tintc.compiler.casts import no_casts
from tintc.evaluate import figure
from tintc.evaluate.token_plot import draw
from tintc.runtime.showing.tokens import TokenLosses

EXACT = ("--dtype", "float64")
LIMIT = 1e-9
KEYS = ["position", "token", "text", "trained", "loss_before", "loss_after"]


@cache
def expected() -> tuple[list[float], list[float]]:
    """Losses of the text's tokens but the first, before and after one step on its first half, by
    torch.autograd.
    """
    simulator = package.load(artifact("exact"))
    network = AutoModelForCausalLM.from_pretrained(source_directory()).double()
    ids = torch.tensor([simulator.tokenizer(TEXT)["input_ids"]])
    train = (torch.arange(ids.shape[1]) < round(ids.shape[1] / 2)).long()[None]
    with no_casts():
        found = reference(network, simulator.config, ids, train)
    before, after = (
        F.cross_entropy(each[0, :-1], ids[0, 1:], reduction="none").tolist()
        for each in (found.initial_logits, found.logits)
    )
    return before, after


def shown(*arguments: object) -> list[dict[str, Any]]:
    """token_losses of a run."""
    done = tintc("run", *arguments, "--show", "--json")
    assert done.code == 0, done.err
    found = done.document["token_losses"]
    assert all(list(token) == KEYS for token in found)
    return found


def losses(found: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Of all tokens but the first, which has none."""
    assert (found[0]["loss_before"], found[0]["loss_after"]) == (None, None)
    return [t["loss_before"] for t in found[1:]], [t["loss_after"] for t in found[1:]]


class TestLosses:
    @pytest.mark.parametrize("further", [(), ("--generate", 2)])
    def test_of_a_text(self, further: tuple[object, ...]) -> None:
        found = shown(artifact("exact"), "--text", TEXT, *EXACT, *further)
        for got, wanted in zip(losses(found), expected(), strict=True):
            assert got == pytest.approx(wanted, rel=LIMIT)
        assert "".join(token["text"] for token in found).removeprefix("</s>") == TEXT
        half = round(len(found) / 2)
        assert [t["trained"] for t in found] == [True] * half + [False] * (len(found) - half)

    def test_the_perplexity_is_theirs(self) -> None:
        done = tintc("run", artifact("exact"), "--text", TEXT, *EXACT, "--show", "--json")
        rest = [t["loss_after"] for t in done.document["token_losses"] if not t["trained"]]
        assert done.document["loss_after"] == pytest.approx(sum(rest) / len(rest), rel=LIMIT)
        plain = tintc("run", artifact("exact"), "--text", TEXT, *EXACT, "--json").document
        assert "token_losses" not in plain
        assert plain["loss_after"] == done.document["loss_after"]

    def test_all_of_it_trained(self) -> None:
        found = shown(artifact("exact"), "--text", TEXT, "--prompt", "The sea", "--generate", 1)
        assert all(token["trained"] for token in found)
        before, after = losses(found)
        assert sum(after) < sum(before)

    def test_of_a_stream(self) -> None:
        found = shown(artifact("exact"), "--text", LONG, *SIZES, *EXACT)
        _, after = losses(found)
        assert after == pytest.approx(losses_of(LONG, "recompute").tolist(), rel=LIMIT)
        assert not any(token["trained"] for token in found)
        assert "".join(token["text"] for token in found).removeprefix("</s>") == LONG

    @pytest.mark.parametrize("exported", [model, pair])
    @pytest.mark.parametrize("further", [(), ("--generate", 1)])
    def test_of_onnx_models(self, exported: Any, further: tuple[object, ...]) -> None:
        found, wanted = (shown(path, "--text", TEXT, *further) for path in (exported(), artifact()))
        limit = ONNX[torch.float32]
        for got, other in zip(losses(found), losses(wanted), strict=True):
            assert got == pytest.approx(other, rel=limit, abs=limit)
        assert [t["text"] for t in found] == [t["text"] for t in wanted]

    @pytest.mark.parametrize("exported", [model, pair])
    def test_onnx_models_without_it(self, exported: Any) -> None:
        """Fewer losses are computed; those of the rest are the same."""
        plain, all_of_them = (
            tintc("run", exported(), "--text", TEXT, "--json", *further).document
            for further in ((), ("--show",))
        )
        assert plain["loss_after"] == pytest.approx(all_of_them["loss_after"], rel=1e-6)


class TestPrinted:
    @pytest.mark.parametrize("further", [(), ("--generate", 2)])
    @pytest.mark.parametrize("path", [artifact, model, pair])
    def test_marks(self, path: Any, further: tuple[object, ...]) -> None:
        done = tintc("run", path(), "--text", TEXT, "--show", *further)
        assert done.code == 0, done.err
        assert done.out.count("loss: ") == 1
        assert done.out.count("\u27e6</s>The") == 1
        assert "trained on: mean loss" in done.out
        assert "\x1b" not in done.out
        assert all(len(line) <= 80 for line in done.out.splitlines())

    def test_of_a_stream(self) -> None:
        done = tintc("run", artifact(), "--text", TEXT, *SIZES, "--show")
        assert "predicted: mean loss" in done.out
        assert done.out.count("\u27e6") == 1  # of the legend: nothing is set apart

    def test_of_a_stream_that_diverges(self) -> None:
        """What was scored is shown, and the rest has no losses."""
        rate = ("--inner-lr", 1e30)
        done = tintc("run", artifact(), "--text", TEXT, *SIZES, *rate, "--show", "--json")
        assert done.code == 5, done.err
        found = done.document["token_losses"]
        assert [t["loss_after"] is None for t in found[:7]] == [True] + [False] * 6
        assert found[-1]["loss_after"] is None

    def test_colours(self, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        terminal = Console(force_terminal=True, color_system="truecolor", width=80)
        monkeypatch.setattr(console, "out", terminal)
        done = tintc("run", artifact(), "--text", TEXT, "--show", "--inner-lr", 0.5)
        assert "\x1b[38;2;17;17;17;48;2;" in done.out
        assert "\u25be" not in done.out

    def test_hostile_texts(self) -> None:
        text = f"{TEXT}\x1b[2J\u202e <b>[red]x[/red]"
        done = tintc("run", artifact(), "--text", text, "--show")
        assert "\\x1b" in done.out
        assert "\\u202e" in done.out
        assert not {"\x1b", "\u202e"} & set(done.out)
        assert "[" in done.out


@pytest.mark.parametrize(
    ("after", "said"),
    [(1 - 1e-9, "+0.00 %"), (1 + 1e-9, "+0.00 %"), (0.98, "-2.00 %"), (1e9, "")],
)
def test_what_is_no_change_is_not_below_zero(after: float, said: str) -> None:
    assert change(1.0, after) == said


class TestPlot:
    def test_is_a_picture(self, tmp_path: Path) -> None:
        target = tmp_path / "new" / "a.PNG"
        command = ("run", artifact(), "--text", TEXT, "--plot", target)
        done = tintc(*command, "--json")
        assert done.document["plot"] == str(target)
        assert "token_losses" not in done.document
        first = target.read_bytes()
        assert first.startswith(b"\x89PNG")
        target.write_bytes(b"old")
        assert tintc(*command).code == 0
        assert target.read_bytes() == first
        assert [path.name for path in target.parent.iterdir()] == ["a.PNG"]

    def test_of_others(self, tmp_path: Path) -> None:
        for name, path, further in (
            ("s", artifact(), SIZES), ("o", model(), ()), ("p", pair(), ())
        ):  # fmt: skip
            target = tmp_path / f"{name}.png"
            assert tintc("run", path, "--text", TEXT, "--plot", target, *further).code == 0
            assert target.is_file()

    def test_losses_that_are_not_finite(self, tmp_path: Path) -> None:
        values = [math.nan, math.inf, 1.0]
        found = TokenLosses.of_text([1, 2, 3, 4], str, 2, values, [2.0, 2.0, math.nan])
        draw(found, tmp_path / "a.png")
        assert (tmp_path / "a.png").is_file()

    def test_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refused(target: Path, code: int = 2) -> str:
            return tintc("run", artifact(), "--text", TEXT, "--plot", target).refused(code)

        assert "expected a name that ends in .png" in refused(tmp_path / "a.svg")
        (tmp_path / "b.png").mkdir()
        assert "is a directory" in refused(tmp_path / "b.png")
        (tmp_path / "file").touch()
        assert "cannot write" in refused(tmp_path / "file" / "a.png", 1)
        monkeypatch.setattr(figure, "available", lambda: False)
        assert "pip install 'tintc[plot]'" in refused(tmp_path / "a.png")
        assert tintc("run", artifact(), "--text", TEXT, "--show").code == 0


class TestRefused:
    def test_what_is_not_one_text(self, tmp_path: Path) -> None:
        lines, each = tmp_path / "docs.jsonl", tmp_path / "each.jsonl"
        lines.write_text(json.dumps({"text": TEXT}) + "\n")
        each.write_text(json.dumps({"context": TEXT, "prompt": "The"}) + "\n")
        state = ("--text", TEXT, "--stream", "--state", tmp_path / "state")
        for arguments, said in (
            (("--file", lines), "--show with"),
            (("--file", lines, "--stream"), "which holds many documents; expected one text"),
            (("--file", tmp_path), "which holds many documents; expected one text"),
            (("--each", each), "--show with --each"),
            (("--adapted", tmp_path, "--prompt", "x"), "--show with --adapted"),
            (state, "--show with --state"),
        ):
            assert said in tintc("run", artifact(), *arguments, "--show").refused(2)
        assert not (tmp_path / "state").exists()
        both = ("--show", "--plot", tmp_path / "a.png")
        refused = tintc("run", artifact(), "--each", each, *both).refused(2)
        assert "--show and --plot with --each" in refused
