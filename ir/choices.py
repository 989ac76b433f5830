"""What one emitted program may count on: the facts of a kind of call that optimizations choose
by.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from tintc.ir.calibration import FIXED, Calibration
from tintc.ir.outputs import Output


class Contexts(Enum):
    """Whose weights the rows of a call read that is given updates. A context is a sequence that
    was trained on; it has weights of its own.
    """

    EACH = "each"  # a row, a context
    ONE = "one"  # all rows read those of one context, which have no batch dimension
    GROUPS = "groups"  # contexts have the same number of rows each, side by side: prompts, beams


@dataclass(frozen=True)
class Choices:
    """One kind of call. The caller knows the first fields; the others follow from weights, sizes
    and what is switched on.
    """

    outputs: tuple[Output, ...] = ()  # what is wanted
    from_updates: bool = False  # the updated slot values are given, and nothing is trained
    contexts: Contexts = Contexts.EACH
    # Slots whose updates are returned, or given, as factors (see `passes/decode`).
    factored: frozenset[str] = frozenset()
    # Slot values and states are given, and trained on: one step of several.
    from_states: bool = False
    frozen: bool = False  # what no step changes is given
    donated: bool = False  # nobody else holds what is given: it may be written over
    some_tokens: bool = False  # logits at some positions only
    some_losses: bool = False  # and losses
    scored: bool = False  # the positions that carry loss are given: few of those trained on
    # A window of a stream: loss stands at the kept positions alone, and training sees all tokens.
    window: bool = False
    cached: bool = False  # keys and values of earlier tokens are given
    into: bool = False  # logits are written into tensors that the caller gives
    # Someone may ask for gradients through the call: nothing may be computed in place or by
    # kernels without a derivative.
    differentiable: bool = True
    causal: bool = False  # the attention mask is the causal one and nothing else

    dtype: torch.dtype = torch.float32  # of what is computed
    stored: torch.dtype = torch.float32  # of the weights (see `precision.computed_dtype`)
    device: str = "cpu"  # of the weights
    enabled: frozenset[str] = frozenset()  # names of the optimizations that are on
    # How fast the machine is, by which products choose their kernels and the head its chunks.
    calibration: Calibration = FIXED
    # B, T and S, rounded to powers of two; none where the calibration asks for no sizes.
    sizes: tuple[tuple[str, int], ...] = ()
    # Slots whose updates stay factors (see `passes/optimize/low_rank_updates.py`).
    low_rank: frozenset[str] = frozenset()
