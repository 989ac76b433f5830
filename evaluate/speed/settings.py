"""What `tintc bench` is asked for by its user. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tintc.ir.call_sizes import CallShape, Predict
from tintc.ir.described import about
from tintc.ir.named import Backend, Share
from tintc.runtime.stream_settings import StreamSettings

Against = Literal["autograd", "compile", "vmap", "lora", "onnxruntime"]
Kernels = Literal["default", "same"]


@dataclass(frozen=True, kw_only=True)
class Options(CallShape):
    """Every field says beside itself what it is for."""

    backend: Backend = field(
        default="fused", metadata=about("fused, or transformer: the paper's construction.")
    )
    share: Share = field(
        default="none",
        metadata=about("Who shares structural constants: all blocks, or all equal modules."),
    )
    against: Against = field(
        default="autograd",
        metadata=about(
            "A loop over the sequences, written by hand (autograd); the same under torch.compile; "
            "torch.func over the batch (vmap); a loop over adapters of rank 8 (lora); the exported "
            "simulator (onnxruntime)."
        ),
    )
    kernels: Kernels = field(
        default="default",
        metadata=about(
            "Whose matrix products the loop has: torch's own, or the same as the simulator."
        ),
    )
    pairs: int = field(default=11, metadata=about("How often both run, in turn."))
    predict: Predict = field(
        default="all",
        metadata=about("Logits that both sides give: all, or those of the rest alone."),
    )
    without: tuple[str, ...] = field(
        default=(),
        metadata=about("Optimizations to switch off.", metavar="NAME,..."),
    )
    slice_memory: str = field(
        default="auto",
        metadata=about(
            "How many sequences run together: as many as time needs and memory allows (auto), one "
            "(lowest), or what fits into so much, as 2GB.",
            metavar="auto|lowest|BYTES",
        ),
    )
    torch_compile: str | None = field(
        default=None,
        metadata=about("torch.compile: default or reduce-overhead.", metavar="MODE"),
    )
    each: bool = field(
        default=False, metadata=about("Also time every optimization, alone switched off.")
    )
    memory: bool = field(default=True, metadata=about("Measure the peak memory of each side."))
    seed: int = field(
        default=0,
        metadata=about("Of the random tokens, and of the random weights of a shape."),
    )


@dataclass(frozen=True, kw_only=True)
class StreamOptions(StreamSettings):
    """Of `tintc bench --stream`, beside how texts are cut; as in `Options`."""

    batch: int = field(default=4, metadata=about("Texts side by side."))
    pairs: int = field(default=11, metadata=about("How often both run, in turn."))
    memory: bool = field(default=True, metadata=about("Measure the peak memory over long texts."))
    seed: int = field(default=0, metadata=about("Of the random tokens and weights."))


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Of `tintc bench --generate`, as in `Options`: sequences of `tokens`, of which a part is
    trained on, and behind each so many generated ones.
    """

    tokens: int = field(default=256, metadata=about("Tokens of each sequence."))
    batch: int = field(default=8, metadata=about("Sequences, each with weights of its own."))
    train_fraction: float = field(default=0.5, metadata=about("Part of the tokens to train on."))
    new_tokens: int = field(default=200, metadata=about("Of --generate: tokens behind each."))
    pairs: int = field(default=3, metadata=about("How often all run, in turn."))
    seed: int = field(default=0, metadata=about("Of the random tokens and weights."))
