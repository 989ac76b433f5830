"""Tasks and their data: reading what is good, refusing what is not, and dividing it without
overlap.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tintc.evaluate.draws import balanced, divide, in_random_order, with_shuffled_labels
from tintc.evaluate.examples import read_split
from tintc.evaluate.hub_rows import Access, HubSplit
from tintc.evaluate.tasks import Example, find_task, load_tasks
from tintc.ir.errors import InputError, UsageError

GOOD = '{"text": "fine", "label": 1}\n'


def folder(root: Path, name: str, lines: str, task: Any = None) -> Path:
    (root / name).mkdir()
    (root / name / "train.jsonl").write_text(lines, encoding="utf-8")
    if task is not None:
        (root / name / "task.json").write_text(
            task if isinstance(task, str) else json.dumps(task), encoding="utf-8"
        )
    return root


def examples(count: int, labels: int = 2, prefix: str = "text") -> list[Example]:
    return [Example(f"{prefix} {index}", index % labels) for index in range(count)]


def test_seven_tasks_with_two_templates_each() -> None:
    tasks = load_tasks()
    assert list(tasks) == ["sst2", "mr", "cr", "mpqa", "amazon", "agnews", "subj"]
    for task in tasks.values():
        assert len(task.templates) >= 2 and len(task.hub.values) == len(task.labels)
        for template in task.templates:
            assert len(set(template.words)) == len(task.labels)
            assert (
                template.context("what {text} is").count("what {text} is") == 1
                and template.domain in template.answer
            )


def test_aliases_and_unknown_tasks() -> None:
    assert (
        find_task("amazon_sentences") is not None and find_task("amazon_sentences").name == "amazon"
    )
    assert find_task("SST-2").name == "sst2"
    with pytest.raises(
        UsageError,
        match="unknown task 'imdb'; expected one of sst2, mr, cr, mpqa, amazon, agnews, subj",
    ):
        find_task("imdb")


def test_reads_a_directory_by_its_alias(tmp_path: Path) -> None:
    found = read_split(
        find_task("amazon"),
        "train",
        folder(tmp_path, "amazon_sentences", GOOD + "\n" + '{"text": " bad ", "label": 0}'),
    )
    assert found == [Example("fine", 1), Example("bad", 0)]


def test_only_newlines_end_a_line(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three"
    root = folder(
        tmp_path, "mr", json.dumps({"text": text, "label": 0}, ensure_ascii=False) + "\r\n"
    )
    assert read_split(find_task("mr"), "train", root) == [Example(text, 0)]


def test_label_names_in_another_order_renumber(tmp_path: Path) -> None:
    root = folder(
        tmp_path,
        "subj",
        '{"text": "a", "label": 0}\n',
        {"label_names": ["Objective", "subjective"]},
    )
    assert read_split(find_task("subj"), "train", root) == [Example("a", 1)]


def test_label_names_of_other_words_keep_their_numbers(tmp_path: Path) -> None:
    root = folder(tmp_path, "mr", GOOD, {"label_names": ["rotten", "fresh"]})
    assert read_split(find_task("mr"), "train", root) == [Example("fine", 1)]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (GOOD + "{", "train.jsonl, line 2 is no JSON"),
        (GOOD + "[1]", "line 2 is a list; expected an object"),
        (GOOD + '{"text": "a"}', "line 2 is an object with text; expected an object"),
        ('{"text": "", "label": 0}', "line 1 has the text ''; expected a text that is not empty"),
        ('{"text": 3, "label": 0}', "line 1 has the text 3"),
        (
            '{"text": "a", "label": 2}',
            "line 1 has the label 2; expected a whole number from 0 to 1",
        ),
        ('{"text": "a", "label": true}', "line 1 has the label True"),
        ('{"text": "a", "label": "positive"}', "line 1 has the label 'positive'"),
        ("\n", "train.jsonl is empty"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, lines: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        read_split(find_task("sst2"), "train", folder(tmp_path, "sst2", lines))


@pytest.mark.parametrize(
    "task", [{"label_names": ["one"]}, {"label_names": "ab"}, {}, "[]", "{"], ids=str
)
def test_bad_label_names_are_refused(tmp_path: Path, task: Any) -> None:
    with pytest.raises(InputError, match=r"task\.json"):
        read_split(find_task("sst2"), "train", folder(tmp_path, "sst2", GOOD, task))


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a directory called sst2 or sst-2"):
        read_split(find_task("sst2"), "train", tmp_path)
    with pytest.raises(InputError, match=r"test\.jsonl cannot be read"):
        read_split(find_task("sst2"), "test", folder(tmp_path, "sst2", GOOD))


def test_the_hub_is_asked_for_the_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def columns(split: HubSplit, names: list[str], access: Access) -> list[list[Any]]:
        asked.append((split.path, split.split, names))
        return [["Good ", "x"], ["buy it", "y"], [1, -1]]

    monkeypatch.setattr(HubSplit, "columns", columns)
    assert read_split(find_task("amazon"), "test") == [Example("Good buy it", 1)]  # -1 is no label
    assert asked == [("fancyzhx/amazon_polarity", "test", ["title", "content", "label"])]


def test_division_is_disjoint_and_the_same_for_each_call() -> None:
    train, test = examples(80), [*examples(50, prefix="test"), Example("text 3", 1)]
    data = divide([*train, Example("text 5", 1)], test, 2, choose=12, limit=20)
    assert data == divide([*train, Example("text 5", 1)], test, 2, choose=12, limit=20)
    parts = [{example.text for example in part} for part in (data.pool, data.choosing, data.test)]
    assert [len(part) for part in parts] == [67, 12, 20]  # of 80 training texts one is a test text
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert "text 3" not in parts[0] | parts[1]
    assert Counter(example.label for example in data.choosing) == {0: 6, 1: 6}
    assert [example for example in test if example.text in parts[2]] == list(data.test)
    assert len(divide(train, test, 2, choose=12, limit=None).test) == 51


def test_too_little_training_data() -> None:
    with pytest.raises(InputError, match="expected more training examples of every label"):
        divide(
            [Example("a", 0), Example("b", 0), Example("c", 0)],
            examples(4, prefix="test"),
            2,
            choose=2,
            limit=None,
        )


def test_draws_are_balanced_and_follow_the_seed() -> None:
    pool = examples(90, labels=3)
    drawn = balanced(pool, 10, 3, 1)
    assert len(set(drawn)) == 10 and drawn == balanced(pool, 10, 3, 1) != balanced(pool, 10, 3, 2)
    for count in range(11):
        found = Counter(example.label for example in drawn[:count])
        assert (
            max(found.values(), default=0) - min((found[label] for label in range(3)), default=0)
            <= 1
        )


def test_a_label_that_runs_out_is_passed_over() -> None:
    pool = [Example("only", 1), *(Example(f"a {index}", 0) for index in range(9))]
    assert Counter(example.label for example in balanced(pool, 6, 2, 1)) == {0: 5, 1: 1}
    assert len(balanced(pool, 99, 2, 1)) == 10


def test_orders_and_shuffled_labels() -> None:
    drawn = examples(16)
    assert in_random_order(drawn, 1) != drawn and sorted(
        in_random_order(drawn, 1), key=str
    ) == sorted(drawn, key=str)
    shuffled = with_shuffled_labels(drawn, 1)
    assert [example.text for example in shuffled] == [example.text for example in drawn]
    assert shuffled != drawn and Counter(e.label for e in shuffled) == Counter(
        e.label for e in drawn
    )
