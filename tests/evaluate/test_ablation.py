"""Update errors and task performance of a grid of approximations, against Hugging Face models,
torch.autograd and plain SGD.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracle.reference import reference
from tests.support.families import FAMILIES
from tests.support.models import opt, simulate, tokens
from tests.support.tolerances import UPDATE_COSINE_HALF
from tintc.evaluate import ablation_plot
from tintc.evaluate.ablation import Settings, run
from tintc.evaluate.ablation_grid import SCALES, Variant, grid, select
from tintc.evaluate.ablation_rows import same_step
from tintc.evaluate.auxiliary import Auxiliary
from tintc.evaluate.choice import rate
from tintc.evaluate.store import Store
from tintc.evaluate.tables import ablate_table
from tintc.evaluate.update_errors import OUTSIDE, slot_kinds
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import InputError, UsageError

VOCAB, LENGTH = 29, 24
CHOOSE, EVALUATE = tokens(2, LENGTH, VOCAB, seed=1), tokens(4, LENGTH, VOCAB, seed=2)
TRAINED = (torch.arange(LENGTH) < LENGTH // 2).long()


@lru_cache(maxsize=1)
def model() -> Any:
    """Of an activation that finite differences do not get right by chance, as they would ReLU's."""
    return opt(vocab=VOCAB, positions=LENGTH, activation="gelu")


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes half a second in a process as large as this one, and there is nothing to let go of:
    see `Patient`.
    """
    monkeypatch.setattr(gc, "collect", lambda: 0)


class Patient(Auxiliary):
    """Its simulators stay, since lowering them takes most of the time here."""

    def forget_simulators(self) -> None:
        pass


@lru_cache(maxsize=4)
def auxiliary(dtype: torch.dtype) -> Auxiliary:
    return Patient(
        opt(vocab=VOCAB, positions=LENGTH, activation="gelu", dtype=dtype), tokenizer=object()
    )


def fail(dtype: torch.dtype) -> Auxiliary:
    raise AssertionError(f"a model in {dtype} was asked for, though all results were there")


def ablate(
    *only: str,
    store: Store | None = None,
    factory: Any = auxiliary,
    progress: Any = None,
    **settings: Any,
) -> dict[str, Any]:
    store = store or Store(None, {})
    more = {} if progress is None else {"progress": progress}
    return run(
        factory,
        CHOOSE,
        EVALUATE,
        Settings(only=only, **{"inner_lr": 0.01, **settings}),
        store,
        **more,
    )


def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["variant"]: row for row in report["rows"]}


@lru_cache(maxsize=1)
def in_float64() -> dict[str, dict[str, Any]]:
    """Rows of what is compared with float64 references below."""
    return rows(
        ablate(
            "attention-value",
            "norm-n*",
            "activation-n*",
            "loss-*",
            "norm-update-bias",
            "paper",
            dtype=torch.float64,
        )
    )


def variants() -> dict[str, Variant]:
    return {variant.name: variant for variant in grid(SimulatorConfig(), torch.float64)}


def changes(config: SimulatorConfig, ids_T: Tensor) -> dict[str, Tensor]:
    """Parameter -> what a step at rate 1 takes away, of the parameters of the blocks and the final
    norm; zero for what is left alone.
    """
    at_one = SimulatorConfig.from_dict({**config.to_dict(), "inner_lr": 1.0})
    state = reference(model(), at_one, ids_T[None], TRAINED[None]).states[0]
    names = [
        name
        for name, _ in model().named_parameters()
        if ".layers." in name or "decoder.final_layer_norm" in name
    ]
    return {name: model().state_dict()[name] - state[name] for name in names}


def expected_errors(config: SimulatorConfig, *parts: str) -> list[float]:
    """[cosine, relative error, length] of the parameters with one of `parts` in their names: means
    over the sequences of errors.
    """
    found = []
    for ids_T in EVALUATE[:2]:
        u, g = (
            torch.cat(
                [
                    x.flatten()
                    for name, x in changes(c, ids_T).items()
                    if any(part in name for part in parts)
                ]
            )
            for c in (config, SimulatorConfig.exact())
        )
        cosine = float(u @ g / (u.norm() * g.norm())) if bool(u.any()) else 0.0
        found.append((cosine, float((u - g).norm() / g.norm()), float(u.norm() / g.norm())))
    return [sum(values) / 2 for values in zip(*found, strict=True)]


def errors(row: dict[str, Any]) -> list[float]:
    return [row["cosine"], row["relative_error"], row["length"]]


@pytest.mark.slow
def test_exact_has_the_exact_gradient() -> None:
    row = rows(ablate("exact"))["exact"]
    assert row["cosine"] == pytest.approx(1, abs=1e-9)
    assert row["min_cosine"] == pytest.approx(1, abs=1e-9)
    assert 0 < row["relative_error"] < 1e-6  # float32


@pytest.mark.parametrize(
    "name",
    [
        "attention-value",
        "norm-n10",
        "activation-n10",
        "loss-quadratic",
        "norm-update-bias",
        "paper",
    ],
)
@pytest.mark.slow
def test_errors_are_those_of_autograd(name: str) -> None:
    """Value attention is autograd with constant probabilities; the others likewise
    (tests/oracle/reference.py). Of all parameters, and of each block. Exact gradients are kept in
    float32."""
    row, config = in_float64()[name], variants()[name].config
    assert errors(row) == pytest.approx(expected_errors(config, ""), rel=2e-6)
    for block in ("0", "1"):
        assert errors(row["layers"][block]) == pytest.approx(
            expected_errors(config, f".layers.{block}."), rel=2e-6
        )
    assert row["mean_cosine"] == pytest.approx(
        (row["layers"]["0"]["cosine"] + row["layers"]["1"]["cosine"]) / 2
    )
    assert row["min_cosine"] == min(row["layers"][block]["cosine"] for block in ("0", "1"))


@pytest.mark.parametrize("name", ["norm-n10", "attention-value"])
@pytest.mark.slow
def test_errors_by_kind_of_parameter(name: str) -> None:
    names = {
        "query_key": ("q_proj", "k_proj"),
        "value_output": ("v_proj", "out_proj"),
        "feed_forward": ("fc1", "fc2"),
        "norm": ("norm",),
    }
    for kind, parts in names.items():
        assert errors(in_float64()[name]["kinds"][kind]) == pytest.approx(
            expected_errors(variants()[name].config, *parts), rel=2e-6
        )


def test_what_is_not_updated_counts_as_zero() -> None:
    queries = in_float64()["attention-value"]["kinds"]["query_key"]
    assert queries == {"cosine": 0, "relative_error": 1, "length": 0}


@pytest.mark.parametrize("kind", ["norm", "activation"])
def test_first_order_errors_shrink_with_the_scale(kind: str) -> None:
    """By a factor of 10 with N, until they are below what float32 keeps of the gradient they are
    compared with.
    """
    found = [in_float64()[f"{kind}-n{scale}"]["relative_error"] for scale in SCALES]
    assert all(later < earlier / 5 for earlier, later in itertools.pairwise(found))


@pytest.mark.slow
def test_half_precision_keeps_the_direction() -> None:
    """Updates are taken at a rate that makes weights, and so their rounding, small beside them."""
    report = rows(ablate("exact-*"))
    for name, limit in (("exact-bfloat16", 0.999), ("exact-float16", 0.99999)):
        assert limit > UPDATE_COSINE_HALF
        assert limit < report[name]["cosine"] < 1 - 1e-9
    assert report["exact-float16"]["cosine"] > report["exact-bfloat16"]["cosine"]
    assert report["exact-bfloat16"]["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ["exact", "paper", "loss-mean-embedding"])
def test_perplexity_is_that_of_plain_sgd(name: str) -> None:
    """Of the untrained half, under weights that each sequence's own first half gave."""
    config = SimulatorConfig.from_dict({**variants()[name].config.to_dict(), "inner_lr": 0.01})
    expected = reference(model(), config, EVALUATE, TRAINED.expand_as(EVALUATE))
    half, row = LENGTH // 2, in_float64()[name]
    losses = [
        F.cross_entropy(
            logits[:, half - 1 : -1].flatten(0, 1), EVALUATE[:, half:].flatten(), reduction="none"
        )
        .view(4, -1)
        .mean(1)
        for logits in (expected.initial_logits, expected.logits)
    ]
    before, after = losses
    assert row["perplexity_before"] == pytest.approx(math.exp(before.mean()), rel=1e-7)
    assert row["perplexity"] == pytest.approx(math.exp(after.mean()), rel=1e-7)
    assert row["change"] == pytest.approx(100 * (math.exp((after - before).mean()) - 1), rel=1e-6)
    assert row["error"] == pytest.approx(
        100 * math.exp((after - before).mean()) * float((after - before).std()) / 2, rel=1e-5
    )


def comparable(report: dict[str, Any]) -> dict[str, Any]:
    """Without the times."""
    return {**report, "rows": [{**row, "seconds": 0} for row in report["rows"]]}


@pytest.mark.slow
def test_a_second_run_computes_nothing(tmp_path: Path) -> None:
    first = ablate("attention-value", inner_lr=None, store=Store(tmp_path / "units.jsonl", {}))
    store = Store(tmp_path / "units.jsonl", {})
    again = ablate("attention-value", inner_lr=None, store=store, factory=fail)
    assert again == first
    assert store.computed == 0 and store.found > 0


@pytest.mark.slow
def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    whole = Store(None, {})
    expected = ablate("paper", "exact-bfloat16", inner_lr=None, store=whole)
    computed = 0
    for turn in range(3):
        calls = itertools.count()

        def kill(
            text: str, done: int, total: int, calls: Any = calls, last: int = 5 * (turn + 1)
        ) -> None:
            if next(calls) == last:
                raise KeyboardInterrupt

        store = Store(tmp_path / "units.jsonl", {})
        with pytest.raises(KeyboardInterrupt):
            ablate("paper", "exact-bfloat16", inner_lr=None, store=store, progress=kill)
        computed += store.computed
    store = Store(tmp_path / "units.jsonl", {})
    assert comparable(ablate("paper", "exact-bfloat16", inner_lr=None, store=store)) == comparable(
        expected
    )
    assert 0 < store.computed < whole.computed
    assert computed + store.computed == whole.computed  # nothing twice


@pytest.mark.slow
def test_batches_change_nothing() -> None:
    found = [rows(ablate("attention-value", inner_lr=None, batch=batch)) for batch in (1, 3)]
    for name, row in found[0].items():
        other = found[1][name]
        assert row["n"] == other["n"] == len(EVALUATE)
        assert row["inner_lr"] == other["inner_lr"]
        assert row["perplexity"] == pytest.approx(other["perplexity"], rel=1e-6)
        assert row["layers"] == other["layers"]


def test_a_batch_is_no_part_of_a_unit(tmp_path: Path) -> None:
    store = Store(tmp_path / "units.jsonl", {})
    first = ablate("exact", store=store, batch=1)
    assert (
        ablate("exact", store=Store(tmp_path / "units.jsonl", {}), batch=4, factory=fail) == first
    )


def test_progress_ends_at_the_total() -> None:
    calls: list[tuple[str, int, int]] = []
    ablate("paper", "exact-bfloat16", inner_lr=None, progress=lambda *call: calls.append(call))
    assert all(done <= total for _, done, total in calls)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert calls[-1][1] == calls[-1][2]


def test_a_given_rate_is_not_chosen() -> None:
    texts: list[str] = []
    found = ablate("paper", inner_lr=0.003, progress=lambda text, *_: texts.append(text))
    assert {row["inner_lr"] for row in found["rows"]} == {0.003}
    assert not any("choosing" in text for text in texts)


def test_chosen_rates_are_the_best_tried() -> None:
    """Each variant has its own, half an octave from which the loss on the sequences to choose on is
    no lower.
    """
    chosen = rows(ablate("loss-quadratic", inner_lr=None))["loss-quadratic"]["inner_lr"]
    store = Store(None, {})

    def loss(inner_lr: float) -> float:
        settings = Settings(only=("loss-quadratic",), inner_lr=inner_lr, error_sequences=0)
        return float(
            rows(run(auxiliary, CHOOSE, CHOOSE, settings, store))["loss-quadratic"]["perplexity"]
        )

    k = min(range(-60, 40), key=lambda k: abs(math.log(rate(k) / chosen)))
    assert loss(chosen) < loss(rate(k + 1)) and loss(chosen) < loss(rate(k - 1))


def test_a_search_starts_at_a_step_of_the_same_length() -> None:
    assert same_step(1e-4, 1.0) == 1e-4
    assert same_step(1e-4, 4.0) == rate(-4) == 2.5e-5
    assert same_step(1e-4, 0.0) == same_step(1e-4, math.nan) == 1e-4


def test_without_errors_only_performance_is_measured(tmp_path: Path) -> None:
    report = ablate("paper", error_sequences=0)
    assert rows(report)["paper"]["cosine"] is None and rows(report)["paper"]["layers"] == {}
    assert rows(report)["paper"]["perplexity"] > 0
    ablation_plot.plot(report, tmp_path / "plot.png")


def test_what_diverges_has_no_finite_change(tmp_path: Path) -> None:
    report = ablate("paper", "exact-float16", inner_lr=1e30)
    assert math.isinf(rows(report)["exact-float16"]["perplexity"])
    ablation_plot.plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_top_layers_and_steps() -> None:
    """Errors are of one step whatever the performance is of; blocks below the trained ones have
    none.
    """
    found = ablate("paper", base=SimulatorConfig(layers=1, steps=2), dtype=torch.float64)
    assert list(rows(found)["paper"]["layers"]) == ["1", OUTSIDE]
    config = SimulatorConfig.exact(layers=1, steps=2, inner_lr=0.01)
    logits = reference(model(), config, EVALUATE, TRAINED.expand_as(EVALUATE)).logits[
        :, LENGTH // 2 - 1 : -1
    ]
    loss = F.cross_entropy(logits.flatten(0, 1), EVALUATE[:, LENGTH // 2 :].flatten())
    assert rows(found)["exact"]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-7)
    assert rows(found)["exact"]["cosine"] == pytest.approx(1, abs=1e-9)


@pytest.mark.slow
def test_a_rule_changes_what_is_gained_and_no_error_of_the_gradient() -> None:
    rule = {"momentum": 0.9, "schedule": (1.0, 0.5), "clip_norm": 0.01, "decay": 0.1}
    base = SimulatorConfig.exact(steps=2, **rule)
    report = ablate("attention-value", base=base)
    found, plain = (
        rows(report),
        rows(ablate("attention-value", base=SimulatorConfig.exact(steps=2))),
    )
    for name, row in found.items():
        assert errors(row) == errors(plain[name])
        assert row["config"] == plain[name]["config"]
    said = {**rule, "schedule": [1.0, 0.5]}
    assert report["settings"]["rule"] == said
    assert "2 steps, all blocks, sgd, schedule 1 0.5, momentum 0.9" in ablate_table(report).notes[0]


def test_with_train_no_variant_is_about_norms() -> None:
    names = {variant.name for variant in grid(SimulatorConfig.exact(train="*.fc1.*"))}
    assert names == {variant.name for variant in grid(SimulatorConfig.exact())} - {
        "norm-update-bias"
    }


def test_the_grid() -> None:
    found = grid(SimulatorConfig(layers=1, steps=2))
    names = [variant.name for variant in found]
    assert names[0] == "exact" and len(set(names)) == len(names) == 24
    assert all(variant.config.steps == 2 and variant.config.layers == 1 for variant in found)
    assert len({(variant.config, variant.dtype) for variant in found}) == len(
        found
    )  # nothing is measured twice
    by_name = {variant.name: variant for variant in found}
    assert by_name["exact"].config.is_exact and by_name["exact-float16"].dtype == torch.float16
    assert by_name["paper"].config == SimulatorConfig.paper(layers=1, steps=2)
    assert by_name["norm-n10"].config == SimulatorConfig.exact(
        layers=1, steps=2, norm_gradient="first_order", finite_difference_scale=10
    )
    assert "exact-bfloat16" not in [
        variant.name for variant in grid(SimulatorConfig(), torch.bfloat16)
    ]


def test_names_and_patterns_select_variants() -> None:
    found = [variant.name for variant in select(grid(SimulatorConfig()), ["paper", "norm-n*"])]
    assert found == ["exact", *(f"norm-n{scale}" for scale in SCALES), "paper"]
    assert len(select(grid(SimulatorConfig()), [])) == 24


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(UsageError, match=r"'papre'.*attention-value.*paper-float16"):
        ablate("papre", factory=fail)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids_evaluate": EVALUATE[0]}, r"ids_evaluate has shape \(24,\)"),
        ({"ids_choose": CHOOSE[:0], "settings": Settings()}, "0 sequences to choose rates on"),
        ({"ids_evaluate": EVALUATE[:, :3]}, r"\(4, 3\)"),
        ({"settings": Settings(batch=0)}, "batch 0"),
    ],
)
def test_inputs_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    with pytest.raises((InputError, UsageError), match=message):
        run(
            **{
                "auxiliary_factory": fail,
                "ids_choose": CHOOSE,
                "ids_evaluate": EVALUATE,
                "settings": Settings(),
                "store": Store(None, {}),
                **change,
            }
        )


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma2"])
def test_kinds_come_from_the_graph(name: str) -> None:
    """Of q, k and v in one product, of rotary embeddings between, of gated units."""
    simulator = simulate(FAMILIES[name].build(), SimulatorConfig.exact())
    kinds = slot_kinds(simulator.program.graph)
    slots = simulator.program.layout.prefix
    for slot, kind in kinds.items():
        parameter = slots[slot].parameter
        if "norm" in parameter or ".ln_" in parameter:
            assert kind == "norm"
        elif ".c_attn." in parameter:
            width = slots[slot].rows.period // 3
            assert kind == ("value_output" if slots[slot].rows.start == 2 * width else "query_key")
        elif "q_proj" in parameter or "k_proj" in parameter:
            assert kind == "query_key"
        elif "v_proj" in parameter or "o_proj" in parameter or ".attn.c_proj" in parameter:
            assert kind == "value_output"
        elif "mlp" in parameter:
            assert kind == "feed_forward"
    assert {"query_key", "value_output", "feed_forward", "norm"} <= set(kinds.values())


@pytest.mark.slow
def test_the_plot_is_a_png(tmp_path: Path) -> None:
    report = ablate(
        "attention-value", "loss-*", "paper", model={"name": "a model"}, data={"name": "a text"}
    )
    ablation_plot.plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert (tmp_path / "plot.png").stat().st_size > 20_000
    assert json.loads(json.dumps(report)) == report  # JSON values only


def test_a_plot_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"tintc\[plot\]"):
        ablation_plot.plot({"rows": []}, tmp_path / "plot.png")
