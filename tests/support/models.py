"""Tiny random models, and simulators of them without the source loader.

Weights are larger than a real initialisation's and norms are not trivial, so that a wrong formula
shows.
"""

import copy
import hashlib
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.support.norms import gain_is_added_to_one, is_norm
from tests.support.once import capture_once, kind_of, lower_once
from tintc.ir.config import SimulatorConfig
from tintc.runtime.simulator import Simulator


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
    """Capture, lower, simulator. options: backend and share. See `once` for what is not done
    again.
    """
    captured = capture_once(model)
    return Simulator(lower_once(captured, config), captured.tensors, **options)  # type: ignore[arg-type]


def simulator_of(model: nn.Module, config: SimulatorConfig) -> Simulator:
    """The same, made once a process for the same weights, with the programs of its calls: do not
    change it.
    """
    kind = kind_of(model)
    if kind is None:
        return simulate(model, config)
    key = (kind, _digest(model), config)
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
    captured = capture_once(model)
    program, tensors = lower_once(captured, config), captured.tensors
    found = {"fused": Simulator(program, tensors)}
    return found | {
        share: Simulator(program, tensors, backend="transformer", share=share) for share in shares
    }


def _digest(model: nn.Module) -> str:
    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


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
