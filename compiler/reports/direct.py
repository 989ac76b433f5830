"""FLOPs of fine-tuning the auxiliary model directly: what a simulator's own are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tintc.compiler.autograd_rule import matrices, orthogonal
from tintc.compiler.cost import inputs_without_numbers, weights_without_numbers
from tintc.compiler.exact import learning_parameters
from tintc.ir.call_sizes import CallSizes
from tintc.ir.outputs import Output
from tintc.ir.program import Program
from tintc.runtime.call import Call
from tintc.runtime.simulator import Simulator


def direct_flops(program: Program, sizes: CallSizes) -> int:
    """FLOPs of the loop that one would write by hand with torch.autograd, as torch counts them: for
    every step the forward pass over the training segment and the backward pass to the weights that
    are chosen to learn, then the forward pass that predicts with the result. The same layers learn,
    for as many steps.

    A multiplication and an addition count as two, matrix products only: of the inner rule, those of
    `muon`, once for each sequence. It does not depend on how the program approximates gradients.
    """
    batch, tokens, segment = sizes["batch"], sizes["tokens"], sizes["segment"]
    # In float32 whatever the program's type is: the number of products does not depend on it.
    # torch counts no fused attention of a CPU, which is written out instead.
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        weights = weights_without_numbers(program, torch.float32)
        simulator = Simulator(program, weights, optimize=False).requires_grad_(False)
        learning = list(learning_parameters(program))
        for name in learning:
            simulator.prefix.get_parameter(name).requires_grad_()
        with FlopCounterMode(display=False) as step:
            logits = _forward(simulator, batch, segment)
            logits.sum().backward()  # type: ignore[no-untyped-call]
        with torch.no_grad(), FlopCounterMode(display=False) as prediction:
            _forward(simulator, batch, tokens)
        of_rule = batch * _of_rule(simulator, learning)
    steps = program.config.steps
    return int(steps * (step.get_total_flops() + of_rule) + prediction.get_total_flops())


@torch.no_grad()
def _of_rule(simulator: Simulator, learning: Sequence[str]) -> int:
    """What the inner rule itself multiplies in a step of one sequence."""
    if simulator.config.optimizer != "muon":
        return 0
    stored = matrices(simulator)
    with FlopCounterMode(display=False) as counted:
        for name in stored:
            if name in learning:
                gradient = simulator.prefix.get_parameter(name)
                orthogonal(gradient.mT if stored[name] else gradient)
    return int(counted.get_total_flops())


def _forward(simulator: Simulator, batch: int, tokens: int) -> torch.Tensor:
    """Logits of the auxiliary model as it is."""
    inputs = inputs_without_numbers(simulator.program, batch, tokens, simulator.dtype, "cpu")
    call = Call((Output.INITIAL_LOGITS,), inputs, tokens, causal=True)
    return simulator.run(call)[Output.INITIAL_LOGITS]
