"""What one sequence has made of the auxiliary model, as a checkpoint that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from tintc.compiler import libraries
from tintc.compiler.frontend.compiled import architecture, fill, without_weights
from tintc.compiler.network import without_network
from tintc.compiler.tokenizer_files import write_tokenizer
from tintc.ir.errors import SourceError, UsageError
from tintc.runtime.simulator import Simulator

_INSTEAD = "expected a model that transformers knows; use the format peft or tintc"


def model_without_weights(simulator: Simulator) -> PreTrainedModel:
    """The auxiliary model on the meta device, by its config alone; no code is run that came with
    it.

    Raises UsageError where there is no config, or transformers knows no such model.
    """
    config = simulator.source.get("config")
    if not config:
        raise UsageError(f"this simulator's model came without a config; {_INSTEAD}")
    name = str(simulator.source.get("name") or config.get("model_type"))
    try:
        with libraries.quiet(), without_network():
            model = without_weights(architecture(config, name), name, simulator.own_dtype)
    except SourceError as error:
        raise UsageError(f"{error}; {_INSTEAD}") from error
    assert isinstance(model, PreTrainedModel)
    return model


def checkpoint_of(simulator: Simulator, state: dict[str, Tensor]) -> PreTrainedModel:
    """The model under a state dict; of a half-precision simulator all of it in float32, which keeps
    what was learned. Raises UsageError for a model that its config does not
    describe, and as `model_without_weights`.
    """
    model, aliases = model_without_weights(simulator), simulator.program.aliases
    kind = simulator.own_dtype
    weights = {
        name: value.to("cpu", kind if value.is_floating_point() else None)
        for name, value in state.items()
        if name not in aliases
    }
    try:
        fill(model, weights, aliases, str(simulator.source.get("name")))
    except SourceError as error:
        raise UsageError(f"{error}; {_INSTEAD}") from error
    return model


def write_checkpoint(model: PreTrainedModel, tokenizer: Any | None, root: Path) -> None:
    """config.json, weights, generation_config.json and the tokenizer's files. Tied weights stand
    there once, as transformers has them.
    """
    with libraries.quiet():
        model.save_pretrained(root)
        write_tokenizer(tokenizer, root)
