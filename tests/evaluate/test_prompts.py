"""Trees of prompts against each prompt alone, on the plain Hugging Face model in float64."""

from dataclasses import replace

import pytest
import torch

from tests.support.small import POSITIONS, auxiliary, fine_tuned, log_likelihood, model, tokenizer
from tintc.evaluate import lessons
from tintc.evaluate.lessons import FewShot, Form, Loss, Scores, ZeroShot, digest
from tintc.evaluate.prompts import Tokens, Tree, Writer, as_sequences, places
from tintc.evaluate.tasks import Example, find_task
from tintc.ir.config import SimulatorConfig

TEXTS = [
    "a dull plot .",
    "warm and funny",
    "it is long , but the music was bright and the cast was warm",
    "flat",
]
SHOWN = [Example("a bright story", 1), Example("it was a flat scene", 0), Example("funny", 1)]
LONG_WORDS = ("quite unbelievably dull", "good")  # of several tokens and of one, in one question


def writer(words: tuple[str, ...] | None = None, longest: int = 40) -> Writer:
    task = find_task("sst2")
    template = task.templates[0] if words is None else replace(task.templates[0], words=words)
    return Writer(tokenizer(), task, template, longest)


def few_shot(
    form: Form, loss: Loss, words: tuple[str, ...] | None = LONG_WORDS, room: int = 60
) -> FewShot:
    """room: so small that prompts take several calls."""
    write = writer(words)
    shown = lessons.demonstrations(write, SHOWN, form, loss)
    prefix = shown[0][0] if form == "sequence" else ()
    return FewShot(shown, prefix, lessons.prompts(write, TEXTS, after_prefix=bool(prefix)), room)


def one_by_one(lesson: FewShot, module: torch.nn.Module) -> Scores:
    asked = lesson.prompts
    texts = [
        [log_likelihood(module, lesson.prefix + context, label) for label in asked.labels]
        for context in asked.contexts
    ]
    domain = [log_likelihood(module, lesson.prefix + asked.domain, label) for label in asked.labels]
    return Scores(texts, [domain] * len(texts))


def assert_same(found: Scores, expected: Scores) -> None:
    for name in ("given_text", "given_domain"):
        pair = (
            torch.tensor(getattr(scores, name), dtype=torch.float64) for scores in (found, expected)
        )
        torch.testing.assert_close(*pair, rtol=0, atol=1e-8)


@pytest.mark.parametrize("words", [None, LONG_WORDS], ids=["one token", "several"])
@pytest.mark.parametrize("form", ["sequence", "separate"])
def test_packed_scores_are_those_of_each_prompt_alone(
    form: Form, words: tuple[str, ...] | None
) -> None:
    lesson = few_shot(form, "label", words)
    assert len(list(lesson._packs())) > 1
    lengths = [len(label) for label in lesson.prompts.labels]
    assert min(lengths) == 1 and (max(lengths) > 2) == (words is not None)
    assert_same(lesson.answer(auxiliary().unmodified(), 1), one_by_one(lesson, model()))


@pytest.mark.parametrize("loss", ["label", "context"])
@pytest.mark.parametrize("form", ["sequence", "separate"])
def test_trained_scores_are_those_of_autograd_and_sgd(form: Form, loss: Loss) -> None:
    lesson = few_shot(form, loss)
    expected = one_by_one(lesson, fine_tuned(list(lesson.demonstrations), 0.02, 2))
    config = SimulatorConfig.exact(steps=2, inner_lr=0.02)
    for learner in (auxiliary().simulated(config), auxiliary().dynamic_evaluation(config)):
        assert_same(lesson.answer(learner, 1), expected)
    untrained = one_by_one(lesson, model())
    assert (
        abs(untrained.given_text[0][0] - expected.given_text[0][0]) > 1e-3
    )  # it is the training that is compared


@pytest.mark.parametrize("batch", [1, 3, 4])
@pytest.mark.parametrize("other", [False, True], ids=["itself", "something else"])
def test_zero_shot_scores_are_those_of_autograd_and_sgd(batch: int, other: bool) -> None:
    write = writer(LONG_WORDS)
    asked = lessons.prompts(write, TEXTS)
    fixed = max(1, len(write.start))
    taught = tuple(
        context[:fixed] + context[:fixed:-1] if other else context for context in asked.contexts
    )
    lesson = ZeroShot(taught, fixed, asked)
    texts, domains = [], []
    for tokens, context in zip(taught, asked.contexts, strict=True):
        module = fine_tuned([(tokens, tuple(range(fixed, len(tokens))))], 0.02, 1)
        texts.append([log_likelihood(module, context, label) for label in asked.labels])
        domains.append([log_likelihood(module, asked.domain, label) for label in asked.labels])
    config = SimulatorConfig.exact(inner_lr=0.02)
    for learner in (auxiliary().simulated(config), auxiliary().dynamic_evaluation(config)):
        assert_same(lesson.answer(learner, batch), Scores(texts, domains))


def test_label_loss_trains_label_words_and_context_loss_the_whole() -> None:
    write = writer(LONG_WORDS)
    for form in ("sequence", "separate"):
        labels, whole = (
            lessons.demonstrations(write, SHOWN, form, loss) for loss in ("label", "context")
        )  # type: ignore[arg-type]
        assert [tokens for tokens, _ in labels] == [tokens for tokens, _ in whole]
        trained = [tokens[target] for tokens, targets in labels for target in targets]
        assert trained == [token for example in SHOWN for token in write.labels[example.label]]
        everything = [
            token for example in SHOWN for token in write.demonstration(example, whole=True)[0]
        ]
        marked = [tokens[target] for tokens, targets in whole for target in targets]
        assert marked == everything  # neither the start nor separators


def test_no_token_is_learnt_from_a_token_of_another_branch() -> None:
    tree = Tree()
    first = tree.add((5, 6, 7), None, (0, 1, 2))
    tree.add((8, 9), None, (0, 1))
    tree.add((3, 4), first, (0, 1))  # grows from the first, but stands after the second
    tree.add((1, 2), 2, (0, 1))  # follows what it grows from
    given = as_sequences([tree])
    assert given.train_mask[0].tolist() == [0, 1, 1, 0, 1, 0, 1, 1, 1]
    assert given.position_ids is not None and given.position_ids[0].tolist() == [
        0,
        1,
        2,
        0,
        1,
        3,
        4,
        5,
        6,
    ]
    assert (
        given.attention_mask is not None
        and given.attention_mask[0, 8].tolist() == [True] * 3 + [False] * 2 + [True] * 4
    )
    assert given.attention_mask[0, 4].tolist() == [False] * 3 + [True] * 2 + [False] * 4


def test_questions_read_one_place_for_labels_of_one_token() -> None:
    tree = Tree()
    question = tree.ask(tree.add((5, 6)), [(7,), (8,)])
    assert question == (((1, 7),), ((1, 8),)) and len(tree) == 2
    longer = tree.ask(tree.add((9,)), [(7,), (1, 2, 3)])
    assert longer == (((2, 7),), ((2, 1), (3, 2), (4, 3)))
    assert places([question, longer]).tolist() == [1, 2, 3, 4]


def test_long_texts_lose_their_end_and_keep_the_answer() -> None:
    write = writer(longest=14)
    text = "the film was " * 30 + "dull"
    tokens = write.context(text)
    told = tokenizer().decode(tokens)
    assert (
        len(tokens) <= 14
        and told.startswith("Review: the film was")
        and told.endswith("Sentiment:")
    )


def test_demonstrations_that_fit() -> None:
    write = writer()
    tokens = lessons.demonstrations(write, SHOWN, "sequence", "label")[0][0]
    assert lessons.fitting(write, SHOWN, "sequence", len(tokens)) == 3
    assert lessons.fitting(write, SHOWN, "sequence", len(tokens) - 1) == 2
    apart = sum(
        len(tokens) for tokens, _ in lessons.demonstrations(write, SHOWN, "separate", "label")
    )
    assert (
        lessons.fitting(write, SHOWN, "separate", apart) == 3
        and lessons.fitting(write, SHOWN, "separate", apart - 1) == 2
    )
    assert lessons.fitting(write, SHOWN, "separate", 3) == 0 and len(tokens) < POSITIONS


def test_every_text_starts_as_the_tokenizer_starts_one() -> None:
    write = writer()
    start: Tokens = tuple(tokenizer()("").input_ids)
    for tokens, targets in lessons.demonstrations(write, SHOWN, "separate", "context"):
        assert tokens[: len(start)] == start and min(targets) >= len(start)
    assert lessons.prompts(write, TEXTS).domain[: len(start)] == start


def test_labels_carry_the_space_before_them() -> None:
    assert [tokenizer().decode(label) for label in writer().labels] == [" negative", " positive"]


def test_a_digest_follows_all_that_is_given() -> None:
    lesson = few_shot("separate", "label")
    assert digest(lesson) == digest(few_shot("separate", "label"))
    others = [
        few_shot("sequence", "label"),
        few_shot("separate", "context"),
        few_shot("separate", "label", None),
        replace(lesson, room=61),
    ]
    assert len({digest(one) for one in (lesson, *others)}) == 5
