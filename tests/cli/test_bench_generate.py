"""tintc bench --generate: its document, its tables, what it counts and what it refuses."""

from typing import Any

import pytest
import torch

from tests.support.artifacts import POSITIONS, source_directory
from tests.support.command import Finished, tintc
from tests.support.every import model_of
from tests.support.models import tokens
from tintc.compiler.driver import compile as compile_model
from tintc.evaluate.speed import generation
from tintc.evaluate.speed.bandwidth import bytes_read
from tintc.ir.config import SimulatorConfig
from tintc.runtime.adapted import Adapted

SMALL = ("--generate", "--tokens", 8, "--new-tokens", 4, "--batch", 2, "--pairs", 1)


def bench(*arguments: object, code: int = 0) -> Finished:
    done = tintc("bench", source_directory(), *SMALL, "--inner-lr", 0.01, *arguments)
    assert done.code == code, done.err
    return done


def test_document_and_tables() -> None:
    facts = bench("--json", "--dtype", "float64", "--momentum", 0.5).document
    assert facts["check"]["difference"] <= 1e-8 and facts["rule"] == {"momentum": 0.5}
    for part, count, others in (("alone", 1, ["unmodified"]), ("beside", 2, ["loop", "own_loop"])):
        found = facts[part]
        assert set(found["seconds"]) == {"ours", *others} and found["adapt_seconds"] > 0
        for name in others:
            speed = found["tokens_per_second"]
            assert found[f"times_{name}"] == pytest.approx(speed["ours"] / speed[name])
            assert speed[name] == pytest.approx(count * 4 / found["seconds"][name][0])
    memory = facts["bandwidth"]
    assert memory["share"] == memory["bytes_per_second"] / memory["copy_bytes_per_second"]
    shown = " ".join(bench().out.split())
    assert "4 tokens behind 8, greedily" in shown and "a loop, updated weights loaded" in shown


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("form", ["weights", "factors"])
def test_bytes_are_those_of_what_is_read(name: str, form: Any) -> None:
    """Every matrix, gain and bias once; of tables that are only looked up in, nothing."""
    model = model_of(name)
    simulator = compile_model(model, SimulatorConfig.exact(inner_lr=0.01, layers=1))
    ids = tokens(1, 9, 28, seed=3) + 1
    adapted = simulator.adapt(ids, torch.ones_like(ids), form=form)
    looked_up = {"llama": ("model.embed_tokens.weight",), "gpt2": ("transformer.wpe.weight",)}
    size = 8 * sum(
        value.numel()
        for parameter, value in model.named_parameters()
        if parameter not in looked_up[name]
        or (model.config.tie_word_embeddings and "embed" in parameter)
    )
    tables = sum(t.nbytes for n, t in simulator.prefix.tensors().items() if n.startswith("tintc."))
    factors = 0
    if form == "factors":
        names = {
            n for n in adapted.updates.values if n.rpartition("/")[2] in ("keys", "values", "rates")
        }
        factors = sum(adapted.updates.values[n].nbytes for n in names)
        assert factors
    assert size + factors <= bytes_read(adapted) <= size + factors + tables


def test_generate_is_the_one_that_one_would_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides generate as many tokens, the same ones."""
    seen: list[torch.Tensor] = []

    def watched(model: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
        found = greedy(model, ids, count)
        seen.append(found if isinstance(model, Adapted) else found.clone())
        return found

    greedy = generation.greedy
    monkeypatch.setattr(generation, "greedy", watched)
    bench("--dtype", "float64")
    assert all(found.shape[1] == 12 for found in seen)
    ours, first, second = seen[-5], seen[-4], seen[-3]
    assert len(ours) == 2 and torch.equal(ours, torch.cat([first, second]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--each",), "--each is of one call; expected it without --generate"),
        (("--stream",), "--stream and --generate are measured apart"),
        (("--new-tokens", POSITIONS), f"generated ones are more than the {POSITIONS}"),
        (("--new-tokens", 0), "new_tokens is 0; expected at least 1"),
    ],
)
def test_refused(arguments: tuple[object, ...], message: str) -> None:
    assert message in bench(*arguments, code=2).err


def test_its_options_alone() -> None:
    done = tintc("bench", source_directory(), "--new-tokens", 4)
    assert done.code == 2 and "expected --generate beside it" in done.err
