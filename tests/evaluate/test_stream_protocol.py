"""The streaming experiment: its numbers against autograd and torch.optim in float64
(tests/oracle/streaming.py), bytes, curves and intervals.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from tests.support.artifacts import TEXT, source_directory
from tests.support.streams import (
    CHUNK,
    CONTEXT,
    DOCUMENTS,
    RATE,
    SEA,
    SETTINGS,
    auxiliary,
    by_autograd,
    by_name,
    huggingface,
    numbers,
    passages,
    run,
    settings,
    total,
)
from tintc.compiler.casts import no_casts
from tintc.evaluate import stream
from tintc.evaluate.language import DYNAMIC, SHUFFLED, SIMULATOR, UNMODIFIED, Run
from tintc.evaluate.speed.benchmark import updated_parameters
from tintc.evaluate.store import Store
from tintc.evaluate.stream_documents import Passage, longest
from tintc.evaluate.stream_learners import autograd_stream, shuffled
from tintc.evaluate.stream_rows import Measured, rows_of
from tintc.ir.config import SimulatorConfig
from tintc.runtime.windows import IGNORED, Fresh, window

RULE: dict[str, Any] = {"momentum": 0.9, "schedule": "linear", "decay": 0.1}
LEARNERS = {
    UNMODIFIED: {"inner_lr": 0.0},
    f"{SIMULATOR} (exact)": {"inner_lr": RATE},
    f"{DYNAMIC} (all of norms)": {"inner_lr": RATE},
    f"{SIMULATOR} (exact), gradient ascent": {"inner_lr": -RATE},
}


@pytest.mark.parametrize("keys", ["recompute", "cache"])
def test_rows_are_those_of_an_independent_loop(keys: str) -> None:
    chosen = settings(keys=keys, steps=2, changes=RULE)
    rows, documents = by_name(run(chosen)), [each.ids_N for each in passages()]
    expected = {
        name: SimulatorConfig.exact(steps=2, **RULE, **fields) for name, fields in LEARNERS.items()
    }
    expected[f"{DYNAMIC} (shifts of norms)"] = SimulatorConfig.exact(
        steps=2, norm_update="bias", inner_lr=RATE, **RULE
    )
    if keys == "recompute":
        expected[f"{SIMULATOR} (paper)"] = SimulatorConfig.paper(steps=2, inner_lr=RATE, **RULE)
    found = {
        name: total(by_autograd(config, documents, keys=keys)) for name, config in expected.items()
    }
    for name, nll in found.items():
        assert rows[name]["nll"] == pytest.approx(nll, rel=1e-8), name
        assert rows[name]["targets"] == sum(len(each) - 1 for each in documents)
        assert rows[name]["perplexity"] == pytest.approx(math.exp(nll / rows[name]["targets"]))
    start, after = (rows[n] for n in (UNMODIFIED, f"{SIMULATOR} (exact)"))
    gain = start["perplexity"] - after["perplexity"]
    assert after["change"] == pytest.approx(-100 * gain / start["perplexity"])
    assert after["gain"] == pytest.approx(gain)
    assert abs(gain) > 1
    for preset, norms in (("exact", "all"), ("paper", "shifts")):
        one, other = rows[f"{SIMULATOR} ({preset})"], rows[f"{DYNAMIC} ({norms} of norms)"]
        assert one.get("share") == (
            pytest.approx(one["gain"] / other["gain"]) if other["gain"] > 0 else None
        )


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.slow
def test_variants_have_the_first_preset_and_moments_of_their_own(optimizer: str) -> None:
    """A momentum, which is everyone's but adam's."""
    chosen = settings(
        variants=(optimizer,), controls=False, inner_lr=0.001, changes={"momentum": 0.9}
    )
    row = by_name(run(chosen))[f"{SIMULATOR} (exact, {optimizer})"]
    fields = {} if optimizer == "adam" else {"momentum": 0.9}
    config = SimulatorConfig.exact(optimizer=optimizer, inner_lr=0.001, **fields)
    assert row["config"] == config.to_dict()
    expected = total(by_autograd(config, [each.ids_N for each in passages()]))
    assert row["nll"] == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("batch", [1, 2])
def test_without_a_reset_weights_go_on_in_each_row(batch: int) -> None:
    chosen = settings(reset="never", batch=batch, limit=None, presets=("exact",), changes=RULE)
    rows, documents = by_name(run(chosen)), [each.ids_N for each in passages(4)]
    config = SimulatorConfig.exact(inner_lr=RATE, **RULE)
    expected = sum(
        total(by_autograd(config, documents[row::batch], reset="never")) for row in range(batch)
    )
    for name in (f"{SIMULATOR} (exact)", DYNAMIC):
        assert rows[name]["nll"] == pytest.approx(expected, rel=1e-8)


@pytest.mark.slow
def test_the_shuffled_control_scores_as_usual_and_trains_on_other_order() -> None:
    (passage,) = passages(1)
    config = SimulatorConfig.exact(inner_lr=RATE)
    model = huggingface()
    weights = {name: value.detach().clone() for name, value in model.named_parameters()}
    trained = updated_parameters(auxiliary().simulator(config))
    ids, expected = passage.ids_N, 0.0
    for s in range(1, len(ids), CHUNK):
        e = min(s + CHUNK, len(ids))
        context = ids[max(0, s - 1 - CONTEXT) : s]
        logits = _logits(weights, torch.cat([context, ids[s : e - 1]]))[len(context) - 1 :]
        expected += float(F.cross_entropy(logits, ids[s:e], reduction="sum"))
        mixed = shuffled(window([context], [Fresh(ids[s:e], begins=False)]))
        labels = mixed.labels[0][mixed.labels[0] != IGNORED]
        assert sorted(labels.tolist()) == sorted(ids[s:e].tolist())
        assert sorted(mixed.input_ids[0, : len(context)].tolist()) == sorted(context.tolist())
        leaves = {name: weights[name].requires_grad_() for name in trained}
        logits = _logits(weights, mixed.input_ids[0])[len(context) - 1 :]
        loss = F.cross_entropy(logits, labels, reduction="sum")
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for name, gradient in zip(trained, gradients, strict=True):
            weights[name] = weights[name].detach() - RATE * (0 if gradient is None else gradient)
    found = stream.Experiment(auxiliary(), SETTINGS, Store(None, {}), lambda *_: None).measure(
        Run(SHUFFLED, config, shuffled=True), [passage], ""
    )
    assert math.fsum(found[0]["losses"]) == pytest.approx(expected, rel=1e-8)


def _logits(weights: dict[str, Tensor], ids: Tensor) -> Tensor:
    with no_casts():
        found = torch.func.functional_call(huggingface(), weights, (ids[None],))
    logits: Tensor = found.logits[0]
    return logits


def test_weights_and_flags_are_put_back_also_after_an_error() -> None:
    learner = auxiliary().dynamic_evaluation(SimulatorConfig.exact(inner_lr=RATE))
    simulator, ids = learner.simulator, passages(1)[0].ids_N
    before = {name: value.detach().clone() for name, value in simulator.prefix.tensors().items()}
    flags = [parameter.requires_grad for parameter in simulator.parameters()]

    def interrupted() -> None:
        with autograd_stream(simulator, SETTINGS.cut, learner.rule) as found:
            found.step(ids[None, : CHUNK + 1])
            row = found.row
            assert any(not torch.equal(w, row.before[name]) for name, w in row.weights.items())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(torch.equal(w, before[name]) for name, w in simulator.prefix.tensors().items())
    assert [parameter.requires_grad for parameter in simulator.parameters()] == flags


def test_an_order_depends_on_the_tokens_of_its_window_alone() -> None:
    first, other = torch.arange(9), torch.arange(20, 32)
    alone = shuffled(window([first[:4]], [Fresh(first[4:], begins=False)]))
    both = shuffled(
        window(
            [other[:2], first[:4]],
            [Fresh(other[2:9], begins=False), Fresh(first[4:], begins=False)],
        )
    )
    assert both.input_ids[1, both.valid[1]].tolist() == alone.input_ids[0].tolist()
    begins = shuffled(window([first[:0]], [Fresh(first[:2], begins=True)]))
    assert begins.input_ids.tolist() == [[0]] and begins.labels.tolist() == [[1]]


def test_batches_change_nothing() -> None:
    expected = numbers(run(settings(presets=("exact",))))
    assert numbers(run(settings(presets=("exact",), batch=2))) == expected


class TestBytes:
    def test_with_a_bos_every_byte_counts(self) -> None:
        row, data = run()["rows"][0], run()["data"]
        kept = [text for text in DOCUMENTS if text != DOCUMENTS[1]]
        size = sum(len(text.encode()) for text in kept)
        assert sum(len(text) for text in kept) < size
        assert row["bits_per_byte"] == pytest.approx(row["nll"] / math.log(2) / size)
        assert data["first_token_counts"] and [d["number"] for d in data["documents"]] == [0, 2, 3]

    def test_of_the_scored_tokens_of_a_cut_document(self) -> None:
        (passage,) = longest(auxiliary().tokenizer, [(2, SEA)], 1, 30)
        shown = auxiliary().tokenizer.decode(passage.ids_N, skip_special_tokens=True)
        assert len(passage.ids_N) == 30 and SEA.startswith(shown)
        assert passage.bytes == len(shown.encode()) > len(shown)

    def test_without_a_bos_the_first_token_does_not_count(self) -> None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source_directory())
        tokenizer.add_bos_token = False
        (passage,) = longest(tokenizer, [(0, TEXT)], 1, None)
        first = tokenizer.decode(passage.ids_N[:1])
        assert passage.first_is_text
        assert passage.bytes == len(TEXT.encode()) - len(first.encode())


def test_a_curve_adds_up_and_its_interval_is_over_documents() -> None:
    row = by_name(run())[f"{SIMULATOR} (exact)"]
    curve = row["curve"]
    assert [part["first"] for part in curve[1:]] == [part["last"] + 1 for part in curve[:-1]]
    assert sum(part["targets"] for part in curve) == row["targets"]
    nll = sum(part["targets"] * math.log(part["after"]) for part in curve)
    assert nll == pytest.approx(row["nll"])
    assert curve[-1]["last"] == max(each.targets for each in passages())
    whole = curve[-1]["up_to"]
    assert whole["change"] == pytest.approx(row["change"])
    assert whole["change_interval"] == pytest.approx(row["change_interval"])
    low, high = row["change_interval"]
    assert low < row["change"] < high


def test_intervals_of_known_numbers() -> None:
    """Two documents whose losses change by -1 and by +0.5 a token: the bootstrap draws both, or one
    of them twice.
    """
    two = [
        Passage(number, "", torch.zeros(1 + 2 * CHUNK, dtype=torch.int64), 10, True)
        for number in range(2)
    ]
    before = Measured("a", Run(UNMODIFIED), [{"losses": [10.0, 10.0], "seconds": 0}] * 2)
    changed = [{"losses": [5.0, 5.0], "seconds": 0}, {"losses": [12.5, 12.5], "seconds": 0}]
    after = Measured("b", Run(SIMULATOR, SimulatorConfig()), changed)
    (_, row) = rows_of([before, after], two, SETTINGS)
    assert row["change"] == pytest.approx(100 * math.expm1(-0.25))
    expected = [100 * math.expm1(-1), 100 * math.expm1(0.5)]
    assert row["change_interval"] == pytest.approx(expected)
    gains = [math.exp(2) - math.exp(2.5), math.exp(2) - math.exp(1)]
    assert row["gain_interval"] == pytest.approx(gains)
    alone = rows_of(
        [dataclasses.replace(each, results=each.results[:1]) for each in (before, after)],
        two[:1],
        SETTINGS,
    )
    assert all(map(math.isnan, alone[1]["change_interval"]))
