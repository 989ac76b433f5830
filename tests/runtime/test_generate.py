"""`Adapted.generate` gives the tokens that the Hugging Face model gives with the same weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from tests.support.adapted import Loaded, adapted_of, prompts, with_config
from tests.support.families import FAMILIES
from tests.support.grid import some
from tests.support.tolerances import SIMULATOR, error
from tintc.runtime.adapted import Adapted, stack
from tintc.runtime.decoding.form import Form
from tintc.runtime.decoding.generation import _CACHE as CACHE

LIMIT = SIMULATOR[torch.float64]
FORMS: tuple[Form, ...] = ("weights", "factors")
END = 0  # of a text, and padding, of the models here


def assert_generated(found: Tensor, expected: list[int]) -> None:
    """The same tokens, and padding behind them."""
    tokens: list[int] = found.tolist()
    assert tokens[: len(expected)] == expected
    assert set(tokens[len(expected) :]) <= {END}


def assert_same_tokens(
    adapted: Adapted, name: str, rows: list[tuple[int, Tensor, Tensor]], each: int, **options: Any
) -> Tensor:
    """rows: the index of the sequence, ids and mask of each prompt. each: sequences returned of a
    prompt. Gives what was generated.
    """
    ids, mask = (torch.stack([row[part] for row in rows]) for part in (1, 2))
    found: Tensor = adapted.generate(ids, attention_mask=mask, **options)
    loaded, length = Loaded(name, adapted), ids.shape[1]
    lengths = set()
    for number, (index, row, seen) in enumerate(rows):
        own = row[seen.bool()]
        expected = loaded.generate(index, own, **options)
        for place in range(each):
            wanted: list[int] = expected[place, len(own) :].tolist()
            while wanted[-2:] == [END, END]:  # padding of the reference's own
                wanted.pop()
            assert_generated(found[number * each + place, length:], wanted)
            lengths.add(len(wanted))
    assert max(lengths) > 2
    return found


def one_each(rows: int = 3, length: int = 12) -> list[tuple[int, Tensor, Tensor]]:
    ids, mask = prompts(rows, length)
    return [(row, ids[row], mask[row]) for row in range(rows)]


@pytest.mark.parametrize("form", FORMS)
@some("name", FAMILIES, default=["opt", "mpt", "qwen3"])
def test_greedy(name: str, form: Form) -> None:
    adapted = with_config(name, form)
    assert_same_tokens(adapted, name, one_each(), 1, max_new_tokens=18, do_sample=False)


@pytest.mark.parametrize("form", FORMS)
@some("name", ["mistral", "gemma2"], default=["mistral"])
def test_65_tokens_across_a_window_s_edge(name: str, form: Form) -> None:
    options = {"max_new_tokens": 65, "min_new_tokens": 65, "do_sample": False}
    found = assert_same_tokens(with_config(name, form), name, one_each(length=6), 1, **options)
    assert found.shape == (3, 71)


@pytest.mark.parametrize("form", FORMS)
@some("name", ["opt", "gemma2", "bloom"], default=["opt"])
def test_beams_of_several_contexts(name: str, form: Form) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 9, "do_sample": False}
    assert_same_tokens(with_config(name, form), name, one_each(), 2, **options)


@pytest.mark.parametrize("form", FORMS)
def test_beams_of_chosen_contexts(form: Form) -> None:
    """Two prompts of one context, and contexts in another order."""
    adapted = with_config("opt", form).select([2, 0, 2])
    rows = one_each()
    assert_same_tokens(adapted, "opt", rows, 1, num_beams=3, max_new_tokens=7, do_sample=False)


@pytest.mark.parametrize("form", FORMS)
def test_a_sample_with_a_seed(form: Form) -> None:
    """OPT's code casts nothing, so that both draw from equal numbers."""
    one, (ids, _) = with_config("opt", form).select(1), prompts(1, 8)
    model, options = Loaded("opt", one).models[0], {"do_sample": True, "max_new_tokens": 12}
    for more in ({"num_return_sequences": 4}, {"top_p": 0.8, "temperature": 1.3}, {"top_k": 5}):
        found = []
        for each in (one, model):
            torch.manual_seed(3)
            found.append(each.generate(ids, **options, **more))
        assert torch.equal(*found)


class _Behind(StoppingCriteria):  # type: ignore[misc]
    """Stops each row behind one token."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return input_ids[:, -1] == self.token


class _Kept(BaseStreamer):  # type: ignore[misc]
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_stopping_criteria_and_streamers() -> None:
    adapted = with_config("opt")
    free = adapted.generate(prompts()[0], attention_mask=prompts()[1], max_new_tokens=18)
    stops = StoppingCriteriaList([_Behind(int(free[0, 15]))])
    options: dict[str, Any] = {"max_new_tokens": 18, "stopping_criteria": stops}
    found = assert_same_tokens(adapted, "opt", one_each(), 1, **options)
    assert not bool(found[0, 16:].any())
    streamer, ids = _Kept(), prompts(1, 8)[0]
    alone = adapted.select(0).generate(ids, max_new_tokens=6, streamer=streamer, do_sample=False)
    assert streamer.ended and streamer.tokens == alone[0].tolist()


@some("name", ["opt", "mistral", "gemma2"], default=["opt", "mistral"])
def test_assisted(name: str) -> None:
    """The cache is cropped after each draft, also behind a window's edge."""
    one, ids = with_config(name, "factors").select(0), prompts(1, 12)[0]
    ids[0, 6:] = ids[0, :6]  # so that there is something to look up
    plain = one.generate(ids, max_new_tokens=18, do_sample=False)
    looked = one.generate(ids, max_new_tokens=18, do_sample=False, prompt_lookup_num_tokens=4)
    assert torch.equal(looked, plain)
    assistant = Loaded(name, one).models[0]
    by_it = one.generate(ids, max_new_tokens=18, do_sample=False, assistant_model=assistant)
    assert torch.equal(by_it, plain)


@some("name", ["opt", "mistral"], default=["mistral"])
def test_continues_from_a_returned_cache(name: str) -> None:
    adapted, (ids, mask) = with_config(name), prompts()
    whole = {"do_sample": False, "min_new_tokens": 5, "return_dict_in_generate": True}
    first = adapted.generate(ids, attention_mask=mask, max_new_tokens=5, **whole)
    cache = first[CACHE]
    assert cache.get_seq_length() == 12 + 4  # the last token is not looked at
    more = torch.cat([first.sequences, prompts(3, 4, seed=9)[0].clamp(min=1)], 1)
    seen = torch.cat([mask, torch.ones(3, 9, dtype=torch.int64)], 1)
    options = {"attention_mask": seen, "max_new_tokens": 6, "do_sample": False}
    expected = adapted.generate(more, **options)
    found = adapted.generate(more, **options, **{CACHE: cache})
    assert torch.equal(found, expected)


def test_prompts_in_chunks_and_without_a_cache() -> None:
    adapted, (ids, mask) = with_config("mistral"), prompts()
    options = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    expected = adapted.generate(ids, **options)
    assert torch.equal(adapted.generate(ids, **options, prefill_chunk_size=5), expected)
    assert torch.equal(adapted.generate(ids, **options, use_cache=False), expected)
    assert torch.equal(adapted.generate(input_ids=ids, **options), expected)
    whole = torch.ones_like(ids)
    assert torch.equal(
        adapted.generate(ids, max_new_tokens=4, prefill_chunk_size=5, do_sample=False),
        adapted.generate(ids, max_new_tokens=4, attention_mask=whole, do_sample=False),
    )


def test_scores_are_returned() -> None:
    one, ids = with_config("opt", "factors").select(0), prompts(1, 8)[0]
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    found = one.generate(ids, **options, output_scores=True, output_logits=True)
    expected = Loaded("opt", one).generate(0, ids[0], **options, output_scores=True)
    assert torch.equal(found.sequences, expected.sequences)
    for one_step, logits, wanted in zip(found.scores, found.logits, expected.scores, strict=True):
        assert error(one_step, wanted) < 1e-6 and error(logits, wanted) < 1e-6  # float32 scores
    assert found[CACHE].get_seq_length() == found.sequences.shape[1] - 1


def test_a_model_without_a_config() -> None:
    adapted = adapted_of("opt")
    assert not adapted.simulator.source  # type: ignore[attr-defined]
    asked = GenerationConfig(max_new_tokens=12, eos_token_id=END, pad_token_id=END)
    assert_same_tokens(adapted, "opt", one_each(), 1, generation_config=asked)
    one, ids = adapted_of("hand-nanogpt").select(2), prompts(1, 8)[0]
    model, expected = Loaded("hand-nanogpt", one).models[0], ids
    for _ in range(9):
        with torch.no_grad():
            expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    assert torch.equal(one.generate(ids, max_new_tokens=9), expected)


def test_several_prompts_of_one_context_and_stacked_ones() -> None:
    ids, mask = prompts(4)
    adapted = with_config("opt", "factors")
    mixed = stack([adapted.select(2), adapted.with_form("weights").select(0)])
    rows = [(number // 2, ids[number], mask[number]) for number in range(4)]
    assert_same_tokens(mixed, "opt", rows, 1, max_new_tokens=6, do_sample=False)


def test_the_transformer_back_end_generates_by_whole_sequences() -> None:
    adapted = adapted_of("gpt2", backend="transformer")
    ids = prompts()[0].clamp(min=1)
    found = adapted.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False)
    by_default = adapted.generate(ids, max_new_tokens=4, do_sample=False)
    assert torch.equal(found, by_default)
    loaded = Loaded("gpt2", adapted)
    for row in range(3):
        options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
        assert torch.equal(found[row], loaded.generate(row, ids[row], **options)[0])
