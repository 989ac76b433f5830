"""The harness's model `tintc`: every number against the Hugging Face model with autograd and SGD,
or against the harness's own `hf`.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("lm_eval")

import datasets
import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from tests.oracle.reference import reference
from tests.oracle.streaming import streamed
from tests.support.artifacts import POSITIONS, TEXT, artifact, source_directory
from tintc.compiler.casts import no_casts
from tintc.evaluate import lm_eval as adapter
from tintc.evaluate.lm_eval import TintcLM
from tintc.evaluate.lm_eval_requests import stream_settings, with_bos
from tintc.evaluate.lm_eval_requests import streamed as streamed_texts
from tintc.evaluate.speed.benchmark import updated_parameters
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import InputError, NumericalError, TintcError, UsageError

CONFIG = SimulatorConfig.exact(inner_lr=0.02, steps=2)
LONG = " ".join([TEXT] * 6)
PAIRS = [
    ("The river rises in the hills", " above the town."),
    ("The river", " runs"),
    (TEXT, " It is wide"),
    ("The river rises in the hills", " below"),
    ("The river rises in the hills", " banana"),
    ("The sea ", "meets the river"),  # the space moves to the continuation
    ("The river", " meets the sea, and the sea is deep, and the river is not."),
]


@lru_cache(maxsize=1)
def huggingface() -> tuple[Any, Any]:
    """The auxiliary model in float64, and its tokenizer."""
    model = transformers.OPTForCausalLM.from_pretrained(
        source_directory(), dtype=torch.float64
    ).eval()
    return model, transformers.AutoTokenizer.from_pretrained(source_directory())


@lru_cache(maxsize=1)
def compiled() -> TintcLM:
    return TintcLM(
        str(source_directory()),
        dtype="float64",
        batch_size="3",
        preset="exact",
        inner_lr=CONFIG.inner_lr,
        steps=CONFIG.steps,
    )


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[TintcLM]:
    """The adapter of the tiny model; what a test sets is put back."""
    kept = compiled()
    for name in ("batch_size", "max_length", "rolling_context"):
        monkeypatch.setattr(kept, name, getattr(kept, name))
    yield kept
    kept.simulator.inner_lr.data.fill_(CONFIG.inner_lr)


def asked(*arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance("loglikelihood", {}, one, 0) for one in arguments]


def quiet_log_likelihoods(model: TintcLM, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return model.loglikelihood(asked(*pairs), disable_tqdm=True)


def tokens_of(text: str) -> list[int]:
    return list(huggingface()[1](text).input_ids)


def split(context: str, continuation: str) -> tuple[list[int], list[int]]:
    """What the harness scores: the tokens of the whole text behind those of the context, whose last
    spaces count with the continuation.
    """
    whole, front = tokens_of(context + continuation), tokens_of(context.rstrip())
    return front, whole[len(front) :]


def logits_by_autograd(
    context: list[int], continuation: list[int], config: SimulatorConfig | None = CONFIG
) -> torch.Tensor:
    """Autograd and SGD on the context, then the logits (C, V) that predict the continuation;
    without a config the model as it is.
    """
    ids = torch.tensor([[*context, *continuation][:-1]])
    train = (torch.arange(ids.shape[1]) < len(context)).long()[None]
    result = reference(huggingface()[0], config or CONFIG, ids, train)
    return (result.logits if config else result.initial_logits)[0, len(context) - 1 :]


def by_autograd(
    context: list[int], continuation: list[int], config: SimulatorConfig | None = CONFIG
) -> tuple[float, bool]:
    logits, targets = logits_by_autograd(context, continuation, config), torch.tensor(continuation)
    picked = logits.log_softmax(-1).gather(-1, targets[:, None])
    return float(picked.sum()), bool((logits.argmax(-1) == targets).all())


def same(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> bool:
    numbers = [one for one, _ in found] == pytest.approx(
        [one for one, _ in expected], rel=1e-9, abs=1e-9
    )
    return numbers and [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_log_likelihoods_are_those_of_autograd_and_sgd(model: TintcLM) -> None:
    expected = [by_autograd(*split(*pair)) for pair in PAIRS]
    assert same(quiet_log_likelihoods(model, PAIRS), expected)
    untrained = [by_autograd(*split(*pair), config=None) for pair in PAIRS]
    assert (
        min(abs(one - other) for (one, _), (other, _) in zip(expected, untrained, strict=True))
        > 1e-3
    )  # a step shows in each


def test_is_greedy_is_said_of_the_likeliest_tokens_under_the_updated_weights(
    model: TintcLM,
) -> None:
    context, continuation = tokens_of(TEXT), []
    for _ in range(2):
        continuation.append(int(logits_by_autograd(context, [*continuation, 0])[-1].argmax()))
    wrong = [continuation[0], (continuation[1] + 1) % 4096]
    found = model._loglikelihood_tokens(
        [(None, context, one) for one in (continuation, wrong)], disable_tqdm=True
    )
    assert same(found, [by_autograd(context, continuation), by_autograd(context, wrong)])
    assert [greedy for _, greedy in found] == [True, False]


@pytest.mark.parametrize("size", [1, 2, 64])
def test_neither_the_batch_size_nor_the_order_matters(model: TintcLM, size: int) -> None:
    expected = quiet_log_likelihoods(model, PAIRS)
    model.batch_size = size
    assert same(quiet_log_likelihoods(model, PAIRS[::-1]), expected[::-1])


def test_choices_of_one_token_are_scored_by_one_call(
    model: TintcLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    run = model.simulator.forward
    monkeypatch.setattr(
        model.simulator,
        "forward",
        lambda ids, *rest, **more: (calls.append(len(ids)), run(ids, *rest, **more))[1],
    )
    context = tokens_of("The river rises")
    requests = [
        (None, context, [5]),
        (None, context, [6]),
        (None, context[:-1], [context[-1], 7]),
        (None, context, [8]),
    ]
    found = model._loglikelihood_tokens(requests, disable_tqdm=True)
    assert calls == [2]
    assert same(found, [by_autograd(front, behind) for _, front, behind in requests])


def test_a_context_that_is_empty_or_one_token_leaves_the_model_as_it_is(model: TintcLM) -> None:
    start = huggingface()[1].bos_token_id
    text = tokens_of("The river rises")
    assert text[0] == start
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = quiet_log_likelihoods(model, [("", "The river rises")])
        found += model._loglikelihood_tokens(
            [(None, [], text[1:]), (None, [7], [3, 9])], disable_tqdm=True
        )
    expected = by_autograd([start], text[1:], config=None)
    assert same(found, [expected, expected, by_autograd([7], [3, 9], config=None)])


def test_what_is_too_long_is_cut_from_the_left(model: TintcLM) -> None:
    long, behind = split(LONG, " It is wide")
    assert model.max_length == POSITIONS
    found = model._loglikelihood_tokens(
        [(None, long, behind), (None, long[:70], long[70 : 70 + POSITIONS])], disable_tqdm=True
    )
    # The last token is only predicted, so one more than the model reads is kept.
    expected = by_autograd(long[-(POSITIONS + 1 - len(behind)) :], behind)
    assert same(found, [expected, by_autograd(long[69:70], long[70 : 70 + POSITIONS], config=None)])
    with pytest.raises(
        InputError, match=f"a continuation has {POSITIONS + 1} tokens; expected 1 to {POSITIONS}"
    ):
        model._loglikelihood_tokens([(None, [2], [5] * (POSITIONS + 1))])
    with pytest.raises(InputError, match="a continuation has 0 tokens"):
        quiet_log_likelihoods(model, [("The river", "")])


@pytest.mark.parametrize("context", [1, 7, 20])
@pytest.mark.parametrize("count", [0, 1, 19, 20, 21, 47])
def test_chunks_cover_a_text_once_and_read_what_fits(context: int, count: int) -> None:
    tokens, prefix, longest = list(range(100, 100 + count)), 2, 20
    found = list(adapter.windows(tokens, prefix, longest, context))
    assert list(itertools.chain.from_iterable(chunk for _, chunk in found)) == tokens
    whole, place = [prefix, *tokens], 1
    for index, (front, chunk) in enumerate(found):
        assert [*front, *chunk] == whole[place - len(front) : place + len(chunk)]
        assert len(front) == min(place, longest + 1 - len(chunk))
        assert len(front) >= context or place < context
        place += len(chunk)
        assert len(chunk) == longest + 1 - context or index == len(found) - 1
    if context == 1:
        assert found == [
            make_disjoint_window(pair)
            for pair in get_rolling_token_windows(tokens, prefix, longest, 1)
        ]


@pytest.mark.parametrize("context", [1, 12])
def test_rolling_trains_on_what_is_in_front_of_each_chunk(model: TintcLM, context: int) -> None:
    model.max_length, model.rolling_context = 20, context
    texts = [TEXT, "The sea.", " ".join([TEXT] * 2), ""]
    expected = []
    for text in texts:
        total, tokens, size = 0.0, tokens_of(text), 21 - context
        for start in range(0, len(tokens), size):
            chunk = tokens[start : start + size]
            front = [huggingface()[1].bos_token_id, *tokens[:start]][-(21 - len(chunk)) :]
            total += by_autograd(front, chunk, CONFIG if len(front) > 1 else None)[0]
        expected.append(total)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        found = model.loglikelihood_rolling(asked(*((text,) for text in texts)), disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-9)
    assert any("set rolling_context for more" in str(one.message) for one in seen) is (context == 1)


STREAMED = {"chunk": 5, "context": 15}


def by_streams(model: TintcLM, texts: list[str], **settings: Any) -> list[float]:
    """Rolling log-likelihoods with protocol=stream."""
    found = copy.copy(model)
    found.streams = stream_settings("stream", {**STREAMED, **settings}, POSITIONS)
    return found.loglikelihood_rolling(asked(*((text,) for text in texts)), disable_tqdm=True)


@pytest.mark.parametrize("keys", ["recompute", "cache"])
def test_streams_are_those_of_an_independent_loop(model: TintcLM, keys: str) -> None:
    texts = [TEXT, "The sea.", "", LONG]
    start, trained = huggingface()[1].bos_token_id, updated_parameters(model.simulator)
    documents = [torch.tensor([start, *tokens_of(text)]) for text in texts]
    assert len(documents[-1]) > POSITIONS
    with no_casts():
        expected = streamed(
            huggingface()[0], CONFIG, documents, trained, keys=keys, longest=POSITIONS, **STREAMED
        )
    totals = [-float(losses.sum()) for losses in expected.losses]
    assert by_streams(model, texts, keys=keys) == pytest.approx(totals, rel=1e-9)


def test_at_rate_0_a_stream_is_the_harness_s_own_rolling_windows(model: TintcLM) -> None:
    """Without context chunks of C are its windows of C tokens; with one, the windows of `rolling`
    are. A ragged last chunk has a longer context there, so C divides these texts.
    """
    hf = HFLM(huggingface()[0], tokenizer=huggingface()[1], batch_size=2, device="cpu")
    model.simulator.inner_lr.data.zero_()
    for count, chunk, context in [(15, 5, 0), (60, 20, 0), (60, 5, 15), (60, 20, 7), (15, 3, 8)]:
        tokens = tokens_of(LONG)[:count]
        pairs = list(adapter.windows(tokens, tokens[0], chunk + context, context + 1))
        if not context:
            rolling = get_rolling_token_windows(tokens, tokens[0], chunk, 1)
            assert pairs == [make_disjoint_window(pair) for pair in rolling]
        windows = [(None, front, chunk) for front, chunk in pairs]
        expected = sum(score for score, _ in hf._loglikelihood_tokens(windows, disable_tqdm=True))
        settings = stream_settings("stream", {"chunk": chunk, "context": context}, POSITIONS)
        assert settings is not None
        (found,) = streamed_texts(model.simulator, [[tokens[0], *tokens]], 2, settings)
        assert found == pytest.approx(expected, rel=1e-9)
    texts = ["The sea.", TEXT]  # they fit into one window of hf
    rolling = HFLM(huggingface()[0], tokenizer=huggingface()[1], max_length=POSITIONS, device="cpu")
    expected = rolling.loglikelihood_rolling(asked(*((t,) for t in texts)), disable_tqdm=True)
    assert by_streams(model, texts, chunk=POSITIONS, context=0) == pytest.approx(expected, rel=1e-9)


def test_a_stream_that_diverges_names_text_and_chunk(model: TintcLM) -> None:
    model.simulator.inner_lr.data.fill_(1e200)
    with pytest.raises(NumericalError, match="text 2 has losses in chunk 1 that are not finite"):
        by_streams(model, ["", "The", TEXT])


def greedy_by_huggingface(model: TintcLM, ids: list[int], count: int) -> list[int]:
    """Greedy generation of the Hugging Face model with the state dict that training on the ids
    gives.
    """
    fresh = transformers.OPTForCausalLM.from_pretrained(
        source_directory(), dtype=torch.float64
    ).eval()
    given = torch.tensor([ids])
    fresh.load_state_dict(model.simulator.updated_state_dict(given, torch.ones_like(given)))
    options = {
        "do_sample": False,
        "max_new_tokens": count,
        "min_new_tokens": count,
        "pad_token_id": 1,
    }
    return fresh.generate(given, attention_mask=torch.ones_like(given), **options)[
        0, len(ids) :
    ].tolist()


def test_generation_is_greedy_under_the_updated_state_dict(
    model: TintcLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = huggingface()[1].decode
    settings = {
        "until": [],
        "max_gen_toks": 6,
        "do_sample": False,
        "temperature": 0.0,
        "top_p": 0.9,
    }
    contexts = [TEXT, "The river", LONG]
    used = [tokens_of(context)[-(POSITIONS - 6) :] for context in contexts]
    assert len(tokens_of(contexts[2])) > POSITIONS
    expected = [greedy_by_huggingface(model, ids, 6) for ids in used]
    requests = asked(*((context, settings) for context in contexts))
    assert model.generate_until(requests, disable_tqdm=True) == [
        decode(tokens) for tokens in expected
    ]

    made = decode(expected[0])
    stop = decode(expected[0][:4])[-3:]
    first = made.index(stop)
    assert model.generate_until(
        asked((TEXT, settings | {"until": ["never this", stop]})), disable_tqdm=True
    ) == [made[:first]]
    monkeypatch.setattr(TintcLM, "eot_token_id", expected[0][2])
    before = expected[0][: expected[0].index(expected[0][2])]
    assert model.generate_until(asked((TEXT, settings)), disable_tqdm=True) == [decode(before)]
    monkeypatch.undo()

    model.simulator.inner_lr.data.zero_()
    assert model.generate_until(requests[:1], disable_tqdm=True) != [
        decode(expected[0])
    ]  # training shows


def test_at_rate_0_every_number_is_that_of_the_harness_s_own_model(model: TintcLM) -> None:
    hf = HFLM(
        huggingface()[0],
        tokenizer=huggingface()[1],
        batch_size=2,
        max_length=POSITIONS,
        device="cpu",
    )
    model.simulator.inner_lr.data.zero_()
    pairs = [*PAIRS, ("", "The river"), (LONG, " It is wide"), ("</s>The river", " runs")]
    assert same(
        quiet_log_likelihoods(model, pairs), hf.loglikelihood(asked(*pairs), disable_tqdm=True)
    )
    texts = asked((LONG,), ("The sea.",))
    expected = hf.loglikelihood_rolling(texts, disable_tqdm=True)
    assert model.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(
        expected, rel=1e-9
    )
    settings = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    wanted = asked((TEXT, settings), (LONG, settings))
    assert model.generate_until(wanted, disable_tqdm=True) == hf.generate_until(
        wanted, disable_tqdm=True
    )


def test_whether_bos_is_added_is_said_as_to_the_harness_s_own_model(
    model: TintcLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A tokenizer that adds it by itself and one that does not, as Llama's and GPT-2's."""
    adds = huggingface()[1]
    does_not = copy.deepcopy(adds)
    does_not.add_bos_token = False
    settings = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
    simulator, numbers = model.simulator, {}
    simulator.inner_lr.data.zero_()
    monkeypatch.setattr(adapter, "compile_model", lambda source, config, **options: simulator)
    for tokenizer, said in [(adds, None), (adds, False), (does_not, None), (does_not, True)]:
        tokenizer.save_pretrained(tmp_path)
        monkeypatch.setattr(simulator, "tokenizer", tokenizer)
        found = TintcLM("it", add_bos_token=said, batch_size=4)
        hf = HFLM(
            huggingface()[0],
            tokenizer=str(tmp_path),
            add_bos_token=said,
            batch_size=1,
            max_length=POSITIONS,
            device="cpu",
        )
        pairs = [*PAIRS, ("", "The river"), ("</s>The river", " runs")]
        expected = hf.loglikelihood(asked(*pairs), disable_tqdm=True)
        assert same(quiet_log_likelihoods(found, pairs), expected)
        texts = asked((LONG,), ("The sea.",))
        rolling = hf.loglikelihood_rolling(texts, disable_tqdm=True)
        assert found.loglikelihood_rolling(texts, disable_tqdm=True) == pytest.approx(
            rolling, rel=1e-9
        )
        wanted = asked((TEXT, settings))
        assert found.generate_until(wanted) == hf.generate_until(wanted)
        numbers[tokenizer is adds, said] = (expected[0][0], rolling[0])
    assert numbers[True, None] == pytest.approx(numbers[False, True])
    assert numbers[True, False] == pytest.approx(numbers[False, None])
    assert numbers[True, None] != pytest.approx(numbers[False, None])
    assert simulator.tokenizer is does_not
    assert does_not.add_bos_token is False


def test_a_bos_that_is_not_there_cannot_be_added() -> None:
    without = transformers.AutoTokenizer.from_pretrained(source_directory(), bos_token=None)
    with pytest.raises(InputError, match="this tokenizer has no bos token; leave add_bos_token"):
        with_bos(without, True)
    assert with_bos(without, False)("The river").input_ids == tokens_of("The river")[1:]


def test_a_rate_that_spoils_the_weights_is_said(model: TintcLM) -> None:
    model.simulator.inner_lr.data.fill_(1e200)
    with pytest.raises(NumericalError, match=r"a log-likelihood is .*; pass a smaller inner_lr"):
        quiet_log_likelihoods(model, PAIRS[:1])


SOURCE = {"source": "tiny-opt"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pass one of source=MODEL and artifact=DIR in model_args"),
        ({"artifact": "x", **SOURCE}, "pass one of source=MODEL and artifact=DIR in model_args"),
        ({"preset": "papper", **SOURCE}, "preset is 'papper'; expected one of paper, exact"),
        ({"stepz": 2, **SOURCE}, "unknown config field stepz; the fields are steps, "),
        ({"steps": 0, **SOURCE}, "steps is 0; expected a whole number of at least 1"),
        (
            {"batch_size": "auto", **SOURCE},
            "batch_size is 'auto'; expected a whole number, at least 1",
        ),
        ({"max_length": 513, **SOURCE}, "max_length is 513; expected a whole number, 1 to 512"),
        (
            {"rolling_context": 9, "max_length": 8, **SOURCE},
            "rolling_context is 9; expected a whole number, 1 to 8",
        ),
        ({"protocol": "roll", **SOURCE}, "protocol is 'roll'; expected split or stream"),
        ({"chunk": 8, **SOURCE}, "chunk given without a stream; expected protocol=stream"),
        (
            {"protocol": "stream", "rolling_context": 8, **SOURCE},
            "rolling_context is of protocol split; a stream has a context instead",
        ),
        (
            {"protocol": "stream", "chunk": 300, "context": 300, **SOURCE},
            "make windows of 600 tokens; this model takes 512",
        ),
        ({"protocol": "stream", "chunk": "8", **SOURCE}, "chunk is '8'; expected a whole number"),
        ({"add_bos_token": "yes", **SOURCE}, "add_bos_token is 'yes'; expected True or False"),
        ({"dtype": "float8", **SOURCE}, "dtype is 'float8'; expected one of float32, "),
        ({"device": "tpu", **SOURCE}, "device is 'tpu'; expected cpu, cuda or cuda:N"),
        (
            {"source": "shape:opt-125m"},
            "shape:opt-125m has no tokenizer; pass a source that brings one",
        ),
        ({"artifact": "no/such"}, "no/such is no tintc artifact"),
        (
            {"artifact": "x", "steps": 2, "preset": "exact"},
            "preset, steps cannot be set with artifact",
        ),
    ],
)
def test_a_bad_argument_is_one_line(
    arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if arguments.get("source") == "tiny-opt" or "shape" in str(arguments.get("source")):
        given = compiled().simulator
        monkeypatch.setattr(adapter, "compile_model", lambda source, config, **options: given)
        facts = dataclasses.replace(given.program.facts, max_positions=512)
        monkeypatch.setattr(given.program, "facts", facts)
        if "shape" in arguments["source"]:
            monkeypatch.setattr(given, "tokenizer", None)
    with pytest.raises(TintcError) as caught:
        TintcLM(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"do_sample": True, "temperature": 0.7},
            "generation with do_sample=True, temperature=0.7",
        ),
        ({"temperature": 0.7, "top_p": 0.9}, "top_p=0.9"),
        ({"num_beams": 4}, "generation with num_beams=4; only greedy generation is there"),
        (
            {"max_gen_toks": POSITIONS},
            f"max_gen_toks is {POSITIONS}; expected a whole number, 1 to {POSITIONS - 1}",
        ),
    ],
)
def test_other_than_greedy_generation_is_refused(
    model: TintcLM, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        model.generate_until(asked((TEXT, settings)), disable_tqdm=True)


def test_an_artifact_is_read_and_its_rate_can_be_set() -> None:
    kept = TintcLM(artifact=str(artifact("exact")), dtype="float64", inner_lr=CONFIG.inner_lr)
    assert kept.simulator.config.steps == 1
    expected = [
        by_autograd(*split(*pair), config=SimulatorConfig.exact(inner_lr=CONFIG.inner_lr))
        for pair in PAIRS[:3]
    ]
    assert same(quiet_log_likelihoods(kept, PAIRS[:3]), expected)


CHOICES = [
    {
        "question": "The river rises in the hills above the",
        "choices": [" town", " banana", " of"],
        "answer": 0,
    },
    {
        "question": "This movie was so bad that I",
        "choices": [" town above the hills", " hated it", " of"],
        "answer": 1,
    },
    {
        "question": "The film was written and directed by the",
        "choices": [" and", " same", " river in the"],
        "answer": 0,
    },
]
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
"""


@pytest.fixture
def task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a multiple-choice task of the harness and its data."""
    data = tmp_path / "choices.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in CHOICES), encoding="utf-8")
    (tmp_path / "tiny_choice.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path


@pytest.mark.slow
def test_a_task_runs_with_the_bundled_model(task: Path) -> None:
    manager = TaskManager(include_path=str(task), include_defaults=False)
    arguments = "source=tiny-opt,preset=paper,inner_lr=1e-3,steps=1"
    results = lm_eval.simple_evaluate(
        "tintc",
        arguments,
        tasks=["tiny_choice"],
        task_manager=manager,
        batch_size=4,
        bootstrap_iters=0,
    )
    simulator = TintcLM("tiny-opt", inner_lr=1e-3).simulator
    right = []
    samples = sorted(results["samples"]["tiny_choice"], key=lambda sample: sample["doc_id"])
    for sample, line in zip(samples, CHOICES, strict=True):
        found = [float(response[0]) for (response,) in sample["resps"]]
        expected = []
        for choice in line["choices"]:
            ids = simulator.tokenizer(line["question"] + choice, return_tensors="pt").input_ids
            trained = len(simulator.tokenizer(line["question"]).input_ids)
            train = (torch.arange(ids.shape[1]) < trained).long()[None]
            with torch.inference_mode():
                out = simulator(ids, train, labels=ids.masked_fill(train.bool(), -100))
            expected.append(-float(out.loss) * (ids.shape[1] - trained))
        assert found == pytest.approx(expected, rel=1e-4)
        right.append(max(range(3), key=lambda choice: expected[choice]) == line["answer"])
    assert results["results"]["tiny_choice"]["acc,none"] == pytest.approx(sum(right) / 3)


ALONE = """
import runpy, sys
import tintc
tintc.compile, tintc.load
import tintc.evaluate, tintc.cli
print("lm_eval" in sys.modules)
sys.modules["lm_eval"] = None
try:
    import tintc.evaluate.lm_eval
except ImportError as error:
    print(error)
runpy.run_module("tintc.evaluate.lm_eval", run_name="__main__")
"""


@pytest.mark.slow
def test_without_the_harness_one_line_says_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ALONE], capture_output=True, text=True, check=False
    )
    imported, line = done.stdout.splitlines()
    assert imported == "False"
    assert line.startswith("the lm-evaluation-harness is not installed")
    assert line.endswith("run `pip install 'tintc[lm-eval]'`")
    assert (done.returncode, done.stderr) == (1, line + "\n")


def test_the_harness_s_command_line_has_the_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], task: Path
) -> None:
    """Up to a refused argument: one line and tintc's exit code."""
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)
    monkeypatch.setattr(
        "lm_eval.config.evaluate_config.EvaluatorConfig.process_tasks",
        lambda *_: TaskManager(include_path=str(task), include_defaults=False),
    )
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "lm_eval",
            "run",
            "--model",
            "tintc",
            "--model_args",
            "source=tiny-opt,steps=0",
            "--tasks",
            "tiny_choice",
        ],
    )
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    with pytest.raises(SystemExit) as caught:
        adapter.main()
    assert caught.value.code == 2
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == "error: steps is 0; expected a whole number of at least 1 (initial_logits are those of "
        "zero steps)"
    )
