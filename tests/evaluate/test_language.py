"""The language-modelling experiment: its numbers against a loop written out, its protocol, its
resumption, and a case without any gain.
"""

import copy
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.oracle.reference import reference
from tests.support.models import opt, tokens
from tintc.evaluate import language
from tintc.evaluate.auxiliary import Auxiliary
from tintc.evaluate.language import (
    ASCENT,
    DYNAMIC,
    SIMULATOR,
    UNMODIFIED,
    Piece,
    Settings,
    shuffled_sequences,
)
from tintc.evaluate.store import Store
from tintc.evaluate.tables import lm_table
from tintc.evaluate.text import Text, draw
from tintc.ir import rule_values
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import InputError, UsageError

VOCAB, LENGTH = 29, 12


class Letters:
    """A tokenizer: one token a letter."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") for letter in text]}


def letters(seed: int, count: int) -> Text:
    return Text(
        f"letters {seed}",
        "".join(chr(ord("a") + token) for token in (tokens(1, count, 26, seed)[0]).tolist()),
    )


def auxiliary(model: nn.Module | None = None) -> Auxiliary:
    return _usual() if model is None else Auxiliary(model, tokenizer=Letters())


@lru_cache(maxsize=1)
def _usual() -> Auxiliary:
    return Auxiliary(opt(), tokenizer=Letters())


SETTINGS = Settings(
    fractions=(0.5,), tokens=LENGTH, limit=2, choosing=3, seeds=(1, 2), presets=("exact",)
)
TEXT, OTHER = letters(1, 10 * LENGTH + 5), letters(2, 4 * LENGTH)


def run(
    settings: Settings = SETTINGS,
    store: Store | None = None,
    whole: Auxiliary | None = None,
    **options: Any,
) -> dict[str, Any]:
    return language.run(
        whole or auxiliary(), TEXT, OTHER, settings, store or Store(None, {}), **options
    )


def by_learner(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["learner"]: row for row in report["rows"]}


def numbers(report: dict[str, Any]) -> Any:
    """The report without its times."""
    rows = [
        {key: value for key, value in row.items() if key != "seconds"} for row in report["rows"]
    ]
    return {**report, "rows": rows, "settings": {**report["settings"], "batch": None}}


def test_perplexities_are_those_of_a_loop_written_out() -> None:
    model, rows = opt(), by_learner(run(Settings(**{**vars(SETTINGS), "inner_lr": 0.03})))
    drawn = draw(10, 2, (1, 2))
    ids = torch.tensor(Letters()(TEXT.text)["input_ids"])[: 10 * LENGTH].view(10, LENGTH)[
        sorted(drawn)
    ]
    train = (torch.arange(LENGTH) < 6).long().expand(4, -1)
    for name, rate in ((UNMODIFIED, None), (SIMULATOR, 0.03), (DYNAMIC, 0.03), (ASCENT, -0.03)):
        found = reference(model, SimulatorConfig.exact(inner_lr=rate or 0.0), ids, train)
        loss = F.cross_entropy(found.logits[:, 5:-1].flatten(0, 1), ids[:, 6:].flatten())
        assert rows[name]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
        assert rows[name]["n"] == 4 and rows[name]["inner_lr"] == rate
    start = rows[UNMODIFIED]["perplexity"]
    assert rows[SIMULATOR]["change"] == pytest.approx(
        100 * (rows[SIMULATOR]["perplexity"] / start - 1)
    )
    assert rows[SIMULATOR]["share"] == (
        pytest.approx(1.0, rel=1e-5) if rows[DYNAMIC]["change"] < 0 else None
    )


def test_the_shuffled_control_trains_on_other_order_and_predicts_the_sequence_alone() -> None:
    model, item = opt(), Piece(tokens(1, LENGTH, VOCAB, 3)[0], 7)
    given, labels = shuffled_sequences([item], 6)
    config = SimulatorConfig.exact(inner_lr=0.05)
    found = auxiliary(model).simulated(config).losses(given, labels)
    mixed = given.input_ids[:, :6]
    assert (
        sorted(mixed[0].tolist()) == sorted(item.ids_T[:6].tolist())
        and mixed[0].tolist() != item.ids_T[:6].tolist()
    )
    trained = copy.deepcopy(model)
    trained.load_state_dict(reference(model, config, mixed, torch.ones_like(mixed)).states[0])
    log_p = trained(item.ids_T[None]).logits[0].log_softmax(-1)
    expected = -log_p.detach()[torch.arange(5, LENGTH - 1), item.ids_T[6:]].sum()
    assert float(found.sum()) == pytest.approx(float(expected), abs=1e-8)


def test_rates_are_chosen_on_other_text_and_nothing_on_the_evaluated_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[str, int]] = []
    measure = language.Experiment.measure

    def spy(self: Any, run: Any, fraction: float, items: list[Piece], label: str) -> Any:
        seen.append((label, len(items)))
        evaluated = {item.ids_T.numpy().tobytes() for item in items if "choosing" not in label}
        chosen_on = {item.ids_T.numpy().tobytes() for item in items if "choosing" in label}
        whole = torch.tensor(Letters()(TEXT.text)["input_ids"])[: 10 * LENGTH].view(10, LENGTH)
        assert all(piece.numpy().tobytes() not in chosen_on for piece in whole) and len(
            evaluated
        ) in (0, 4)
        return measure(self, run, fraction, items, label)

    monkeypatch.setattr(language.Experiment, "measure", spy)
    report = run()
    assert sum(count == 3 for _, count in seen) > 4
    assert (
        report["data"]["chosen_on_sha256"] == OTHER.sha256
        and report["data"]["choosing_sequences"] == 3
    )


def test_without_other_text_the_first_quarter_is_kept_for_choosing() -> None:
    report = language.run(
        auxiliary(), TEXT, None, Settings(**{**vars(SETTINGS), "limit": None}), Store(None, {})
    )
    assert report["data"]["choosing_sequences"] == 2 and report["data"]["sequences"] == 8
    with pytest.raises(InputError, match="the evaluated text itself"):
        language.run(auxiliary(), TEXT, Text("again", TEXT.text), SETTINGS, Store(None, {}))


@pytest.mark.slow
def test_batches_change_nothing_and_the_numbers_come_twice() -> None:
    whole = auxiliary()
    first = numbers(run(whole=whole))
    assert numbers(run(whole=whole)) == first
    assert numbers(run(Settings(**{**vars(SETTINGS), "batch": 3}), whole=whole)) == first


def test_a_killed_run_goes_on_and_computes_nothing_twice(tmp_path: Path) -> None:
    whole, expected = auxiliary(), Store(None, {})
    report = run(store=expected, whole=whole)

    class Killed(BaseException):
        pass

    def kill(_: str, done: int, __: int) -> None:
        if done >= 12:
            raise Killed

    path = tmp_path / "units.jsonl"
    with pytest.raises(Killed):
        run(store=Store(path, {}), whole=whole, progress=kill)
    kept = len(path.read_text().splitlines())
    again = Store(path, {})
    assert numbers(run(store=again, whole=whole)) == numbers(report)
    assert 0 < kept < expected.computed and again.computed == expected.computed - kept
    last = Store(path, {})
    assert (
        run(store=last, whole=whole) == run(store=Store(path, {}), whole=whole)
        and last.computed == 0
    )


@pytest.mark.slow
def test_where_nothing_can_be_learned_the_gain_is_not_significant() -> None:
    model = opt(dtype=torch.float32)
    # every token has the same probability, and random tokens are not predicted better by any other
    # guess
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight[:] *= 1e-3
    text, other = letters(3, 80 * LENGTH), letters(4, 20 * LENGTH)
    settings = Settings(fractions=(0.5,), tokens=LENGTH, limit=20, choosing=16, seeds=(1, 2, 3))
    rows = by_learner(language.run(auxiliary(model), text, other, settings, Store(None, {})))
    assert rows[SIMULATOR]["n"] == 60
    assert rows[SIMULATOR]["p_value"] > 0.05 or rows[SIMULATOR]["change"] > 0
    assert rows[DYNAMIC]["p_value"] > 0.05 or rows[DYNAMIC]["change"] > 0
    assert abs(rows[SIMULATOR]["change"]) < 1


def test_where_something_can_be_learned_it_is_and_ascent_makes_it_worse() -> None:
    pairs = ["abcdefghijklmnopqrstuvwxyz"[i : i + 2] for i in range(25)] * 2
    text = Text(
        "pairs", "".join(pair * (LENGTH // 2) for pair in pairs)
    )  # each sequence repeats two letters of its own
    settings = Settings(**{**vars(SETTINGS), "limit": 5, "presets": ("paper",)})
    rows = by_learner(language.run(auxiliary(), text, None, settings, Store(None, {})))
    assert (
        rows[SIMULATOR]["change"] < -5
        and rows[SIMULATOR]["p_value"] < 0.01
        and rows[SIMULATOR]["share"] > 0.3
    )
    assert rows[ASCENT]["change"] > 0


def test_a_diverging_rate_is_reported_as_not_finite() -> None:
    rows = by_learner(run(Settings(**{**vars(SETTINGS), "inner_lr": 1e200})))
    assert rows[SIMULATOR]["perplexity"] == math.inf and math.isnan(rows[SIMULATOR]["p_value"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fractions": (1.0,)}, "a fraction to train on is 1.0; expected a number between 0 and 1"),
        ({"fractions": (0.5, 0.5)}, "none of them twice"),
        ({"fractions": (0.01,)}, "trains on 1 of 12 tokens"),
        ({"seeds": ()}, "at least one value"),
        ({"tokens": 17}, "this model takes 16"),
        ({"tokens": 2}, "tokens is 2; expected at least 4"),
        ({"limit": 0}, "limit is 0"),
        ({"batch": 0}, "batch is 0"),
        ({"presets": ("best",)}, "preset is 'best'"),
        ({"layers": 9}, "layers is 9"),
        ({"inner_lr": math.nan}, "inner_lr is nan"),
        ({"momentums": (0.5, 0.5)}, "none of them twice"),
        ({"momentums": (0.5, 1.0)}, "momentum is 1.0; expected a number from 0 to below 1"),
        ({"decays": (0.5,), "inner_lr": 0.1}, "inner_lr is 0.1 and decays are to be chosen"),
        ({"decays": (0.5,), "changes": {"decay": 0.1}}, "decay and decays are both given"),
        ({"momentums": (0.5,), "changes": {"optimizer": "adam"}}, "momentum and optimizer adam"),
        ({"changes": {"schedule": (1.0, 0.5)}}, "schedule has 2 factors"),
    ],
)
def test_bad_settings(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run(Settings(**{**vars(SETTINGS), **changes}))


def test_a_text_that_is_too_short() -> None:
    with pytest.raises(InputError, match="expected at least one for each of 2 seeds"):
        language.run(auxiliary(), letters(1, 2 * LENGTH), None, SETTINGS, Store(None, {}))


RULED = Settings(
    **{
        **vars(SETTINGS),
        "steps": 2,
        "changes": {"clip_norm": 0.5, "schedule": (1.0, 0.5), "lr_scale": ("*.bias=0.5",)},
    }
)
RULE = {"clip_norm": 0.5, "schedule": [1.0, 0.5], "lr_scale": {"*.bias": 0.5}}


def test_a_rule_is_everyones_and_is_named() -> None:
    """Dynamic evaluation by autograd follows it, and the table says it."""
    report = run(Settings(**{**vars(RULED), "inner_lr": 0.05, "limit": 1}))
    rows = by_learner(report)
    assert rows[DYNAMIC]["rule"] == rows[SIMULATOR]["rule"] == RULE
    assert rows[UNMODIFIED]["rule"] is None
    (note, _) = lm_table(report).notes
    rule = "sgd, lr_scale *.bias=0.5, schedule 1 0.5, clip_norm 0.5"
    assert f"2 steps, all blocks, {rule}. The learning rate" in note
    config = SimulatorConfig.exact(inner_lr=0.05, steps=2, **RULE)
    whole = torch.tensor(Letters()(TEXT.text)["input_ids"])[: 10 * LENGTH].view(10, LENGTH)
    masks = (torch.arange(LENGTH) < LENGTH // 2).long().expand(10, LENGTH)
    after = reference(opt(), config, whole, masks).logits.log_softmax(-1)
    losses = -after[:, LENGTH // 2 - 1 : -1].gather(-1, whole[:, LENGTH // 2 :, None]).mean((1, 2))
    drawn = list(draw(10, 1, (1, 2)))
    expected = math.exp(losses[drawn].mean())
    assert rows[DYNAMIC]["perplexity"] == pytest.approx(expected, rel=1e-7)  # kept rounded


@pytest.mark.slow
def test_momentum_and_decay_are_chosen_as_the_rate_is() -> None:
    """For each learner the best of all at their best rates, on the choosing text."""
    store = Store(None, {})
    settings = Settings(**{**vars(SETTINGS), "steps": 2, "momentums": (0.0, 0.9)})
    settings = Settings(**{**vars(settings), "decays": (0.0, 1.0)})
    report = run(settings, store)
    rows = by_learner(report)
    # a decay of 1 takes every step back: nothing is gained
    assert "decay" not in rows[DYNAMIC]["rule"]
    found = {}
    for momentum in (0.0, 0.9):
        changes = {"momentum": momentum}
        alone = Settings(**{**vars(settings), "momentums": (), "decays": (), "changes": changes})
        one = by_learner(run(alone))
        found[momentum] = (one[DYNAMIC]["inner_lr"], one[DYNAMIC]["perplexity"])
    chosen = rows[DYNAMIC]["rule"].get("momentum", 0.0)
    assert (rows[DYNAMIC]["inner_lr"], rows[DYNAMIC]["perplexity"]) == found[chosen]
    cell = next(row[2] for row in lm_table(report).rows if row[1] == DYNAMIC)
    assert cell == f"{rows[DYNAMIC]['inner_lr']:g}, momentum {chosen:g}, decay 0"


def test_results_of_plain_sgd_are_kept_under_what_they_always_were() -> None:
    config = SimulatorConfig.exact(steps=2)
    old = {name: value for name, value in config.to_dict().items() if name not in rule_values.RULE}
    assert language.Run(SIMULATOR, config).unit == {"learner": SIMULATOR, "config": old}
    kept = ("layers", "steps", "norm_update", "inner_lr")
    plain = {name: old[name] for name in kept}
    assert language.Run(DYNAMIC, config).unit == {"learner": DYNAMIC, "config": plain}
    ruled = language.Run(DYNAMIC, SimulatorConfig.exact(steps=2, decay=0.5)).unit
    assert ruled == {"learner": DYNAMIC, "config": {**plain, "decay": 0.5}}
