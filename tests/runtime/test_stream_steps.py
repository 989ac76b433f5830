"""What a stream promises beside its numbers: scores are unseen, rows do not know of each other,
it can stop and go on, and bad input is refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.oracle.streaming import streamed
from tests.runtime.test_streaming import CHUNK, CONTEXT, LIMIT, RATE, VOCAB, simulator_of
from tests.support.every import model_of
from tests.support.families import FAMILIES
from tests.support.models import simulate, tokens
from tests.support.tolerances import error
from tintc.compiler.casts import no_casts
from tintc.evaluate.speed.benchmark import updated_parameters
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import InputError, UsageError
from tintc.runtime.scoring import read_documents
from tintc.runtime.simulator import Simulator
from tintc.runtime.slices import OWN_TOKENS
from tintc.runtime.stream_settings import StreamSettings
from tintc.runtime.streaming import Stream, StreamOverflow

EXACT = SimulatorConfig.exact(inner_lr=RATE, momentum=0.5)
KEYS = ("recompute", "cache")


def stream_of(batch: int = 1, name: str = "llama", **options: Any) -> Stream:
    simulator = simulator_of(name, options.pop("config", EXACT))
    return simulator.stream(batch, **{"chunk": CHUNK, "context": CONTEXT, **options})


def text(length: int, seed: int = 0, rows: int = 1) -> Tensor:
    return tokens(rows, length, VOCAB - 1, seed=seed) + 1


def read(stream: Stream, ids: Tensor) -> Tensor:
    """(B, N) losses of whole rows, chunk by chunk."""
    parts = [ids[:, : 1 + CHUNK], *ids[:, 1 + CHUNK :].split(CHUNK, 1)]
    return torch.cat([stream.step(part).losses for part in parts], 1)


def same(a: Tensor, b: Tensor) -> bool:
    """To the bit; NaN equals NaN."""
    return bool(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)))


class TestUnseen:
    @settings(max_examples=12)
    @given(
        length=st.integers(4, 24),
        chunk=st.integers(1, 6),
        context=st.integers(0, 9),
        batch=st.integers(1, 2),
        keys=st.sampled_from(KEYS),
        dtype=st.sampled_from((torch.float64, torch.float32)),
        data=st.data(),
    )
    def test_no_score_knows_its_token_or_a_later_one(
        self, length: int, chunk: int, context: int, batch: int, keys: Any, dtype: torch.dtype,
        data: st.DataObject,
    ) -> None:  # fmt: skip
        simulator = narrowed(dtype)
        t = data.draw(st.integers(1, length - 1))
        ids = text(length, rows=batch)
        other = ids.clone()
        other[:, t] = other[:, t] % (VOCAB - 1) + 1
        how = {"chunk": chunk, "context": context, "keys": keys}
        one, two = (simulator.score_first(each, **how).losses for each in (ids, other))
        assert torch.equal(one[:, : t - 1], two[:, : t - 1])
        if t < length - 1:
            assert not torch.equal(one[:, t - 1 :], two[:, t - 1 :])


def narrowed(dtype: torch.dtype) -> Simulator:
    found = simulator_of("llama", EXACT)
    if dtype == torch.float64:
        return found
    tensors = {name: value.detach().to(dtype) for name, value in found.prefix.tensors().items()}
    return Simulator(found.program, tensors)


class TestRows:
    @pytest.mark.parametrize("keys", KEYS)
    @pytest.mark.parametrize("rule", [{"momentum": 0.9, "decay": 0.1}, {"optimizer": "adam"}])
    def test_a_row_without_tokens_stays_as_it_is(self, keys: str, rule: dict[str, Any]) -> None:
        config = SimulatorConfig.exact(inner_lr=RATE, **rule)
        stream, ids = stream_of(2, config=config, keys=keys), text(12, rows=2)
        read(stream, ids[:, :8])
        before = stream.state_dict()
        mask = torch.tensor([[1, 1], [0, 0]])
        losses = stream.step(ids[:, 8:10], mask).losses
        assert bool(losses[1].isnan().all()) and bool(losses[0].isfinite().all())
        after = stream.state_dict()
        rows = [name for name in before if name.startswith(("given/", "states/"))]
        assert all(torch.equal(before[name][1], after[name][1]) for name in rows)
        assert all(not torch.equal(before[name][0], after[name][0]) for name in rows)

    @pytest.mark.parametrize("keys", KEYS)
    def test_documents_side_by_side_and_one_after_another(self, keys: str) -> None:
        """A row whose document ended takes another one, and both are as if they were alone."""
        stream, first, second = stream_of(2, keys=keys), text(9, 1), text(14, 2)
        third = text(6, 3)
        texts = [ids[0] for ids in (first, second, third)]  # the third one behind the first
        done = {d.number: torch.cat(d.losses) for d in read_documents(stream, texts)}
        for number, ids in enumerate((first, second, third)):
            alone = read(stream_of(1, keys=keys), ids)[0, 1:]
            assert error(done[number], alone) < LIMIT

    def test_reset_never_carries_weights_and_state_on(self) -> None:
        stream, texts = stream_of(1, reset="never"), [text(9, 1), text(8, 2)]
        new = torch.tensor([True])
        found = []
        for ids in texts:
            first = stream.step(ids[:, : 1 + CHUNK], new_document=new).losses
            rest = [stream.step(part).losses for part in ids[:, 1 + CHUNK :].split(CHUNK, 1)]
            found.append(torch.cat([first, *rest], 1)[0, 1:])
        simulator = simulator_of("llama", EXACT)
        with no_casts():
            expected = streamed(
                model_of("llama"), EXACT, [ids[0] for ids in texts], updated_parameters(simulator),
                chunk=CHUNK, context=CONTEXT, reset="never",
            )  # fmt: skip
        for losses, wanted in zip(found, expected.losses, strict=True):
            assert error(losses, wanted) < LIMIT

    def test_texts_longer_than_the_positions(self) -> None:
        """OPT has 32 of them here."""
        for keys in KEYS:
            simulator = simulator_of("opt", EXACT)
            assert simulator.program.facts.longest == 32
            ids = text(75, 5)
            found = simulator.score_first(ids, chunk=CHUNK, context=CONTEXT, keys=keys)  # type: ignore[arg-type]
            with no_casts():
                expected = streamed(
                    model_of("opt"), EXACT, [ids[0]], updated_parameters(simulator), chunk=CHUNK,
                    context=CONTEXT, keys=keys, longest=32,
                )  # fmt: skip
            assert error(found.losses[0], expected.losses[0]) < LIMIT

    def test_weights_after_the_last_chunk(self) -> None:
        """The last chunk, full or ragged, trains like any other."""
        stream, ids = stream_of(1, "opt"), text(12, 4)
        read(stream, ids)
        with no_casts():
            expected = streamed(
                model_of("opt"), EXACT, [ids[0]], updated_parameters(stream.simulator),
                chunk=CHUNK, context=CONTEXT,
            )  # fmt: skip
        layout = stream.simulator.program.layout.prefix
        for slot, value in stream.groups[0].carried.given.items():
            where = layout[slot]
            wanted = expected.weights[where.parameter]
            wanted = wanted.t() if where.transpose else wanted
            if where.rows.period == len(wanted):
                wanted = wanted[where.rows.start : where.rows.stop]
                assert error(value[0], wanted) < LIMIT


@pytest.mark.parametrize("keys", KEYS)
def test_rows_one_after_another_are_rows_together(
    keys: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many run together is a matter of speed; a state of one loads into the other."""
    ids, mask = text(16, 8, rows=3), torch.ones(3, 16)
    mask[1, 9:] = 0
    simulator = simulator_of("llama", EXACT)
    how: dict[str, Any] = {"chunk": CHUNK, "context": CONTEXT, "keys": keys}
    together = simulator.score_first(ids, mask, **how).losses
    first = simulator.stream(3, **how)
    begun = read(first, ids[:, :7])
    monkeypatch.setitem(OWN_TOKENS, "cpu", 1)
    alone, second = simulator.score_first(ids, mask, **how).losses, simulator.stream(3, **how)
    assert (len(first.groups), len(second.groups)) == (1, 3)
    real = ~together.isnan()
    assert torch.equal(real, ~alone.isnan())
    assert error(alone[real], together[real]) < LIMIT
    second.load_state_dict(first.state_dict())
    rest = second.step(ids[:, 7:10]).losses
    assert error(torch.cat([begun[:, 1:], rest], 1)[0], together[0, :9]) < LIMIT


@pytest.mark.parametrize("keys", KEYS)
def test_inference_mode_may_come_and_go(keys: str) -> None:
    ids, new = text(14, 9, rows=2), torch.tensor([True, False])
    parts = [ids[:, :4], *ids[:, 4:].split(CHUNK, 1)]
    found = []
    for modes in ((False,) * len(parts), (True, False, True, False, True)):
        stream = stream_of(2, keys=keys)
        each = []
        for number, (mode, part) in enumerate(zip(modes, parts, strict=False)):
            with torch.inference_mode(mode):
                each.append(stream.step(part, new_document=new if number == 3 else None).losses)
        found.append(torch.cat(each, 1))
    assert same(*found)


class TestState:
    @pytest.mark.parametrize("keys", KEYS)
    def test_stops_and_goes_on_with_the_same_bits(self, keys: str) -> None:
        ids = text(20, 6, rows=2)
        whole = read(stream_of(2, keys=keys), ids)
        first = stream_of(2, keys=keys)
        one = read(first, ids[:, :10])
        other = stream_of(2, keys=keys)
        other.load_state_dict(first.state_dict())
        parts = ids[:, 10:].split(CHUNK, 1)
        two = torch.cat([other.step(part).losses for part in parts], 1)
        assert same(torch.cat([one, two], 1), whole)
        assert other.chunks == 3 + len(parts)

    @pytest.mark.slow
    def test_half_precision_keeps_biases_of_positions_wide(self) -> None:
        """And the stream goes on from them: BLOOM's ALiBi, with keys=cache."""
        model = FAMILIES["bloom"].build(torch.float16)
        simulator = simulate(model, SimulatorConfig.exact(inner_lr=RATE))
        ids, how = text(13, 8, rows=2), {"chunk": CHUNK, "context": CONTEXT}
        streams = [simulator.stream(2, keys="cache", **how) for _ in range(2)]
        assert streams[0].groups[0].cache is not None
        biases = [name for name in streams[0].groups[0].cache.values if name.endswith("/bias")]
        assert biases
        mask = torch.tensor([[1] * 4, [1, 1, 0, 0]])  # of unequal lengths
        streams[0].step(ids[:, :4], mask)
        state = streams[0].state_dict()
        assert all(state[name].dtype == torch.float32 for name in biases)
        streams[1].load_state_dict(state)
        one, two = (stream.step(ids[:, 4:7]).losses for stream in streams)
        assert same(one, two)

    def test_refuses_what_belongs_to_another(self) -> None:
        state = stream_of(2).state_dict()
        other = SimulatorConfig.exact(inner_lr=RATE, momentum=0.25)
        for stream, message in (
            (stream_of(1), "made with batch 2; this stream has 1"),
            (stream_of(2, chunk=2), "made with chunk 3; this stream has 2"),
            (stream_of(2, config=other), "made with momentum 0.5; this stream has 0.25"),
            (stream_of(2, name="opt"), "another model"),
        ):
            with pytest.raises(UsageError, match=message):
                stream.load_state_dict(state)
        with pytest.raises(UsageError, match="no state of a stream"):
            stream_of(2).load_state_dict({})


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"chunk": 0}, "chunk is 0; expected a whole number, at least 1"),
            ({"context": -1}, "context is -1"),
            ({"keys": "kept"}, "keys is 'kept'; expected recompute or cache"),
            ({"reset": "chunk"}, "reset is 'chunk'"),
            ({"name": "opt", "context": 30}, "make windows of 33 tokens; this model takes 32"),
            ({"batch": 0}, "batch is 0"),
        ],
    )
    def test_settings(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(UsageError, match=message):
            stream_of(**options)

    def test_the_transformer_back_end_keeps_no_keys(self) -> None:
        simulator = simulator_of("gpt2", EXACT, "transformer")
        with pytest.raises(UsageError, match="keys=cache needs the fused back end"):
            simulator.stream(chunk=CHUNK, context=CONTEXT, keys="cache")

    @pytest.mark.parametrize(
        ("ids", "more", "message"),
        [
            (torch.ones(1, 6, dtype=torch.int64), {}, "row 0 has 5 targets; a chunk holds 3"),
            (torch.ones(2, 2, dtype=torch.int64), {}, "ids have 2 rows; this stream has 1"),
            (torch.ones(1, 2), {}, "no .batch, tokens. tensor of whole numbers"),
            (torch.full((1, 2), VOCAB), {}, "tokens are 0 to 28"),
            (torch.ones(1, 2, dtype=torch.int64), {"mask": torch.ones(1, 3)}, "mask has shape"),
            (torch.ones(1, 2, dtype=torch.int64), {"mask": torch.full((1, 2), 2)}, "0 and 1"),
            (torch.ones(1, 2, dtype=torch.int64), {"new_document": torch.ones(2)}, "one a row"),
        ],
    )
    def test_tokens(self, ids: Tensor, more: dict[str, Tensor], message: str) -> None:
        stream = stream_of()
        with pytest.raises(InputError, match=message):
            stream.step(ids, **more)
        assert stream.chunks == 0

    def test_a_document_without_a_target(self) -> None:
        with pytest.raises(InputError, match=r"document 0 has shape .1,.; expected at least two"):
            simulator_of("llama", EXACT).score_first(text(1))

    def test_overflow_names_the_chunk_and_keeps_the_scores(self) -> None:
        config = SimulatorConfig.exact(inner_lr=1e200)
        stream, ids = stream_of(config=config), text(12)
        first = stream.step(ids[:, : 1 + CHUNK])
        assert bool(first.losses[0, 1:].isfinite().all())
        with pytest.raises(StreamOverflow, match="chunk 1 of row 0 has losses that are not finite"):
            stream.step(ids[:, 1 + CHUNK : 1 + 2 * CHUNK])


def test_settings_are_what_the_stream_has() -> None:
    assert stream_of().settings == StreamSettings(CHUNK, CONTEXT, "recompute", "document")
