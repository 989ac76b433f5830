"""What a compiled simulator is made of, and what its user may switch: optimizations, torch.compile,
memory, the calibration.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NoReturn, Self

import torch
from torch import Tensor, nn

from tintc.ir.calibration import Calibration
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UsageError
from tintc.ir.precision import wide_dtype
from tintc.ir.program import Program
from tintc.runtime.backends.transformer.pages import PrefixPages
from tintc.runtime.backends.transformer.structure import Structure
from tintc.runtime.calibration import Wanted, wanted_calibration
from tintc.runtime.inputs import NO_TORCHSCRIPT
from tintc.runtime.prefix import PrefixEmbeddings
from tintc.runtime.slices import Memory, read_memory
from tintc.runtime.specialize.programs import Programs


@dataclass(frozen=True)
class Switches:
    """How a program runs; `Simulator` says what each is."""

    backend: str
    share: str
    optimize: bool | Collection[str]
    torch_compile: str | None
    memory: str | int
    calibration: Wanted


class Switched(nn.Module):
    """A program with its weights. None of its settings changes results but by rounding."""

    program: Program
    prefix: PrefixEmbeddings | PrefixPages  # the auxiliary weights, as they are or in pages
    structure: Structure | None  # the transformer's constants; they need no gradient
    inner_lr: nn.Parameter
    _programs: Programs
    _memory: Memory

    @property
    def config(self) -> SimulatorConfig:
        return self.program.config

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self._weight.dtype

    @property
    def own_dtype(self) -> torch.dtype:
        """Type of what sequences learn: at least float32, but in the transformer's pages."""
        return wide_dtype(self.dtype) if self.structure is None else self.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self._weight.device

    def check_has_numbers(self) -> None:
        """Raises UsageError on the meta device, where weights have shapes alone."""
        if self.device.type == "meta":
            raise UsageError(
                "the simulator is on the meta device, where weights have no numbers; expected one "
                "with numbers: move it with to_empty(device=...) and load its state dict"
            )

    def on(self, tensors: Mapping[str, Tensor], inner_lr: Tensor | None = None) -> Self:
        """The same emitted programs on other weights, for the fused back end. tensors: all that the
        program reads, by name, of these shapes and this type. inner_lr: another one.
        """
        other = copy.copy(self)
        other._parameters = dict(self._parameters)
        other.prefix, other._programs = PrefixEmbeddings(tensors), self._programs
        if inner_lr is not None:
            other.inner_lr = nn.Parameter(inner_lr)
        return other

    @property
    def optimizations(self) -> tuple[str, ...]:
        """Names of the optimizations of the fused back end that are on; set it to switch them. They
        change results by rounding only.
        """
        return self._programs.enabled if self.structure is None else ()

    @optimizations.setter
    def optimizations(self, names: bool | Collection[str]) -> None:
        self.optimize(names, self._programs.torch_compile)

    def optimize(
        self, names: bool | Collection[str] = True, torch_compile: str | None = None
    ) -> None:
        """Switches optimizations and torch.compile, as `tintc.compile` does. Raises UsageError for
        an unknown name or mode.
        """
        self._with_programs(names, torch_compile, self._programs.calibration)

    def _with_programs(
        self,
        names: bool | Collection[str],
        torch_compile: str | None,
        wanted: Calibration | None,
    ) -> None:
        self._programs = Programs(self.program, self.structure, names, torch_compile, wanted)

    @property
    def calibration(self) -> Calibration:
        """How fast the machine is, as optimizations choose by it. Set it to `auto`, the machine's
        own; `off`, what no machine changes; a file of `tintc env --calibrate`; or a Calibration.
        """
        return self._programs.speed(self._weight)

    @calibration.setter
    def calibration(self, value: Wanted) -> None:
        programs = self._programs
        self._with_programs(programs.enabled, programs.torch_compile, wanted_calibration(value))

    @property
    def memory(self) -> Memory:
        """How much activations may hold, by which a batch runs in slices; set it as the argument
        of the class.
        """
        return self._memory

    @memory.setter
    def memory(self, value: str | int) -> None:
        self._memory = read_memory(value)

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script calls first."""
        raise UsageError(NO_TORCHSCRIPT)

    @property
    def _differentiable(self) -> bool:
        """Whether someone may ask for gradients through a call now: grad mode is on and a parameter
        asks for it, or torch exports.
        """
        return torch.compiler.is_compiling() or (
            torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        )

    @property
    def _weight(self) -> nn.Parameter:
        """Any one of the weights."""
        return next(self.prefix.parameters())
