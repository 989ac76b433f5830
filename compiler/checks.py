"""What `compile` checks before it hands a simulator out: that the passes did not misread the model.

forward   the simulator's initial logits are the model's own, on random sequences; once more on
          weights in which no zero hides a layer
step      one exact step is what torch.autograd and SGD give, on every weight that it trains

A right forward pass proves nothing of the backward one, and a layer that starts at zero hides
whatever is wrong behind it.
"""

from __future__ import annotations

import copy
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tintc.compiler.casts import no_casts
from tintc.compiler.exact import exact_program
from tintc.compiler.frontend.capture import LogitsOnly, evaluating
from tintc.ir.errors import NumericalError, UsageError
from tintc.ir.named import Check
from tintc.ir.precision import HALF
from tintc.ir.program import Program
from tintc.runtime.simulator import Simulator

CHECKS = get_args(Check)
# A step of a model with so many numbers takes less than 2 s on two cores.
LARGEST_STEPPED = 40_000_000

# Largest allowed differences, relative to the largest logit or update: rounding of two ways to
# compute the same in this type.
_LIMITS = {
    torch.float64: 1e-9,
    torch.float32: 1e-3,
    torch.float16: 5e-2,
    torch.bfloat16: 2e-1,
}
# Differences that the reference's own casts to a narrower type make are amplified by as much as it
# amplifies them itself; the simulator may round at other places.
_OF_CASTS = 10.0
_SAMPLE = 10_000  # numbers of a weight
_RATE = 1e-2  # of the step that is checked; its updates are compared, not what they do


def check(simulator: Simulator, model: nn.Module, kind: Check | None) -> None:
    """Runs the checks. kind None: `step`, or `forward` for a large model.

    Raises NumericalError if the compiled program does not compute what the model does, UsageError
    for an unknown kind.
    """
    if kind is not None and kind not in CHECKS:
        raise UsageError(f"check is {kind!r}; expected one of {', '.join(CHECKS)}")
    if kind == "none":
        return
    simulator = copy.copy(simulator)
    simulator.calibration = "off"  # measuring the machine waits for the first call
    check_first_forward(simulator, model)
    numbers = sum(tensor.numel() for tensor in simulator.prefix.tensors().values())
    if kind == "step" or (kind is None and numbers <= LARGEST_STEPPED):
        check_step(simulator, model)


def check_first_forward(simulator: Simulator, model: nn.Module) -> None:
    """Compares the simulator's initial logits with the model's own on three short random sequences,
    under the model's weights and under perturbed ones.

    Raises NumericalError on disagreement: the passes misread the model, and nothing that it
    computes can be trusted.
    """
    ids = _ids(simulator, 3, 24)  # neither the batch nor the length that capture traced
    weights = _weights(simulator, model)
    perturbed = _perturbed(weights)
    _compare_logits(simulator, model, ids, {})
    if perturbed:
        _compare_logits(_with(simulator.program, simulator, perturbed), model, ids, perturbed)


def check_step(simulator: Simulator, model: nn.Module) -> None:
    """Compares the updates of one exact step of the same trained blocks with those of
    torch.autograd and SGD, on a short random sequence and perturbed weights.

    Nothing is checked where only approximations can be simulated. Raises NumericalError on
    disagreement.
    """
    program = exact_program(simulator.program, steps=1)
    if program is None or simulator.dtype in HALF:  # whose updates are below its weights' digits
        return
    weights = _weights(simulator, model)
    weights |= _perturbed(weights)
    exact = _with(program, simulator, weights)
    exact.inner_lr.data.fill_(_RATE)
    ids = _ids(simulator, 1, 8)
    with torch.inference_mode():
        found = exact.updated_state_dict(ids, torch.ones_like(ids))
    slots = [slot for slot in program.layout.prefix.values() if slot.trainable]
    names = list(dict.fromkeys(slot.parameter for slot in slots))
    logits, gradients = _gradients(model, weights, names, ids, simulator.program.aliases)
    scale = max(float(g.abs().max()) for g in gradients.values()) or 1.0
    limit = _limit(simulator, model, ids, weights, logits)
    for name, gradient in gradients.items():
        step = (weights[name] - found[name]).double() / _RATE
        rounding = torch.finfo(simulator.dtype).eps * float(weights[name].abs().max()) / _RATE
        error = float((step - gradient.double()).abs().max())
        if not error <= limit * scale + 2 * rounding:
            raise NumericalError(
                f"the compiled step of {name} differs from torch.autograd's by {error / scale:.1e} "
                f"of the largest gradient (limit {limit:.0e}, {simulator.dtype}); please report "
                "this model, and pass check='forward' to compile it all the same"
            )


def _ids(simulator: Simulator, batch: int, tokens: int) -> Tensor:
    facts = simulator.program.facts
    shape = (batch, min(tokens, facts.longest or tokens))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(facts.vocab_size, shape, generator=generator).to(simulator.device)


def _weights(simulator: Simulator, model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters, by name. Buffers are constants: passes have computed with them."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {
        name: tensor.detach()
        for name, tensor in simulator.prefix.tensors().items()
        if name in names and tensor.is_floating_point()
    }


def _perturbed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """New values of those weights in which one number fills more than a hundredth, by a sample:
    zeros and ones that a layer starts with.
    """
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, weight in weights.items():
        if weight.numel() and _repeats(weight, generator):
            fan = weight.shape[-1] if weight.ndim > 1 else 100
            noise = torch.randn(weight.shape, generator=generator) * fan**-0.5
            found[name] = weight + noise.to(weight.device, weight.dtype)
    return found


def _repeats(weight: Tensor, generator: torch.Generator) -> bool:
    numbers = weight.flatten()
    if len(numbers) > _SAMPLE:
        places = torch.randint(len(numbers), (_SAMPLE,), generator=generator)
        numbers = torch.cat([numbers[:1], numbers[places.to(weight.device)]])
    return float(((numbers == 0) | (numbers == numbers[0])).float().mean()) > 0.01


def _with(program: Program, simulator: Simulator, weights: dict[str, Tensor]) -> Simulator:
    """A program on the simulator's weights, but for some."""
    tensors = {name: t.detach() for name, t in simulator.prefix.tensors().items()} | weights
    if program is simulator.program and simulator.backend == "fused":
        return simulator.on(tensors)
    return Simulator(program, tensors, calibration=simulator.calibration)


def _compare_logits(
    simulator: Simulator, model: nn.Module, ids: Tensor, weights: dict[str, Tensor]
) -> None:
    with torch.inference_mode():
        found = simulator.predict_initial(ids)
        expected = _logits(model, ids, weights, simulator.program.aliases)
    error = _relative(found, expected)
    limit = _limit(simulator, model, ids, weights, expected)
    if not error <= limit:
        raise NumericalError(
            f"the compiled forward pass differs from the model's by {error:.1e} of the largest "
            f"logit (limit {limit:.0e}, {simulator.dtype}); please report this model"
        )


def _logits(
    model: nn.Module, ids: Tensor, weights: dict[str, Tensor], aliases: dict[str, str]
) -> Tensor:
    """The model's own, under other weights."""
    tied = {alias: weights[name] for alias, name in aliases.items() if name in weights}
    given = {f"auxiliary.{name}": weight for name, weight in {**weights, **tied}.items()}
    with evaluating(model):
        logits: Tensor = torch.func.functional_call(LogitsOnly(model), given, (ids,))
    return logits


def _gradients(
    model: nn.Module,
    weights: dict[str, Tensor],
    names: list[str],
    ids: Tensor,
    aliases: dict[str, str],
) -> tuple[Tensor, dict[str, Tensor]]:
    """(logits, dL/dW of the summed loss); of weights that it does not reach, zeros."""
    leaves = {name: weights[name].clone().requires_grad_() for name in names}
    with torch.enable_grad():
        logits = _logits(model, ids, {**weights, **leaves}, aliases)
        loss = F.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return logits.detach(), {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True)
    }


def _limit(
    simulator: Simulator, model: nn.Module, ids: Tensor, weights: dict[str, Tensor], plain: Tensor
) -> float:
    """The type's own, or what the model's casts to a narrower type do to its logits, `plain`."""
    limit = _LIMITS[simulator.dtype]
    if simulator.dtype != torch.float64:
        return limit
    try:
        with torch.inference_mode(), no_casts():
            wide = _logits(model, ids, weights, simulator.program.aliases)
    except Exception:  # the model's own code, which may insist on a type
        return 1e-5
    return max(limit, _OF_CASTS * _relative(plain, wide))


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
