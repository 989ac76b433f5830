"""Tiny random models, and simulators of them without the source loader.

Weights are larger than a real initialisation's and norms are not trivial, so that a wrong formula
shows.
"""

import copy
import dataclasses
import hashlib
import json
from functools import lru_cache
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.support.norms import gain_is_added_to_one, is_norm
from tintc.compiler.casts import casts_removed
from tintc.compiler.driver import lower
from tintc.compiler.frontend.capture import Captured, capture
from tintc.ir.config import SimulatorConfig
from tintc.ir.program import Program
from tintc.runtime.simulator import Simulator
from tintc.runtime.specialize.optimize import copy_graph


def opt(
    *,
    vocab: int = 29,
    hidden: int = 12,
    heads: int = 3,
    ffn: int = 20,
    layers: int = 2,
    positions: int = 16,
    activation: str = "relu",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **more: Any,
) -> transformers.OPTForCausalLM:
    """A random OPT."""
    config = transformers.OPTConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_attention_heads=heads,
        ffn_dim=ffn,
        num_hidden_layers=layers,
        max_position_embeddings=positions,
        activation_function=activation,
        **{"word_embed_proj_dim": hidden, **more},
    )
    return randomized(transformers.OPTForCausalLM(config), seed).to(dtype)


def gpt2(
    *,
    vocab: int = 29,
    hidden: int = 12,
    heads: int = 3,
    ffn: int = 20,
    layers: int = 2,
    positions: int = 16,
    activation: str = "gelu_new",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **more: Any,
) -> transformers.GPT2LMHeadModel:
    """A random GPT-2."""
    config = transformers.GPT2Config(
        vocab_size=vocab,
        n_embd=hidden,
        n_head=heads,
        n_inner=ffn,
        n_layer=layers,
        n_positions=positions,
        activation_function=activation,
        bos_token_id=0,
        eos_token_id=0,
        **more,
    )
    return randomized(transformers.GPT2LMHeadModel(config), seed).to(dtype)


FAMILIES = {"opt": opt, "gpt2": gpt2}


def randomized(model: Any, seed: int = 0) -> Any:
    """The model in eval mode, with every weight, gain, shift and bias drawn anew from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    norms = [
        module
        for module in model.modules()
        if is_norm(module) and getattr(module, "weight", None) is not None
    ]
    gains = {id(norm.weight): 0.0 if gain_is_added_to_one(norm) else 1.0 for norm in norms}
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(
                gains[id(parameter)] + 0.3 * noise if id(parameter) in gains else 0.2 * noise
            )
    return model.eval()


def simulate(model: nn.Module, config: SimulatorConfig, **options: str) -> Simulator:
    """Capture, lower, simulator. options: backend and share. Hugging Face models of one
    configuration are captured once a process, and lowered once for each config.
    """
    program, tensors = _program(model, config)
    return Simulator(program, tensors, **options)  # type: ignore[arg-type]


def simulator_of(model: nn.Module, config: SimulatorConfig) -> Simulator:
    """The same, made once a process for the same weights, with the programs of its calls: do not
    change it.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        return simulate(model, config)
    key = (_what_is_exported(model), _digest(model), config)
    if key not in _SIMULATORS:
        if len(_SIMULATORS) == 64:
            del _SIMULATORS[next(iter(_SIMULATORS))]
        with torch.inference_mode(False):  # whoever asks first, its rate may be differentiated
            _SIMULATORS[key] = simulate(copy.deepcopy(model), config)
    return _SIMULATORS[key]


_SIMULATORS: dict[Any, Simulator] = {}


def on_all_backends(
    model: nn.Module, config: SimulatorConfig, shares: tuple[str, ...] = ("none",)
) -> dict[str, Simulator]:
    """Simulators of one program: `fused`, and of the transformer back end one for each way of
    sharing, by its name.
    """
    program, tensors = _program(model, config)
    found = {"fused": Simulator(program, tensors)}
    return found | {
        share: Simulator(program, tensors, backend="transformer", share=share) for share in shares
    }


def capture_again(model: nn.Module) -> Captured:
    """`capture`, except that Hugging Face models of one configuration and dtype are exported once a
    process (and once in `no_casts`).
    """
    if not isinstance(model, transformers.PreTrainedModel):
        return capture(model)
    kept = _exported(*_what_is_exported(model))
    return dataclasses.replace(kept.copy(), tensors=_tensors(model, kept))


def _program(model: nn.Module, config: SimulatorConfig) -> tuple[Program, dict[str, Tensor]]:
    """A program whose graph is the caller's, and the model's tensors."""
    if not isinstance(model, transformers.PreTrainedModel):
        captured = capture(model)
        return lower(captured, config), captured.tensors
    exported = _what_is_exported(model)
    kept = _lowered(config, *exported)
    program = dataclasses.replace(kept, graph=copy_graph(kept.graph))
    return program, _tensors(model, _exported(*exported))


def _tensors(model: nn.Module, captured: Captured) -> dict[str, Tensor]:
    state = dict(model.state_dict(keep_vars=True))
    return {name: state[name].detach() for name in captured.tensors}


def _what_is_exported(model: transformers.PreTrainedModel) -> tuple[Any, ...]:
    """All that a Hugging Face model's graph depends on."""
    config = model.config
    described = config.to_json_string(use_diff=False)
    return type(model), described, config._attn_implementation, model.dtype, casts_removed()


def _digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@lru_cache(maxsize=64)
def _exported(
    kind: Any, config: str, attention: str, dtype: torch.dtype, _without_casts: bool
) -> Captured:
    loaded = kind.config_class.from_dict(json.loads(config))
    return capture(kind._from_config(loaded, attn_implementation=attention).to(dtype).eval())


@lru_cache(maxsize=128)
def _lowered(config: SimulatorConfig, *exported: Any) -> Program:
    return lower(_exported(*exported).copy(), config)


def tokens(batch: int, length: int, vocab: int, seed: int = 0) -> Tensor:
    """Random token ids (batch, length)."""
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def ragged_train_mask(batch: int, length: int, seed: int = 0) -> Tensor:
    """A training segment that ends elsewhere in each sequence and holds at least one target."""
    ends = torch.randint(
        2, length + 1, (batch, 1), generator=torch.Generator().manual_seed(seed + 1)
    )
    return (torch.arange(length) < ends).long()


def scattered_mask(batch: int, length: int, seed: int = 0) -> Tensor:
    """A random 0/1 mask with holes; the second token is always 1, so that every sequence has a
    target.
    """
    mask = (
        torch.rand(batch, length, generator=torch.Generator().manual_seed(seed + 2)) < 0.6
    ).long()
    mask[:, 1] = 1
    return mask
