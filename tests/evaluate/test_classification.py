"""The experiment as a whole: resumed, in any batch, on random labels; and its arithmetic."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.small import auxiliary, write_task
from tintc.evaluate.classification import run
from tintc.evaluate.judgement import correctness, label_likelihoods, quality, summary
from tintc.evaluate.learners import Simulated
from tintc.evaluate.lessons import Scores
from tintc.evaluate.settings import Settings, method, parse_budget
from tintc.evaluate.statistics import paired_p_value
from tintc.evaluate.store import Store
from tintc.ir.errors import InputError, UsageError

ROWS = ["unmodified", "dynamic evaluation", "simulator", "simulator, ascent"]
IN_CONTEXT = "unmodified, in context"


def settings(root: Path, **changes: Any) -> Settings:
    base = Settings(
        tasks=("sst2",),
        shots=(0, 4),
        seeds=(1, 2),
        rates=(1e-3, 1e-2),
        budgets=("12x1", "6x2"),
        limit=10,
        choosing=6,
    )
    return replace(base, data_dir=root, **changes)


def timeless(report: dict[str, Any]) -> Any:
    """The report without seconds."""
    if isinstance(report, dict):
        return {name: timeless(value) for name, value in report.items() if name != "seconds"}
    return [timeless(value) for value in report] if isinstance(report, list) else report


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_task(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def report(root: Path) -> dict[str, Any]:
    return run(auxiliary(), settings(root), Store(None, {}))


@pytest.mark.slow
def test_every_row_with_its_settings(report: dict[str, Any]) -> None:
    assert [(result["task"], result["shots"]) for result in report["results"]] == [
        ("sst2", 0),
        ("sst2", 4),
    ]
    for result, last, seeds in zip(report["results"], ("context", "labels"), (1, 2), strict=True):
        rows = {row["name"]: row for row in result["rows"]}
        assert list(rows) == [
            ROWS[0],
            *([IN_CONTEXT] if seeds == 2 else []),
            *ROWS[1:],
            f"simulator, shuffled {last}",
        ]
        for row in rows.values():
            assert row["n"] == 10 and len(row["per_seed"]) == seeds and len(row["right"]) == 10
            assert (row["standard_error"] is None) == (seeds == 1)
            assert (
                row["accuracy"]
                == pytest.approx(sum(row["per_seed"]) / seeds)
                == pytest.approx(sum(row["right"]) / 10)
            )
            assert row["control"] == ("simulator, " in row["name"])
        simulator, ascent, shuffled = result["rows"][-3:]
        assert ascent["rate"] == -simulator["rate"] < 0 and shuffled["rate"] == simulator["rate"]
        assert {row["budget"] for row in result["rows"][-4:]} == {
            simulator["budget"]
        }  # of dynamic evaluation too
        assert (
            rows["unmodified"]["p_unmodified"] is None
            and rows["dynamic evaluation"]["p_dynamic_evaluation"] is None
        )
        assert simulator["p_unmodified"] == paired_p_value(
            simulator["right"], rows["unmodified"]["right"]
        )
        assert simulator["p_dynamic_evaluation"] == paired_p_value(
            simulator["right"], rows["dynamic evaluation"]["right"]
        )
        assert (simulator["p_in_context"] is None) == (seeds == 1)
    assert {row["budget"] for row in report["results"][0]["rows"]} == {
        None,
        "12x1",
    }  # zero-shot only the first is tried
    assert len({row["calibrated"] for row in report["results"][0]["rows"]}) == 1
    assert report["results"][1]["demonstrations"] == [4, 4]
    assert [(row["shots"], row["tasks"], row["n"]) for row in report["averages"]] == [
        (0, 1, 10)
    ] * 5 + [(4, 1, 10)] * 6
    for result, shots in zip(report["results"], (0, 4), strict=True):
        of_all = {row["name"]: row for row in report["averages"] if row["shots"] == shots}
        for row in result["rows"]:  # one task: the average is the task
            assert (
                of_all[row["name"]]["accuracy"] == row["accuracy"]
                and of_all[row["name"]]["p_unmodified"] == row["p_unmodified"]
            )


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_the_batch_changes_nothing(root: Path, report: dict[str, Any], batch: int) -> None:
    assert timeless(run(auxiliary(), settings(root, batch=batch), Store(None, {}))) == timeless(
        report
    )


def test_a_second_run_computes_nothing(root: Path, tmp_path: Path, report: dict[str, Any]) -> None:
    path = tmp_path / "results.jsonl"
    first = Store(path, {})
    told = run(auxiliary(), settings(root), first)
    assert first.computed > 0 and timeless(told) == timeless(report)
    again = Store(path, {})
    assert run(auxiliary(), settings(root, batch=2), again) == told  # seconds too: they are stored
    assert again.computed == 0


@pytest.mark.slow  # by default: that of a stream, in test_stream_runs.py
@pytest.mark.parametrize("killed_at", [3, 20])
def test_a_run_that_was_killed_goes_on(
    root: Path, tmp_path: Path, report: dict[str, Any], killed_at: int
) -> None:
    path = tmp_path / "results.jsonl"

    def die(text: str, done: int, total: int) -> None:
        if done == killed_at:
            raise KeyboardInterrupt

    first, second = Store(path, {}), Store(path, {})
    with pytest.raises(KeyboardInterrupt):
        run(auxiliary(), settings(root), first, die)
    second = Store(path, {})
    assert timeless(run(auxiliary(), settings(root), second)) == timeless(report)
    whole = Store(None, {})
    run(auxiliary(), settings(root), whole)
    assert first.computed > 0 and first.computed + second.computed == whole.computed


@pytest.mark.parametrize("form", ["sequence", "separate"])
@pytest.mark.slow
def test_progress_counts_to_the_end(root: Path, form: Any) -> None:
    seen: list[tuple[int, int]] = []
    run(
        auxiliary(),
        settings(root, form=form),
        Store(None, {}),
        lambda text, done, total: seen.append((done, total)),
    )
    assert [done for done, _ in seen] == list(range(len(seen))) and seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("form", ["sequence", "separate"])
@pytest.mark.parametrize("loss", ["label", "context"])
def test_random_labels_give_no_significant_gain(tmp_path: Path, form: Any, loss: Any) -> None:
    """What is chosen is chosen on training data, so a choice among many settings finds nothing on
    the test items.
    """
    root = write_task(tmp_path, train=60, test=80, seed=3)
    chosen = settings(
        root, form=form, loss=loss, shots=(4,), limit=80, choosing=16, rates=(1e-4, 1e-3, 1e-2)
    )
    rows = {
        row["name"]: row for row in run(auxiliary(), chosen, Store(None, {}))["results"][0]["rows"]
    }
    gain = rows["simulator"]["accuracy"] - rows["unmodified"]["accuracy"]
    assert gain <= 0 or rows["simulator"]["p_unmodified"] > 0.05


def test_nothing_is_chosen_on_test_items(
    tmp_path: Path, root: Path, report: dict[str, Any]
) -> None:
    other = tmp_path / "sst2"
    other.mkdir()
    for split in ("train", "test"):
        lines = [
            json.loads(line) for line in (root / "sst2" / f"{split}.jsonl").read_text().splitlines()
        ]
        if split == "test":
            lines = [{**line, "label": 1 - line["label"]} for line in lines]
        (other / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flipped = run(auxiliary(), settings(tmp_path), Store(None, {}))
    for before, after in zip(report["results"], flipped["results"], strict=True):
        for row, turned in zip(before["rows"], after["rows"], strict=True):
            for name in ("rate", "budget", "calibrated", "choosing_accuracy"):
                assert row[name] == turned[name]
            assert turned["accuracy"] == pytest.approx(1 - row["accuracy"])


@pytest.mark.slow
def test_a_given_rate_is_not_chosen(root: Path) -> None:
    result = run(auxiliary(), settings(root, inner_lr=0.005, shots=(4,)), Store(None, {}))[
        "results"
    ][0]
    assert {abs(row["rate"]) for row in result["rows"] if row["rate"]} == {0.005}


def test_two_presets_are_two_rows(root: Path) -> None:
    found = run(
        auxiliary(),
        settings(root, presets=("paper", "exact"), shots=(4,), seeds=(1,)),
        Store(None, {}),
    )["results"][0]["rows"]
    names = [row["name"] for row in found if not row["control"]]
    assert names == [ROWS[0], IN_CONTEXT, ROWS[1], "simulator (paper)", "simulator (exact)"]


def test_demonstrations_that_do_not_fit(root: Path) -> None:
    few = run(
        auxiliary(), settings(root, form="sequence", shots=(30,), seeds=(1,)), Store(None, {})
    )["results"][0]["demonstrations"]
    assert 0 < few[0] < 30
    with pytest.raises(InputError, match="no demonstration of sst2 fits in 16 tokens"):
        run(auxiliary(), settings(root, tokens=16, form="sequence"), Store(None, {}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tasks": ()}, "tasks are none"),
        ({"tasks": ("amazon", "amazon_sentences")}, "each once, by whatever name"),
        ({"tasks": ("imdb",)}, "unknown task 'imdb'"),
        ({"shots": (-1,)}, "shots are -1"),
        ({"seeds": (1, 1)}, "seeds are 1, 1"),
        ({"loss": "all"}, "loss is 'all'; expected one of label, context"),
        ({"form": "tree"}, "form is 'tree'; expected one of sequence, separate"),
        ({"rates": (0.0,)}, "an inner learning rate is 0.0"),
        ({"rates": ()}, "rates are none"),
        ({"inner_lr": math.nan}, "an inner learning rate is nan"),
        ({"budgets": ("24x1",)}, "a budget is '24x1'"),
        ({"budgets": ("12",)}, "a budget is '12'"),
        ({"presets": ("best",)}, "preset is 'best'"),
        ({"choosing": 1}, "choosing is 1"),
        ({"batch": 0}, "batch is 0"),
        ({"limit": 1}, "limit is 1"),
        ({"changes": {"schedule": "1,0.5"}}, "schedule has 2 factors; expected one for each of"),
        ({"changes": {"nesterov": True}}, "nesterov without momentum"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Settings(**changes)


def test_budgets_scale_to_the_depth() -> None:
    assert parse_budget("3x4") == (3, 4)
    scaled = [method("simulator", "paper", budget, 1e-4, 30) for budget in ("12x1", "6x2", "3x4")]
    assert [(one.layers, one.steps) for one in scaled] == [(30, 1), (15, 2), (8, 4)]
    assert method("simulator", "paper", "3x4", 1e-4, 2).layers == 1


def test_rates_follow_the_number_of_layers_unless_they_are_given() -> None:
    chosen = Settings()
    whole, quarter = chosen.rates_for(32, "12x1"), chosen.rates_for(32, "3x4")
    assert quarter == pytest.approx([rate * 16 for rate in whole])
    assert (
        chosen.rates_for(0, "12x1")
        != whole
        != replace(chosen, loss="context").rates_for(32, "12x1")
    )
    assert replace(chosen, rates=(0.1, 0.01)).rates_for(32, "3x4") == (0.01, 0.1)
    assert replace(chosen, rates=(0.1, 0.01), inner_lr=0.5).rates_for(32, "3x4") == (0.5,)


def test_calibration_takes_off_what_the_domain_gives() -> None:
    scores = Scores([[-1.0, -2.0], [-1.0, -4.0]], [[-1.0, -3.0], [-1.0, -3.0]])
    assert correctness(scores, [1, 1], False).tolist() == [0, 0]
    assert correctness(scores, [1, 1], True).tolist() == [1, 0]
    np.testing.assert_allclose(np.exp(label_likelihoods(scores, True)).sum(-1), 1)
    np.testing.assert_allclose(
        label_likelihoods(scores, True)[0], np.log([1 / (1 + math.e), math.e / (1 + math.e)])
    )


def test_numbers_that_are_not_finite_are_wrong() -> None:
    scores = Scores([[math.nan, -1.0], [-1.0, -2.0]], [[0.0, 0.0]] * 2)
    assert correctness(scores, [0, 0], False).tolist() == [0, 1] and correctness(
        scores, [1, 0], False
    ).tolist() == [0, 1]
    assert quality(scores, [0, 0], False) == (0.5, -math.inf)


def test_a_summary_over_seeds_and_items() -> None:
    found = summary(np.array([[1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]))
    assert found["accuracy"] == 0.5 and found["per_seed"] == [0.75, 0.25] and found["n"] == 4
    assert found["standard_error"] == pytest.approx(0.25)
    assert found["item_standard_error"] == pytest.approx(np.std([1, 0, 0.5, 0.5], ddof=1) / 2)


def test_rules_go_with_every_budget() -> None:
    """A list of factors has to fit the steps; what `train` selects takes the place of layers."""
    Settings(changes={"schedule": "cosine", "momentum": 0.5})
    Settings(budgets=("12x2", "6x2"), changes={"schedule": "1,0.5"})
    trained = Settings(budgets=("6x2",), changes={"train": "*.fc1.*"})
    one = method("simulator", "paper", "6x2", 1e-4, 4, trained.changes)
    learner = one.learner(auxiliary())
    assert isinstance(learner, Simulated)
    config = learner.simulator.config
    assert (config.train, config.layers, config.steps) == (("*.fc1.*",), None, 2)
