"""tintc bench --stream: its document, its tables, its loops against the oracle, what it refuses."""

import copy
from typing import Any

import pytest
import torch

from tests.oracle.streaming import streamed
from tests.support.artifacts import POSITIONS, source_directory
from tests.support.command import Finished, tintc
from tests.support.every import model_of
from tests.support.models import tokens
from tests.support.tolerances import error
from tintc.compiler.autograd_rule import InnerRule
from tintc.compiler.casts import no_casts
from tintc.evaluate.speed import streaming
from tintc.evaluate.speed.stream_loop import StreamLoop
from tintc.ir.config import SimulatorConfig
from tintc.runtime.stream_settings import StreamSettings

SMALL = ("--stream", "--chunk", 3, "--context", 6, "--batch", 2, "--pairs", 1)


def bench(*arguments: object, code: int = 0) -> Finished:
    done = tintc("bench", source_directory(), *SMALL, "--inner-lr", 0.01, *arguments)
    assert done.code == code, done.err
    return done


def test_document_and_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "CONTEXTS", (2, 3))
    how = ("--preset", "exact", "--dtype", "float64", "--keys", "cache", "--momentum", 0.5)
    facts = bench("--json", *how).document
    assert facts["check"]["difference"] <= 1e-9 and facts["exact"]
    assert facts["rule"] == {"momentum": 0.5}
    assert set(facts["against"]) == {"recompute", "cache"}
    for found in facts["against"].values():
        assert found["ratio"] == found["stream_seconds"] / found["loop_seconds"]
        assert found["stream_tokens_per_second"] == pytest.approx(2 * 3 / found["stream_seconds"])
    # A window that recomputes has 9 tokens, one that keeps its keys 3.
    assert facts["against"]["recompute"]["counted"] < facts["against"]["cache"]["counted"]
    assert facts["against"]["cache"]["counted"] == pytest.approx(1, abs=0.2)
    assert set(facts["memory"]["peak_bytes"]) == {"2", "3"}
    shown = " ".join(bench("--no-memory", "--keys", "cache").out.split())
    assert "2 texts, chunks of 3 targets, context 6, keys cache" in shown
    assert "loop that keeps its keys" in shown and "no error" in shown


@pytest.mark.parametrize("keys", ["recompute", "cache"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_loops_are_the_oracle_s(name: str, keys: Any) -> None:
    """By hand is by hand: the loop that a stream is timed against computes the same."""
    config = SimulatorConfig.exact(inner_lr=0.002, momentum=0.9, steps=2, schedule="linear")
    model, ids = model_of(name), tokens(1, 17, 28, seed=3) + 1
    names = [n for n, _ in model.named_parameters() if ".1." in n]
    with no_casts():
        expected = streamed(model, config, [ids[0]], names, chunk=4, context=6, keys=keys)
        settings = StreamSettings(4, 6, keys)
        loop = StreamLoop(copy.deepcopy(model), names, InnerRule(config), settings, 1)
        found = [loop.step(ids, s)[0] for s in range(1, 17, 4)]
    assert error(torch.cat(found), expected.losses[0]) < 1e-9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--each",), "--each is of one call; expected it without --stream"),
        (("--tokens", 12), "--tokens is of one call"),
        (("--chunk", POSITIONS), f"make windows of {POSITIONS + 6} tokens"),
        (("--batch", 0), "batch"),
    ],
)
def test_refused(arguments: tuple[object, ...], message: str) -> None:
    assert message in bench(*arguments, "--no-memory", code=2).err


def test_sizes_of_a_stream_need_one() -> None:
    done = tintc("bench", source_directory(), "--chunk", 4)
    assert done.code == 2
    assert "--chunk is of a stream; expected --stream beside it" in done.err
