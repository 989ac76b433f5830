"""What a simulator is timed against: the loop that one would write by hand, as it is or done
otherwise, or the simulator itself in another runtime.

    autograd     torch.autograd, one sequence after the other
    compile      the same, the model's forward under torch.compile
    vmap         torch.func.grad over the whole batch at once
    lora         autograd on adapters of rank 8 beside frozen weights: another result
    onnxruntime  the exported simulator (`exported.py`)

Legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from tintc.compiler.autograd_rule import InnerRule, summed_loss
from tintc.compiler.frontend.capture import LogitsOnly
from tintc.evaluate.speed.benchmark import HandWrittenLoop
from tintc.evaluate.speed.settings import Against
from tintc.evaluate.speed.workload import Workload
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import UsageError
from tintc.runtime.compilers import check_compiler

Rival = Callable[[Workload], list[Tensor]]
RANK = 8  # of the adapters
_PLAIN_SGD = ("schedule", "lr_scale", "train")  # fields of the rule that `vmap` follows
_NO_ADAPTERS = ("rms", "muon")  # optimizers that need to know each weight


@dataclass(frozen=True)
class Kind:
    """title: of its column. computes: whether its logits are those of direct fine-tuning, of the
    simulator, or of nothing else. kernels: whether it can be given those of the simulator.
    """

    title: str
    computes: str = "fine-tuning"
    kernels: bool = False

    @property
    def named(self) -> str:
        """As it stands in a sentence."""
        return f"the {self.title}" if self.title.endswith("loop") else self.title


KINDS: dict[Against, Kind] = {
    "autograd": Kind("loop", kernels=True),
    "compile": Kind("compiled loop"),
    "vmap": Kind("vmap"),
    "lora": Kind("lora loop", computes="adapters", kernels=True),
    "onnxruntime": Kind("onnxruntime", computes="simulator"),
}


def check_rival(against: Against, config: SimulatorConfig, device: str) -> None:
    """Raises UsageError for what it cannot follow, or what this machine lacks."""
    rule = config.rule
    if against == "vmap" and (others := [name for name in rule if name not in _PLAIN_SGD]):
        raise UsageError(
            f"against vmap takes plain sgd; got {', '.join(others)}: expected none of them, or "
            "against autograd"
        )
    if against == "lora":
        if config.optimizer in _NO_ADAPTERS or config.lr_scale:
            got = "lr_scale" if config.lr_scale else f"optimizer {config.optimizer}"
            raise UsageError(
                f"against lora has no {got}, which is about the model's own weights; expected sgd "
                "or adam at one rate"
            )
        _check_peft()
    if against == "compile":
        check_compiler(device)
    if against == "onnxruntime" and torch.device(device).type != "cpu":
        raise UsageError(
            f"against onnxruntime runs on a CPU; got device {device}: leave the device out"
        )


def loop_against(
    against: Against, model: nn.Module, names: Collection[str], rule: InnerRule
) -> Rival:
    """A loop over the model, which it changes as it needs. names: parameters that it trains."""
    if against == "lora":
        names, rule = _adapters(model, names), InnerRule(rule.config)
    if against == "vmap":
        return VmapLoop(model, names, rule)
    return (CompiledLoop if against == "compile" else HandWrittenLoop)(model, names, rule)


class CompiledLoop(HandWrittenLoop):
    """The same loop, what it calls compiled by torch: once for the training segment, once for the
    whole sequence.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], rule: InnerRule) -> None:
        super().__init__(model, names, rule)
        self._model.compile(dynamic=False)


class VmapLoop:
    """SGD on the whole batch at once: vmap over sequences of torch.func.grad and of the last
    forward pass.

    torch has no batched form of some operators, its fused attention on a CPU among them, and loops
    over the sequences there.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], rule: InnerRule) -> None:
        self._model = LogitsOnly(model.requires_grad_(False))
        self._weights: dict[str, Tensor] = {
            f"auxiliary.{name}": model.get_parameter(name) for name in names
        }
        self._config = rule.config
        self._scales = {f"auxiliary.{name}": rule.scale(name) for name in names}

    def __call__(self, work: Workload) -> list[Tensor]:
        """Logits (T, V) of each sequence under its own updated weights."""

        def one(ids_T: Tensor) -> Tensor:
            weights = self._weights
            for step in range(self._config.steps):
                weights = self._stepped(weights, ids_T[: work.trained], step)
            return self._logits(weights, ids_T, work.first)

        with warnings.catch_warnings(), torch.no_grad():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return list(vmap(one)(work.ids_BT))

    def _stepped(
        self, weights: dict[str, Tensor], segment_S: Tensor, step: int
    ) -> dict[str, Tensor]:
        def loss(given: dict[str, Tensor]) -> Tensor:
            return summed_loss(self._logits(given, segment_S[:-1]), segment_S[1:])

        rate = self._config.inner_lr * self._config.schedule_factor(step)
        gradients = grad(loss)(weights)
        return {
            name: weight.sub(gradients[name], alpha=rate * self._scales[name])
            for name, weight in weights.items()
        }

    def _logits(self, weights: dict[str, Tensor], ids_T: Tensor, first: int = 0) -> Tensor:
        logits: Tensor = functional_call(self._model, weights, (ids_T[None], first))
        return logits[0]


def _adapters(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Puts an adapter of rank 8 beside every linear layer that would be trained; the names of
    their parameters. Raises UsageError where there is none.
    """
    from peft import LoraConfig, inject_adapter_in_model

    modules = {name: model.get_submodule(name.rpartition(".")[0]) for name in names}
    targets = [
        name.rpartition(".")[0]
        for name, module in modules.items()
        if name.endswith(".weight")
        and model.get_parameter(name).ndim == 2
        and not isinstance(module, nn.Embedding)
    ]
    if not targets:
        raise UsageError("nothing that is trained is a linear layer; expected one for lora")
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # of weights stored as (I, O), which peft finds out itself
        torch.manual_seed(0)  # adapters start at random
        inject_adapter_in_model(config, cast(Any, model))
    model.eval()
    return [name for name, _ in model.named_parameters() if "lora_" in name]


def _check_peft() -> None:
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "against lora needs the package peft; pip install 'tintc[peft]', or use against "
            "autograd"
        ) from error
