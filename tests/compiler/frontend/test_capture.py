import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.models import FAMILIES, gpt2, opt
from tests.support.nano import nano
from tests.support.stages import inputs, numbers, stage
from tests.support.tolerances import error
from tests.support.toys import Toy, toy
from tintc.compiler.frontend.capture import capture
from tintc.ir.errors import UnsupportedModelError
from tintc.ir.node_meta import info


@pytest.mark.parametrize("family", FAMILIES)
def test_graph_computes_the_models_logits_for_any_shape(family: str) -> None:
    model = FAMILIES[family](vocab=19)
    for batch, length in ((1, 2), (3, 9), (1, 16)):
        given = inputs(batch, length)
        with torch.no_grad():
            expected = model(given["input_ids"]).logits
        assert error(numbers(stage(None, model=model), given), expected) < 1e-12


@pytest.mark.parametrize("family", FAMILIES)
def test_state_is_complete_and_tied_entries_appear_once(family: str) -> None:
    model = FAMILIES[family]()
    captured = capture(model)
    assert set(captured.tensors) | set(captured.aliases) == set(model.state_dict())
    assert not set(captured.tensors) & set(captured.aliases)
    assert captured.aliases["lm_head.weight"] in (
        "model.decoder.embed_tokens.weight",
        "transformer.wte.weight",
    )
    used = [info(n).parameter for n in captured.graph.nodes if info(n).role == "parameter"]
    assert len(used) == len(set(used))
    assert set(used) <= set(captured.tensors)


def test_untied_entries_stay_apart() -> None:
    captured = capture(gpt2(tie_word_embeddings=False))
    assert captured.aliases == {}
    assert "lm_head.weight" in captured.tensors


def test_one_input_and_one_output() -> None:
    captured = capture(opt())
    assert [n.name for n in captured.graph.nodes if info(n).role == "input"] == ["input_ids"]
    assert len(captured.graph.output_node().args[0]) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_operator_says_where_it_comes_from(family: str) -> None:
    """Module path, and file and line without a folder of this machine."""
    model = FAMILIES[family]()
    modules = dict(model.named_modules())
    found = set()
    for node in capture(model).graph.nodes:
        if node.op == "call_function" and any(
            part in str(node.target) for part in ("linear", "addmm", "layer_norm", "embedding")
        ):
            assert info(node).module in modules, node.name
            assert re.fullmatch(r"transformers/[\w/]+\.py:\d+", info(node).source), info(
                node
            ).source
            found.add(info(node).module)
    assert len(found) > 10


def test_a_hand_written_models_source_is_a_file_name() -> None:
    sources = {info(n).source for n in capture(nano()).graph.nodes if "layer_norm" in str(n.target)}
    assert all(re.fullmatch(r"nano\.py:\d+", source) for source in sources)


def test_the_model_is_left_as_it_was() -> None:
    model = nano()
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    captured = capture(model)
    assert model.training
    assert all(block.drop.training for block in model.blocks)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert "dropout" in str(captured.graph)  # captured as of eval mode: a dropout that does nothing
    (drop, *_) = [n for n in captured.graph.nodes if "dropout" in str(n.target)]
    assert drop.args[2] is False


class Wrong(nn.Module):
    def __init__(self, answer: object) -> None:
        super().__init__()
        self.weight, self.answer = nn.Parameter(torch.zeros(3)), answer

    def forward(self, input_ids: Tensor) -> object:
        return self.answer(input_ids, self.weight)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda ids, w: ids * w[0],
            r"Wrong returned a tensor of 2 dimensions; expected logits of shape "
            r"\(batch, tokens, vocabulary\)",
        ),
        (lambda ids, w: {"scores": w}, "expected logits of shape"),
        (
            lambda ids, w: (ids[..., None] * w) if bool((ids > 0).any()) else w,
            "torch.export cannot trace Wrong",
        ),
        (lambda ids, w: (ids[..., None] * w).expand(2, 8, 3), "torch.export cannot trace Wrong"),
    ],
    ids=["two dimensions", "a dict", "branches on values", "one batch size only"],
)
def test_refused(answer: object, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        capture(Wrong(answer))
    assert "\n" not in str(caught.value)


def test_a_model_may_return_logits_first_in_a_tuple() -> None:
    class Pair(Toy):
        def forward(self, input_ids: Tensor) -> tuple[Tensor, int]:  # type: ignore[override]
            return super().forward(input_ids), 7

    model = toy(lambda m, x, ids: m.linear(x))
    model.__class__ = Pair
    given = inputs()
    assert error(numbers(stage(None, model=model), given), model(given["input_ids"])[0]) < 1e-12


def test_what_a_model_keeps_in_dicts_and_lists_is_left_as_it_was() -> None:
    """Tables of the tracer have no numbers: the model would fail, or be traced, with them."""

    def kept(m: Any, x: Tensor, ids: Tensor) -> Tensor:
        known = m.tables.get("angles")
        if known is None or known.shape[0] < x.shape[1]:
            m.tables["angles"] = torch.arange(x.shape[1], device=x.device)[:, None].to(x.dtype)
            m.history.append(m.tables["angles"])
        return x + m.tables["angles"][: x.shape[1]].cos()

    model = toy(kept)
    model.tables, model.history = {}, []  # type: ignore[assignment]
    first, again = capture(model), capture(model)
    assert not model.tables and not model.history
    assert [str(n.target) for n in first.graph.nodes] == [str(n.target) for n in again.graph.nodes]
    given = inputs(length=5)
    before = model(given["input_ids"])
    assert len(model.history) == 1
    assert error(numbers(stage(None, model=model), given), before) < 1e-12
    assert len(model.history) == 1


@pytest.mark.parametrize("name", ["targets", "labels", "more"])
def test_a_model_may_give_all_logits_only_with_targets(name: str) -> None:
    """As nanoGPT does; one that takes none is refused."""

    class Last(Toy):
        def forward(self, ids: Tensor, targets: Tensor | None = None) -> Any:  # type: ignore[override]
            logits = super().forward(ids)
            if targets is None:
                return logits[:, [-1], :], None
            return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    class Labelled(Last):
        def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:  # type: ignore[override]
            return super().forward(input_ids, labels)

    class Bare(Last):
        def forward(self, input_ids: Tensor, more: Tensor | None = None) -> Any:  # type: ignore[override]
            return super().forward(input_ids, more)

    model = toy(lambda m, x, ids: m.linear(x))
    plain, given = model(inputs()["input_ids"]), inputs()
    model.__class__ = {"targets": Last, "labels": Labelled, "more": Bare}[name]
    if name == "more":
        with pytest.raises(UnsupportedModelError, match="Bare returned logits of one token; exp"):
            capture(model)
        return
    found = stage(None, model=model)
    assert error(numbers(found, given), plain) < 1e-12
    assert sum("linear" in str(n.target) for n in found.graph.nodes) == sum(
        "linear" in str(n.target)
        for n in stage(None, model=toy(lambda m, x, ids: m.linear(x))).graph.nodes
    )  # of one call


@pytest.mark.parametrize(
    ("condition", "limit"),
    [
        ("t <= 20", 20),
        ("t < 33", 32),
        ("t <= 500", 500),
        ("t // 2 <= 60", 121),
        ("t % 40 != 0", 39),
        ("True", None),
    ],
)
def test_lengths_that_leave_a_branch_are_a_limit(condition: str, limit: int | None) -> None:
    """The graph stands for the branch that 8 tokens take; `eval` keeps one model for all
    conditions.
    """
    model = toy(lambda m, x, ids: m.linear(x) if eval(condition, {"t": x.shape[1]}) else m.norm(x))
    assert capture(model).max_tokens == limit


def test_a_slice_that_happens_to_be_whole_is_no_limit_of_its_own() -> None:
    """Positions of 12 rows: a graph for fewer tokens computes the same at all 12."""
    assert capture(toy(lambda m, x, ids: x + m.positions.weight[: x.shape[1]])).max_tokens in (
        None,
        12,
    )


@pytest.mark.parametrize(
    ("condition", "least", "most"), [("t > 4", 5, None), ("t > 2 and t <= 40", 3, 40)]
)
def test_a_guard_of_short_lengths_is_the_shortest(
    condition: str, least: int, most: int | None
) -> None:
    model = toy(lambda m, x, ids: m.linear(x) if eval(condition, {"t": x.shape[1]}) else m.norm(x))
    found = capture(model)
    assert (found.min_tokens, found.max_tokens) == (least, most)


def test_short_lengths_that_are_computed_alike_are_no_limit() -> None:
    """One token less than two is one, of which the tracer says that it is another case."""
    found = capture(toy(lambda m, x, ids: torch.cat((x[:, :1], m.linear(x[:, 1:].clone())), 1)))
    assert (found.min_tokens, found.max_tokens) == (0, None)


@pytest.mark.parametrize("condition", ["t % 2 == 0", "t == 8", "b == 2", "b < 4"])
def test_other_branches_are_refused(condition: str) -> None:
    model = toy(
        lambda m, x, ids: (
            m.linear(x) if eval(condition, {"t": x.shape[1], "b": x.shape[0]}) else m.norm(x)
        )
    )
    with pytest.raises(
        UnsupportedModelError,
        match=r"computes different things for different batches or lengths|cannot trace",
    ):
        capture(model)
