"""What a model must satisfy before it is compiled: supported, small enough, finite, causal; and the
model without weights that tells.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AutoModelForCausalLM, PreTrainedConfig

from tintc.compiler.frontend.messages import first_line, listed
from tintc.ir.errors import MemoryLimitError, SourceError, UnsupportedModelError

_LARGE = 2**22  # elements: a mask over 2048 tokens is not larger


def check_supported(config: PreTrainedConfig, name: str) -> None:
    has_code = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if config.is_encoder_decoder or not (known or has_code):
        made_for = ", ".join(config.architectures or []) or config.model_type
        raise UnsupportedModelError(
            f"{name} is no causal language model ({made_for}); expected a decoder such as OPT or "
            "GPT-2"
        )
    if getattr(config, "quantization_config", None):
        raise UnsupportedModelError(
            f"{name} has quantized weights; expected plain ones (float32, bfloat16 or float16)"
        )


def build_without_weights(config: PreTrainedConfig, name: str, **options: Any) -> torch.nn.Module:
    """A model whose parameters are on the meta device: shapes and no numbers. Its buffers (rotary
    frequencies, masks) are computed.

    options: of from_config. Raises SourceError for a config that makes no model.
    """
    try:
        with _weights_on_meta(), _LargeOnMeta():
            model: torch.nn.Module = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), **options
            )
    except Exception as error:
        raise SourceError(
            f"{name}: no model can be built from its config: {first_line(error)}"
        ) from error
    return model.eval()


@contextmanager
def _weights_on_meta() -> Iterator[None]:
    """What this thread registers as a parameter loses its numbers at once; tied ones stay tied."""
    thread, moved = threading.get_ident(), WeakTensorKeyDictionary()

    def move(_: torch.nn.Module, __: str, value: torch.nn.Parameter | None) -> Any:
        if value is None or value.is_meta or threading.get_ident() != thread:
            return None
        if value not in moved:
            moved[value] = torch.nn.Parameter(value.detach().to("meta"), value.requires_grad)
        return moved[value]

    hook = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        hook.remove()


class _LargeOnMeta(TorchFunctionMode):
    """torch.empty, which layers make their weights with, allocates nothing where only a weight is
    so large. A buffer that is made so and filled has its numbers.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            empty: Tensor = func(*args, **{**kwargs, "device": "meta"})
            if empty.numel() > _LARGE:
                return empty
        return func(*args, **kwargs)


def check_memory(
    config: PreTrainedConfig, name: str, dtype: torch.dtype, trust_remote_code: bool
) -> None:
    """Compares the bytes of the weights, counted on the meta device, with the memory that is
    free.
    """
    model = build_without_weights(config, name, trust_remote_code=trust_remote_code)
    count = sum(value.numel() for value in model.parameters())
    needed, free = count * dtype.itemsize, psutil.virtual_memory().available
    if needed > free:
        raise MemoryLimitError(
            f"{name} needs {needed / 1e9:.1f} GB for its {count / 1e9:.2f} billion weights in "
            f"{str(dtype).removeprefix('torch.')}, "
            f"and {free / 1e9:.1f} GB of memory are free; choose a smaller model or a smaller dtype"
        )


def check_prefix_memory(numbers: int, dtype: torch.dtype) -> None:
    """Compares the bytes of the transformer back end's prefix tokens with the memory that is free.
    Raises MemoryLimitError.
    """
    needed, free = numbers * dtype.itemsize, psutil.virtual_memory().available
    if needed > free:
        raise MemoryLimitError(
            f"the prefix tokens need {needed / 1e9:.1f} GB in {str(dtype).removeprefix('torch.')}, "
            f"and {free / 1e9:.1f} GB of memory "
            "are free; leave prefix_tokens, sim_hidden and sim_heads to tintc, or choose a smaller "
            "model or a smaller dtype"
        )


def check_finite(model: torch.nn.Module, name: str) -> None:
    """Raises SourceError naming the parameters that hold a NaN or an infinity. Those on the meta
    device are skipped.
    """
    bad = [
        key
        for key, value in model.named_parameters()
        if value.is_floating_point()
        and not value.is_meta
        and value.numel()
        and not _is_finite(value.detach())
    ]
    if bad:
        raise SourceError(
            f"{name} has NaN or infinite weights in {listed(bad)}; expected finite ones: is the "
            "checkpoint damaged?"
        )


def check_causal(model: torch.nn.Module, name: str) -> None:
    """Runs `model` (in eval mode) on two sequences that differ in the last token only, and compares
    what comes before.

    Encoders such as BERT load as "causal" models too, and would be simulated as something that they
    are not. Raises UnsupportedModelError when the model looks ahead or does not run on token ids
    alone.
    """
    device = next((value.device for value in model.parameters()), torch.device("cpu"))
    if device.type == "meta":
        return
    input_ids_BT = torch.tensor([[1, 1], [1, 0]], device=device)
    try:
        with torch.inference_mode():
            logits_BV = model(input_ids=input_ids_BT, use_cache=False).logits[:, 0].float()
    except Exception as error:
        raise UnsupportedModelError(
            f"{name} does not run on token ids alone, so it is no causal language model: "
            f"{first_line(error)}"
        ) from error
    tolerance = 1e-4 * float(logits_BV.abs().max())
    if float((logits_BV[0] - logits_BV[1]).abs().max()) > tolerance:
        raise UnsupportedModelError(
            f"{name} looks ahead: the logits of a token depend on later tokens; expected a causal "
            "language model"
        )


def _is_finite(value: torch.Tensor) -> bool:
    low, high = value.aminmax()  # needs no temporary copy, and a NaN anywhere comes out
    return bool(low.isfinite() & high.isfinite())
