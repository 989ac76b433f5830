"""The passes, one a file, and the order in which they run.

Beside them stand what they ask about a captured value: what it is at given sizes (`evaluation`),
which coordinates of which activation it is (`coordinates`, `heads`), what happens to scores before
their softmax (`scores`), small questions (`patterns`); and where they keep what positions give
(`tables`).
"""

from tintc.ir.pass_manager import Pass
from tintc.passes.decode.factored_updates import factored_updates
from tintc.passes.decode.given_updates import given_updates
from tintc.passes.decode.grouped_rows import grouped_rows
from tintc.passes.optimize.causal_attention import causal_attention
from tintc.passes.optimize.chunk_head import chunk_head
from tintc.passes.optimize.dead_code import dead_code
from tintc.passes.optimize.flash_attention import flash_attention
from tintc.passes.optimize.fuse_residuals import fuse_residuals
from tintc.passes.optimize.kept_first import kept_first
from tintc.passes.optimize.low_rank_updates import low_rank_updates
from tintc.passes.optimize.merge_products import merge_products
from tintc.passes.optimize.onednn_products import onednn_products
from tintc.passes.optimize.scored_loss import scored_loss
from tintc.passes.optimize.shared_products import shared_products
from tintc.passes.optimize.sparse_tables import sparse_tables
from tintc.passes.optimize.whole_initial import whole_initial
from tintc.passes.place.assign_memory_slots import assign_memory_slots
from tintc.passes.place.assign_prefix_slots import assign_prefix_slots
from tintc.passes.place.verify import verify
from tintc.passes.recognize.canonicalize import canonicalize
from tintc.passes.recognize.form_islands import form_islands
from tintc.passes.recognize.lower_forward import lower_forward
from tintc.passes.recognize.recognize_activation import recognize_activation
from tintc.passes.recognize.recognize_arithmetic import recognize_arithmetic
from tintc.passes.recognize.recognize_attention import recognize_attention
from tintc.passes.recognize.recognize_embedding import recognize_embedding
from tintc.passes.recognize.recognize_linear import recognize_linear
from tintc.passes.recognize.recognize_norm import recognize_norm
from tintc.passes.recognize.refuse_unsupported import refuse_unsupported
from tintc.passes.stream.cached_keys import cached_keys
from tintc.passes.stream.loss_at_kept import loss_at_kept
from tintc.passes.stream.whole_segment import whole_segment
from tintc.passes.train.build_backward import build_backward
from tintc.passes.train.build_descent import build_descent
from tintc.passes.train.refuse_unreached import refuse_unreached
from tintc.passes.train.select_trainable import select_trainable
from tintc.passes.train.truncate_segment import truncate_segment
from tintc.passes.train.unroll_steps import unroll_steps

DEFAULT_PIPELINE: tuple[Pass, ...] = (
    canonicalize,
    recognize_embedding,
    recognize_activation,
    recognize_linear,
    recognize_norm,
    recognize_attention,
    recognize_arithmetic,
    form_islands,
    refuse_unsupported,  # here the graph is canonical: the auxiliary model in tint operators
    select_trainable,
    lower_forward,
    build_backward,
    build_descent,
    refuse_unreached,
    unroll_steps,
    truncate_segment,
    dead_code,
    assign_prefix_slots,
    assign_memory_slots,
    verify,  # here it is lowered
)

# What a window of a stream asks for, in front of the optimizations.
STREAM: tuple[Pass, ...] = (whole_segment, loss_at_kept, cached_keys)

# What adapting and decoding ask for: the first two of the whole lowered graph, the last behind
# `cached_keys`.
DECODE: tuple[Pass, ...] = (factored_updates, given_updates, grouped_rows)

# What the fused back end does to a lowered graph before it emits it. Each can be switched off: they
# change numbers by rounding only.
OPTIMIZATIONS: tuple[Pass, ...] = (
    whole_initial,  # these three know the operators of lowered graphs
    scored_loss,
    kept_first,
    causal_attention,
    flash_attention,
    low_rank_updates,
    sparse_tables,
    shared_products,
    merge_products,
    fuse_residuals,
    chunk_head,
    onednn_products,  # last: it takes what the others left
)
OPTIMIZATION_NAMES = (
    *(step.name for step in OPTIMIZATIONS),
    "batch_slices",
    "frozen_once",
)  # the last two: `runtime/slices.py`, `runtime/specialize/frozen.py`

__all__ = [
    "DECODE",
    "DEFAULT_PIPELINE",
    "OPTIMIZATIONS",
    "OPTIMIZATION_NAMES",
    "STREAM",
    *(step.name for step in (*DEFAULT_PIPELINE, *STREAM, *DECODE, *OPTIMIZATIONS)),
]
