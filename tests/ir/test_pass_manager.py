import logging

import pytest
from torch import fx

from tests.support.stages import NAMES, nano_captured, printed, stage
from tintc.ir.config import SimulatorConfig
from tintc.ir.context import Context
from tintc.ir.contracts import PROPERTIES
from tintc.ir.errors import CompilerBug
from tintc.ir.pass_manager import graph_pass, run_passes
from tintc.passes.lowering import DEFAULT_PIPELINE


@graph_pass(requires=("tint_only",))
def needs_tint(graph: fx.Graph, context: Context) -> fx.Graph:
    raise AssertionError("must not run")


@graph_pass(ensures=("tint_only",))
def promises_tint(graph: fx.Graph, context: Context) -> fx.Graph:
    return graph


@graph_pass()
def spoils_a_shape(graph: fx.Graph, context: Context) -> fx.Graph:
    next(n for n in graph.nodes if n.name == "blocks_0_up").meta["tint"].shape = ("B", 3)
    return graph


@graph_pass(ensures=("shapes_agree",))
def spoils_a_promised_shape(graph: fx.Graph, context: Context) -> fx.Graph:
    return spoils_a_shape(graph, context)


@graph_pass()
def changes_nothing(graph: fx.Graph, context: Context) -> fx.Graph:
    return graph


def fresh() -> tuple[fx.Graph, Context]:
    captured = nano_captured()
    return captured.graph, Context(SimulatorConfig.paper(), captured.tensors, captured.constants)


def test_requires_is_checked_before_the_pass_runs() -> None:
    with pytest.raises(
        CompilerBug,
        match=r"pass needs_tint requires tint_only, which does not hold: .* calls aten\.",
    ):
        run_passes(*fresh(), [needs_tint])


def test_ensures_is_checked_after() -> None:
    with pytest.raises(
        CompilerBug,
        match=r"pass promises_tint ensures tint_only, which does not hold: .* calls aten\.",
    ):
        run_passes(*fresh(), [promises_tint])


def test_verify_each_checks_what_no_contract_names(monkeypatch: pytest.MonkeyPatch) -> None:
    at = stage("refuse_unsupported")
    with pytest.raises(
        CompilerBug,
        match=r"pass spoils_a_shape keeps shapes_agree, which does not hold: blocks_0_up has shape",
    ):
        run_passes(at.graph, at.context, [spoils_a_shape], verify_each=True)
    at = stage("refuse_unsupported")
    run_passes(at.graph, at.context, [spoils_a_shape], verify_each=False)
    at = stage("refuse_unsupported")
    monkeypatch.setenv("TINTC_VERIFY", "1")
    with pytest.raises(CompilerBug):
        run_passes(at.graph, at.context, [spoils_a_shape])
    at = stage("refuse_unsupported")
    monkeypatch.delenv("TINTC_VERIFY")
    run_passes(at.graph, at.context, [spoils_a_shape])


def test_what_is_ensured_of_the_whole_graph_is_checked_at_the_end() -> None:
    seen: list[str] = []
    passes = [spoils_a_promised_shape, changes_nothing]
    at = stage("refuse_unsupported")
    with pytest.raises(
        CompilerBug,
        match=r"shapes_agree does not hold after a pipeline in which spoils_a_promised_shape "
        r"ensure it: blocks_0_up has shape .* its rule gives .*; TINTC_VERIFY=1 says after which",
    ):
        run_passes(
            at.graph,
            at.context,
            passes,
            verify_each=False,
            on_pass=lambda done, _: seen.append(done),
        )
    assert seen == ["spoils_a_promised_shape", "changes_nothing"]
    at = stage("refuse_unsupported")
    with pytest.raises(CompilerBug, match="pass spoils_a_promised_shape ensures shapes_agree"):
        run_passes(at.graph, at.context, passes, verify_each=True)


@pytest.mark.parametrize("name", NAMES)
def test_stop_after_every_pass(name: str) -> None:
    graph, context = fresh()
    seen: list[str] = []
    run_passes(
        graph, context, DEFAULT_PIPELINE, stop_after=name, on_pass=lambda done, _: seen.append(done)
    )
    assert seen == NAMES[: NAMES.index(name) + 1]
    assert (context.layout is not None) == (NAMES.index(name) >= NAMES.index("assign_prefix_slots"))


def test_stop_after_an_unknown_pass() -> None:
    with pytest.raises(CompilerBug, match="stop_after='fuse' is not in the pipeline: canonicalize"):
        run_passes(*fresh(), DEFAULT_PIPELINE, stop_after="fuse")


def test_logs_what_each_pass_changed(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tintc.passes"):
        run_passes(*fresh(), DEFAULT_PIPELINE, stop_after="recognize_arithmetic")
    lines = dict(
        record.getMessage().split(": ", 1)
        for record in caplog.records
        if record.name == "tintc.passes"
    )
    assert list(lines) == NAMES[: NAMES.index("recognize_arithmetic") + 1]
    assert lines["canonicalize"] == "-2 aten.dropout.default"
    assert (
        lines["recognize_activation"] == "-2 aten.gelu.default, +2 tint.activation_forward.default"
    )
    assert lines["recognize_arithmetic"] == "-5 aten.add.Tensor, +5 tint.residual.default"


def test_a_pass_that_changes_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    at = stage("refuse_unsupported")
    with caplog.at_level(logging.INFO, logger="tintc.passes"):
        run_passes(at.graph, at.context, [DEFAULT_PIPELINE[NAMES.index("refuse_unsupported")]])
    assert "refuse_unsupported: no change" in caplog.messages


def test_contracts_name_known_properties() -> None:
    for step in DEFAULT_PIPELINE:
        assert set(step.requires) | set(step.ensures) <= set(PROPERTIES), step.name
        assert step.run.__doc__, step.name


def test_the_pipeline_is_deterministic() -> None:
    texts = []
    for _ in range(2):
        graph, context = fresh()
        texts.append(printed(run_passes(graph, context, DEFAULT_PIPELINE)))
    assert texts[0] == texts[1]
