"""The passes between a lowered graph and the program of one kind of call, in the order in which
they run.
"""

from tintc.ir.pass_manager import Pass
from tintc.passes.decode.factored_updates import factored_updates
from tintc.passes.decode.given_updates import given_updates
from tintc.passes.decode.grouped_rows import grouped_rows
from tintc.passes.optimize.causal_attention import causal_attention
from tintc.passes.optimize.chunk_head import chunk_head
from tintc.passes.optimize.early_descents import early_descents
from tintc.passes.optimize.flash_attention import flash_attention
from tintc.passes.optimize.fuse_residuals import fuse_residuals
from tintc.passes.optimize.kept_first import kept_first
from tintc.passes.optimize.low_rank_updates import low_rank_updates
from tintc.passes.optimize.merge_products import merge_products
from tintc.passes.optimize.onednn_products import onednn_products
from tintc.passes.optimize.relu_from_output import relu_from_output
from tintc.passes.optimize.scored_loss import scored_loss
from tintc.passes.optimize.shared_products import shared_products
from tintc.passes.optimize.sparse_tables import sparse_tables
from tintc.passes.optimize.whole_initial import whole_initial
from tintc.passes.stream.cached_keys import cached_keys
from tintc.passes.stream.loss_at_kept import loss_at_kept
from tintc.passes.stream.whole_segment import whole_segment

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
    relu_from_output,
    chunk_head,
    onednn_products,  # it takes what the others left
    early_descents,  # of what is computed at last
)
OPTIMIZATION_NAMES = (
    *(step.name for step in OPTIMIZATIONS),
    "batch_slices",
    "frozen_once",
)  # the last two: `runtime/slices.py`, `runtime/specialize/frozen.py`
