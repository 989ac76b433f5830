"""One auxiliary model, loaded and captured once; simulators of it share its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tintc.compiler.checks import check_first_forward
from tintc.compiler.driver import examiner, lower
from tintc.compiler.frontend.capture import capture
from tintc.compiler.frontend.sources import load_source
from tintc.evaluate.learners import DynamicEvaluation, Simulated, Unmodified
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import SourceError
from tintc.ir.facts import ModelFacts
from tintc.ir.named import LOAD
from tintc.runtime.simulator import Simulator


class Auxiliary:
    """The model that is fine-tuned, and everything that fine-tunes it.

    source: as for `tintc.compile`; or a module, with its tokenizer. options: of `load_source`.
    Raises what `tintc.compile` raises, and SourceError for a source without a tokenizer.
    """

    def __init__(
        self,
        source: str | nn.Module,
        *,
        tokenizer: Any = None,
        device: str | None = None,
        progress: Callable[[str], None] = lambda stage: None,
        **options: Any,
    ) -> None:
        progress(LOAD)
        examine = examiner(SimulatorConfig.paper())
        loaded = load_source(source, progress=progress, examine=examine, **options)
        self.tokenizer = tokenizer or loaded.tokenizer
        if self.tokenizer is None:
            raise SourceError(
                f"{source} has no tokenizer; expected a source with one, since the data are texts"
            )
        progress("capture")
        self._captured = capture(loaded.model)
        self.description = dataclasses.asdict(loaded.description)
        self._simulators: dict[SimulatorConfig, Simulator] = {}
        progress("check")
        first = self.simulator(SimulatorConfig.paper())
        check_first_forward(first, loaded.model)
        if device is not None:
            self._captured.tensors = {
                name: tensor.to(device) for name, tensor in self._captured.tensors.items()
            }
            self._simulators.clear()

    @property
    def facts(self) -> ModelFacts:
        return self.simulator(SimulatorConfig.paper()).program.facts

    @property
    def identity(self) -> dict[str, Any]:
        """What results of this model are stored under: where the weights came from, a digest of
        them, their type and device.
        """
        tensors = self._captured.tensors.values()
        named = {
            name: self.description[name] for name in ("kind", "name", "revision", "sha256", "seed")
        }
        digest = next((named[name] for name in ("sha256", "seed") if named[name] is not None), None)
        if digest is None:
            digest = _digest(self._captured.tensors)
        kind = next(tensor for tensor in tensors if tensor.is_floating_point())
        return {
            **named,
            "digest": digest,
            "dtype": str(kind.dtype).removeprefix("torch."),
            "device": kind.device.type,
        }

    def simulator(self, config: SimulatorConfig) -> Simulator:
        """Lowered at first use; configs that differ in the inner learning rate alone share one."""
        config = dataclasses.replace(config, inner_lr=SimulatorConfig().inner_lr)
        if config not in self._simulators:
            captured = self._captured.copy()
            self._simulators[config] = Simulator(
                lower(captured, config), captured.tensors, tokenizer=self.tokenizer
            )
        return self._simulators[config]

    def forget_simulators(self) -> None:
        """Lets go of those that were lowered: each may hold copies of weights in the form that its
        program reads.
        """
        self._simulators.clear()

    def unmodified(self) -> Unmodified:
        return Unmodified(self.simulator(SimulatorConfig.paper()))

    def simulated(self, config: SimulatorConfig) -> Simulated:
        """The simulator of a config at its inner learning rate."""
        return Simulated(self.simulator(config), config.inner_lr)

    def dynamic_evaluation(self, config: SimulatorConfig) -> DynamicEvaluation:
        """torch.autograd by the same rule, for as many steps on the same weights, through
        everything that the config approximates.
        """
        chosen = (
            {"train": config.train}
            if config.train
            else {"layers": config.layers, "norm_update": config.norm_update}
        )
        exact = SimulatorConfig.exact(**chosen, lr_scale=config.lr_scale)
        return DynamicEvaluation(self.simulator(exact), config)


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """Of names, shapes and bytes: a module's weights have no file that could be named."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        found.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()
