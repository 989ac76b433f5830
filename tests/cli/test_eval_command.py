"""`tintc eval` as a user meets it: tables, files, resumption, and one clear line for what cannot
be.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.artifacts import POSITIONS, source_directory
from tests.support.command import tintc
from tintc.evaluate.store import Store

WORDS = ("river", "town", "hill", "sea", "road", "bridge", "field", "mill")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "walk.txt"
    path.write_text(
        " ".join(f"The {WORDS[i % 8]} lies behind the {WORDS[i * 3 % 7]}." for i in range(120)),
        encoding="utf-8",
    )
    return path


def lm(text: Path, *more: object) -> Any:
    small = (
        "--tokens",
        16,
        "--limit",
        2,
        "--choosing",
        2,
        "--train-fraction",
        "0.5",
        "--seeds",
        "1,2",
    )
    return tintc("eval", "lm", source_directory(), "--data", text, *small, *more)


@pytest.mark.slow
def test_a_table_for_people_and_one_document_for_machines(text: Path) -> None:
    shown = lm(text)
    assert shown.code == 0, shown
    for words in (
        "unmodified model",
        "dynamic evaluation",
        "gradient ascent",
        "shuffled tokens",
        "n = 4 sequences of 16 tokens",
        "seeds 1, 2",
    ):
        assert words in shown.out
    assert "nothing was kept: -o DIR" in shown.err
    report = lm(text, "--json", "-q").document
    assert [row["learner"] for row in report["rows"]][:3] == [
        "unmodified model",
        "dynamic evaluation",
        "simulator",
    ]
    assert report["command"].startswith("tintc eval lm ") and report["machine"]["torch"]


@pytest.mark.slow
def test_results_are_kept_and_a_second_run_computes_nothing(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    first = lm(text, "-o", folder, "--json").document
    assert sorted(path.name for path in folder.iterdir()) == [
        "plot.png",
        "report.json",
        "report.md",
        "units.jsonl",
    ]
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "report.json").read_text())["rows"] == first["rows"]
    written = (folder / "report.md").read_text()
    assert "| 0.5 | unmodified model |" in written and first["command"] in written
    again = lm(text, "-o", folder, "--batch", 2, "--json").document
    assert again["rows"] == first["rows"]
    assert again["units"]["computed"] == 0 and first["units"]["found"] == 0


def test_an_interruption_says_how_to_go_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = Store.put

    def interrupted(self: Store, *given: Any) -> Any:
        if self.computed == 3:
            raise KeyboardInterrupt
        return put(self, *given)

    monkeypatch.setattr(Store, "put", interrupted)
    stopped = lm(text, "-o", tmp_path / "results")
    assert stopped.code == 130 and stopped.out == ""
    assert (
        "3 results of this run are kept in" in stopped.err and "error: interrupted" in stopped.err
    )
    monkeypatch.setattr(Store, "put", put)
    assert lm(text, "-o", tmp_path / "results", "--json").document["units"]["found"] >= 3


def test_a_given_rate_is_not_chosen(text: Path) -> None:
    report = lm(text, "--inner-lr", "1e-3", "--preset", "paper,exact", "--json").document
    assert {row["inner_lr"] for row in report["rows"]} == {None, 1e-3, -1e-3}
    assert report["data"]["choosing_sequences"] == 0
    assert [
        row["norm_update"] for row in report["rows"] if row["learner"] == "dynamic evaluation"
    ] == ["bias", "all"]


def test_any_field_of_the_config_is_over_every_preset(text: Path) -> None:
    more = ("--inner-lr", "1e-3", "--norm-update", "all", "--attention-gradient", "full")
    rows = lm(text, *more, "--json").document["rows"]
    found = [row["config"] for row in rows if row["config"] is not None]
    assert {(c["norm_update"], c["attention_gradient"], c["norm_gradient"]) for c in found} == {
        ("all", "full", "first_order")
    }


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--train-fraction", "1.5"), "a fraction to train on is 1.5; expected a number"),
        (
            ("--train-fraction", "half"),
            "fractions are '0.5,half'; expected numbers with commas between them",
        ),
        (("--seeds", "1,x"), "seeds are '1,2,1,x'; expected whole numbers"),
        (("--preset", "best"), "preset is 'best'"),
        (("--tokens", POSITIONS + 1), f"this model takes {POSITIONS}"),
        (("--layers", 7), "layers is 7"),
        (("--steps", 0), "steps is 0"),
        (("--device", "tpu"), "device is 'tpu'"),
        (("--dtype", "int8"), "dtype is 'int8'"),
    ],
)
def test_bad_options(text: Path, more: tuple[object, ...], message: str) -> None:
    assert message in lm(text, *more).refused(2)


def test_bad_data(text: Path, tmp_path: Path) -> None:
    assert "there is no file" in lm(tmp_path / "none.txt").refused(2)
    short = tmp_path / "short.txt"
    short.write_text("One day.", encoding="utf-8")
    assert "expected at least one sequence of 16" in lm(short).refused(2)
    assert "the evaluated text itself" in lm(text, "--choose", text).refused(2)
    assert "--inner-lr 0.001 leaves nothing to choose" in lm(
        text, "--choose", text, "--inner-lr", "1e-3"
    ).refused(2)


def test_bad_outputs(text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    assert "cannot be a directory for results" in lm(text, "-o", tmp_path / "file").refused(2)
    assert (tmp_path / "file").read_text() == "mine"
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "units.jsonl").write_text("mine\n")
    assert "is no result of an earlier run" in lm(text, "-o", folder).refused(2)
    assert (folder / "units.jsonl").read_text() == "mine\n"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of one task, in the layout that --data-dir wants."""
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "sst2").mkdir()
    for split, count in (("train", 16), ("test", 6)):
        lines = (
            json.dumps({"text": f"A {WORDS[i % 8]} of the {split} {i}", "label": i % 2})
            for i in range(count)
        )
        (folder / "sst2" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def classify(tasks: Path, *more: object) -> Any:
    few = (
        "--shots",
        "0,2",
        "--limit",
        4,
        "--choosing",
        4,
        "--seeds",
        "1,2",
        "--budgets",
        "12x1",
        "--rates",
        "1e-3",
    )
    return tintc(
        "eval", "classify", source_directory(), "--task", "sst2", "--data-dir", tasks, *few, *more
    )


@pytest.mark.slow
def test_classification_is_shown_kept_and_resumed(tasks: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    shown = classify(tasks, "-o", folder)
    assert shown.code == 0, shown
    for words in (
        "SST-2",
        "average",
        "dynamic evaluation",
        "simulator, ascent",
        "shuffled labels",
        "n = 4 test items",
        "seeds 1, 2",
    ):
        assert words in shown.out
    assert sorted(path.name for path in folder.iterdir()) == [
        "plot.png",
        "report.json",
        "report.md",
        "units.jsonl",
    ]
    again = classify(tasks, "-o", folder, "--batch", 2, "--json").document
    assert again["units"]["computed"] == 0
    kept = json.loads((folder / "report.json").read_text())
    assert kept["results"] == again["results"] and [
        result["shots"] for result in again["results"]
    ] == [0, 2]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--task", "sst3"), "unknown task 'sst3'"),
        (("--form", "pairs"), "form is 'pairs'"),
        (("--loss", "all"), "loss is 'all'"),
        (("--budgets", "12"), "a budget is '12'"),
        (("--shots", "-1"), "expected 0 or more demonstrations"),
        (("--rates", "0"), "expected a number above 0"),
        (("--limit", 0), "limit is 0"),
    ],
)
def test_bad_classification_options(tasks: Path, more: tuple[object, ...], message: str) -> None:
    assert message in classify(tasks, *more).refused(2)


def test_bad_task_data(tasks: Path, tmp_path: Path) -> None:
    assert "has no data of the task sst2" in classify(tmp_path).refused(2)
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "train.jsonl").write_text('{"text": "One"}\n')
    assert "train.jsonl, line 1" in classify(tmp_path).refused(2)


def ablate(text: Path, *more: object) -> Any:
    small = (
        "--tokens",
        16,
        "--limit",
        2,
        "--choosing",
        1,
        "--error-sequences",
        1,
        "--only",
        "paper,attention-value",
    )
    return tintc("ablate", source_directory(), "--data", text, *small, *more)


@pytest.mark.slow
def test_an_ablation_is_shown_kept_and_resumed(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "results"
    shown = ablate(text, "-o", folder)
    assert shown.code == 0, shown
    for words in (
        "what each approximation costs",
        "exact",
        "attention-value",
        "paper",
        "n = 2 sequences of 16 tokens",
    ):
        assert words in shown.out
    assert sorted(path.name for path in folder.iterdir()) == [
        "plot.png",
        "report.json",
        "report.md",
        "units.jsonl",
    ]
    again = ablate(text, "-o", folder, "--json").document
    assert (
        again["units"]["computed"] == 0
        and again["rows"] == json.loads((folder / "report.json").read_text())["rows"]
    )
    assert [row["variant"] for row in again["rows"]] == ["exact", "attention-value", "paper"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--only", "best"), "no variant is called 'best'"),
        (("--tokens", 2), "tokens is 2"),
        (("--tokens", POSITIONS + 1), f"this model takes {POSITIONS}"),
        (("--limit", 0), "limit is 0"),
        (("--batch", 0), "batch 0"),
        (("--layers", 0), "layers is 0"),
    ],
)
def test_bad_ablation_options(text: Path, more: tuple[object, ...], message: str) -> None:
    assert message in ablate(text, *more).refused(2)


@pytest.mark.slow
def test_rules(text: Path) -> None:
    """Of everyone; what is chosen is said beside the rate, and the rest below the table."""
    rule = ("--steps", 2, "--schedule", "linear", "--lr-scale", "*.bias=2", "--lr-scale", "*.0.*=0")
    given = ("--inner-lr", "1e-3", "--clip-norm", 1)
    report = lm(text, *rule, *given, "--json").document
    found = [row["rule"] for row in report["rows"] if row["rule"] is not None]
    expected = {
        "schedule": "linear",
        "lr_scale": {"*.bias": 2.0, "*.0.*": 0.0},
        "clip_norm": 1.0,
    }
    assert found == [expected] * 4
    shown = lm(text, *rule, "--momentums", "0.5", "--decays", "0,.1")
    assert ", momentum 0.5, decay 0" in shown.out
    words = "sgd, lr_scale *.bias=2 *.0.*=0, schedule linear"
    assert words in " ".join(shown.out.split())
    message = "and momentums are to be chosen from; expected --inner-lr none, as the rate is"
    assert message in lm(text, "--momentums", "0,.9", "--inner-lr", "1e-3").refused(2)
