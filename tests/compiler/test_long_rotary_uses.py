"""What else a simulator does whose rotary frequencies depend on the length of the call: adapted
weights, text, streams, files, ONNX, costs; and what it refuses.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import tintc
from tests.support.artifacts import seal
from tests.support.flops import counting
from tests.support.grid import some
from tests.support.long_rotary import (
    DYNAMIC,
    EXACT,
    LONG,
    LONGROPE,
    ORIGINAL,
    RATE,
    first_call,
    model,
    short_simulator,
    simulator,
    stepped,
    tokens_of,
    trained,
)
from tests.support.models import simulate
from tests.support.tolerances import HALF_LOGITS, SIMULATOR, error
from tintc.compiler.casts import no_casts
from tintc.compiler.cost import estimate
from tintc.compiler.reports.breakdown import breakdown
from tintc.compiler.reports.cost import COUNTED
from tintc.compiler.verification import verify
from tintc.ir.call_sizes import CallSizes, Predict
from tintc.ir.dialect import tint_name
from tintc.runtime.simulator import Simulator
from tintc.runtime.specialize import programs

LIMIT = SIMULATOR[torch.float64]


def test_adapted_weights_predict_texts_of_any_length() -> None:
    sim, ids, train = simulator(LONGROPE), tokens_of(1, 14), trained(1, 14, 8)
    for form in ("weights", "factors"):
        adapted = sim.adapt(ids, train, form=form)
        for length in (7, 14):
            with torch.no_grad():
                found = adapted(ids[:, :length]).logits[0]
            with no_casts():
                after = stepped(model(LONGROPE), EXACT, ids[0, :length], min(length, 8))
            if length == 14:
                assert error(found, after[1]) < LIMIT
        state = sim.updated_state_dict(ids, train)
        with no_casts(), torch.no_grad():
            weights = {name: state[name] for name, _ in model(LONGROPE).named_parameters()}
            assert (
                error(
                    adapted(ids[:, :7]).logits[0], first_call(model(LONGROPE), weights, ids[0, :7])
                )
                < LIMIT
            )


@pytest.mark.parametrize("name", [DYNAMIC, LONGROPE])
def test_generated_text_is_read_anew(name: str) -> None:
    """Every token is what the model, called with all tokens before, holds for the likeliest: keys
    of a shorter text are others.
    """
    sim, ids = simulator(name), tokens_of(1, 8)
    adapted = sim.adapt(ids, trained(1, 8, 6))
    with pytest.warns(UserWarning, match="reads the whole text anew: the rotary frequencies of"):
        found = adapted.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)[0]
    state = sim.updated_state_dict(ids, trained(1, 8, 6))
    weights = {each: state[each] for each, _ in model(name).named_parameters()}
    expected = ids[0]
    for _ in range(5):
        with no_casts(), torch.no_grad():
            logits = first_call(model(name), weights, expected)
        expected = torch.cat([expected, logits[-1:].argmax(-1)])
    assert len(expected) > ORIGINAL
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("name", [DYNAMIC, LONGROPE])
def test_streams(name: str) -> None:
    """A window is a call of its own tokens: the first ones are shorter than the original length,
    the others longer.
    """
    config = dataclasses.replace(EXACT, steps=1)
    sim, ids = simulator(name, config), tokens_of(24)
    found = sim.score_first(ids[None], chunk=5, context=8).losses[0]
    weights = {each: value.detach() for each, value in model(name).named_parameters()}
    names = [slot.parameter for slot in sim.program.layout.prefix.values() if slot.trainable]
    losses = []
    for start in range(1, 24, 5):
        end = min(start + 5, 24)
        window = ids[max(0, start - 1 - 8) : end - 1]
        leaves = {each: weights[each].requires_grad_() for each in dict.fromkeys(names)}
        with no_casts():
            logits = first_call(model(name), {**weights, **leaves}, window)[start - end :]
            each = F.cross_entropy(logits, ids[start:end], reduction="none")
        gradients = torch.autograd.grad(each.sum(), list(leaves.values()))
        moved = zip(leaves.items(), gradients, strict=True)
        weights |= {n: (w - RATE * g).detach() for (n, w), g in moved}
        losses.append(each.detach())
    expected = torch.cat(losses)
    assert error(found[~found.isnan()], expected) < LIMIT


def test_an_artifact_runs_the_same(tmp_path: Path) -> None:
    """And a forged one, which does not say that its calls have a length, is refused."""
    sim, ids, train = simulator(LONGROPE), tokens_of(2, 14), trained(2, 14, 8)
    tintc.save(sim, tmp_path / "sim")
    loaded = tintc.load(tmp_path / "sim")
    assert loaded.program.facts.by_length == "model.layers.0.self_attn"
    with torch.inference_mode():
        assert torch.equal(loaded(ids, train).logits, sim(ids, train).logits)
    seal(tmp_path / "sim", lambda manifest: manifest["facts"].update(by_length=""))
    with pytest.raises(tintc.ArtifactError, match="calls of this model have no length"):
        tintc.load(tmp_path / "sim")


@pytest.mark.slow
@some("name", [DYNAMIC, LONGROPE], default=[LONGROPE])
def test_verify_agrees(name: str) -> None:
    sim = tintc.compile(LONG[name](), EXACT, check="none")
    found = verify(sim, tokens=26)
    assert found.agrees and found.reference.endswith("ForCausalLM")


@pytest.mark.slow
@some("in_half", [False, True], default=[True])
def test_half_precision_is_near(in_half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Frequencies stay in float32. in_half: computed as on a GPU."""
    if in_half:
        monkeypatch.setattr(programs, "computed_dtype", lambda stored, device: stored)
    ids, train = tokens_of(2, 24), trained(2, 24, 8)
    sim = short_simulator(LONG[DYNAMIC]().to(torch.bfloat16), EXACT)
    with torch.inference_mode():
        found, expected = sim(ids, train).logits, simulator(DYNAMIC)(ids, train).logits
    assert found.dtype == torch.bfloat16
    assert error(found, expected) < HALF_LOGITS[torch.bfloat16]


@pytest.mark.slow
def test_onnx_computes_the_same(tmp_path: Path) -> None:
    """A call and a window of a stream; what is exported is compared at 2, 19 and 64 tokens."""
    sim = short_simulator(copy.deepcopy(model(DYNAMIC)), EXACT)
    outputs = ("logits", "initial_logits")
    found = tintc.export_onnx(sim, tmp_path / "a.onnx", inputs=["attention_mask"], outputs=outputs)
    assert found.check is not None and any("64" in each for each in found.check.inputs)
    assert tintc.export_onnx(sim, tmp_path / "b.onnx", stream=True, chunk=5, context=8).check


@pytest.mark.slow
def test_torch_exports_it() -> None:
    """Both programs, for any batch and length."""
    sim = simulator(LONGROPE)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.simulator = sim

        def forward(self, ids: Tensor, train: Tensor) -> Tensor:
            logits: Tensor = self.simulator(ids, train).logits
            return logits

    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    given = tokens_of(2, 9), trained(2, 9, 5)
    exported = torch.export.export(Logits(), given, dynamic_shapes=(sizes, sizes), strict=False)
    ids, train = tokens_of(3, 24), trained(3, 24, 8)
    with torch.no_grad():
        assert error(exported.module()(ids, train), sim(ids, train).logits) < LIMIT


class TestRefused:
    def test_keys_that_stay(self) -> None:
        with pytest.raises(
            tintc.UsageError, match=r"keys=cache: the rotary frequencies of model\."
        ):
            simulator(DYNAMIC).stream(chunk=5, context=8, keys="cache")

    def test_a_cache(self) -> None:
        adapted = simulator(DYNAMIC).adapt(tokens_of(1, 8), trained(1, 8, 6))
        with pytest.raises(tintc.UsageError, match="keys of a shorter one are others"):
            adapted(tokens_of(1, 8), use_cache=True)

    def test_a_pair_of_onnx_models(self, tmp_path: Path) -> None:
        with pytest.raises(tintc.UsageError, match="a pair caches keys: the rotary frequencies"):
            tintc.export_onnx_pair(simulator(DYNAMIC), tmp_path / "pair")
        assert not list(tmp_path.iterdir())

    @pytest.mark.slow
    def test_the_transformer_back_end(self) -> None:
        with pytest.raises(
            tintc.UnsupportedModelError, match=r"frequencies that depend on the leng"
        ):
            tintc.compile(LONG[DYNAMIC](), EXACT, backend="transformer")


@pytest.mark.slow
def test_a_length_that_no_sequence_has_changes_nothing() -> None:
    """Up to 4096 tokens there is one table, as before."""
    described = copy.deepcopy(model(DYNAMIC).config)
    described.max_position_embeddings = 4096
    sim = simulate(type(model(DYNAMIC))(described).double().eval(), EXACT)
    assert not sim.program.facts.by_length
    assert "wave" not in {tint_name(node) for node in sim.program.graph.nodes}


@some(
    ("steps", "predict"),
    [(steps, predict) for steps in (2, 6) for predict in ("all", "rest")],
    default=[(6, "rest")],
)
def test_costs_count_both_programs(steps: int, predict: Predict) -> None:
    """The FLOPs of a call, as a whole and row by row, are those that torch counts of a real one."""
    names = [name for name in COUNTED if name != "flash_attention"]
    made = simulator(DYNAMIC, dataclasses.replace(EXACT, steps=steps, layers=1))
    tensors = {name: value.float() for name, value in made.prefix.tensors().items()}
    sim = Simulator(made.program, tensors, optimize=names)
    sizes: CallSizes = {"batch": 2, "tokens": 24, "segment": 11}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counting() as counter:
        sim(tokens_of(2, 24), trained(2, 24, 12), predict=predict)
    whole = estimate(
        sim.program, "fused", torch.float32, optimize=names, predict=predict, **sizes
    ).flops
    assert whole == counter.get_total_flops()
    rows = breakdown(sim, sizes, optimize=names, predict=predict)
    assert rows["flops"] == whole
    assert rows["lower_bound"] <= whole


def test_frequencies_are_the_librarys_to_the_bit() -> None:
    """In float32, where the last digit of a frequency is 4096 times as much at position 4096."""
    described = copy.deepcopy(model(DYNAMIC).config)
    described.head_dim = 128
    sim = short_simulator(type(model(DYNAMIC))(described).eval(), EXACT)
    table = sim.program.tables["tintc.wide_table_0"]
    compute = ROPE_INIT_FUNCTIONS["dynamic"]
    for row, length in zip(table, range(ORIGINAL, 65), strict=True):
        expected, _ = compute(described, torch.device("cpu"), seq_len=torch.tensor(length))
        assert torch.equal(row, torch.cat([expected, expected]))
