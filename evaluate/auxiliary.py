"""One auxiliary model, loaded and captured once; simulators of it share its weights."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tintc.compiler.checks import check_first_forward
from tintc.compiler.driver import examiner, lower
from tintc.compiler.frontend.capture import capture
from tintc.compiler.frontend.sources import load_source
from tintc.compiler.gradient_statistics import (
    Statistics,
    chosen_statistics,
    read_statistics,
)
from tintc.evaluate.learners import DynamicEvaluation, Simulated, Unmodified
from tintc.evaluate.speed.benchmark import updated_parameters
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import SourceError
from tintc.ir.facts import ModelFacts
from tintc.ir.named import LOAD
from tintc.ir.precision import dtype_name
from tintc.runtime.simulator import Simulator


class Auxiliary:
    """The model that is fine-tuned, and everything that fine-tunes it.

    source: as for `tintc.compile`; or a module, with its tokenizer. statistics: what the optimizer
    `rms` divides by, of simulators and of dynamic evaluation alike. options: of `load_source`.
    Raises what `tintc.compile` raises, and SourceError for a source without a tokenizer.
    """

    def __init__(
        self,
        source: str | nn.Module,
        *,
        tokenizer: Any = None,
        device: str | None = None,
        progress: Callable[[str], None] = lambda stage: None,
        statistics: str | Path | Statistics | None = None,
        **options: Any,
    ) -> None:
        self._source = source
        self._statistics = (
            read_statistics(statistics) if isinstance(statistics, (str, Path)) else statistics
        )
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
        given = self._statistics
        return {
            **named,
            **({} if given is None else {"statistics": given.about.sha256}),
            "digest": digest,
            "dtype": dtype_name(kind.dtype),
            "device": kind.device.type,
        }

    def simulator(self, config: SimulatorConfig) -> Simulator:
        """Lowered at first use; configs that differ in the inner learning rate alone share one."""
        config = dataclasses.replace(config, inner_lr=SimulatorConfig().inner_lr)
        if config not in self._simulators:
            captured = self._captured.copy()
            program, tensors = lower(captured, config), captured.tensors
            if (found := self._divides_by(config)) is not None:
                tensors = tensors | found.for_program(program, tensors, self.description["sha256"])
            self._simulators[config] = Simulator(program, tensors, tokenizer=self.tokenizer)
        return self._simulators[config]

    def _divides_by(self, config: SimulatorConfig) -> Statistics | None:
        """What a config's optimizer needs. Raises UsageError where it is not there."""
        if config.optimizer != "rms":
            return None
        return chosen_statistics(self._source, self._statistics, config)

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
        simulator = self.simulator(exact)
        return DynamicEvaluation(simulator, config, self._root_mean_squares(simulator, config))

    def _root_mean_squares(
        self, simulator: Simulator, config: SimulatorConfig
    ) -> dict[str, torch.Tensor]:
        """Of all weights that exact gradients train, which may be more than the config's do. Raises
        UsageError if one is missing.
        """
        found = self._divides_by(config)
        tensors = simulator.prefix.tensors()
        trained = {name: tensors[name].detach() for name in updated_parameters(simulator)}
        return {} if found is None else found.of_weights(trained)


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """Of names, shapes and bytes: a module's weights have no file that could be named."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        found.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()
