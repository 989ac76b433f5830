"""Kinds of output: which belong together, and that their names are the ones that files hold."""

import json

import pytest

from tintc.ir.inputs import FURTHER_INPUTS
from tintc.ir.outputs import LOWERED, Output, without_losses

L, I, LO, IO, U, S, C, F = Output  # noqa: E741 (in the order of the names below)
NAMES = ["logits", "initial_logits", "losses", "initial_losses", "updates", "states", "cache"]
NAMES += ["frozen"]


def test_names_are_those_of_files() -> None:
    assert [kind.value for kind in Output] == NAMES == json.loads(json.dumps(list(Output)))
    assert dict.fromkeys(Output, 1) == dict.fromkeys(NAMES, 1)
    assert LOWERED == (L, I, U)


def test_relations() -> None:
    assert [kind.logits for kind in Output] == [L, I, L, I, U, S, C, F]
    assert (L.losses, I.losses) == (LO, IO)
    assert [kind.before for kind in (L, I, LO, IO)] == [I, I, IO, IO]
    assert [kind.is_before for kind in Output] == [False, True, False, True, *[False] * 4]
    assert [kind.of_losses for kind in Output] == [False, False, True, True, *[False] * 4]
    assert {L.into, I.into} == {name for name in FURTHER_INPUTS if name.endswith("_into")}


@pytest.mark.parametrize("wrong", [lambda: U.before, lambda: LO.losses, lambda: Output("loss")])
def test_what_does_not_exist_is_an_error(wrong: object) -> None:
    with pytest.raises((KeyError, ValueError)):
        wrong()  # type: ignore[operator]


def test_logits_in_place_of_losses_each_once() -> None:
    assert without_losses((LO, L, IO, U)) == (L, I, U)
