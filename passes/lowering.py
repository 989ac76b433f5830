"""The passes between a captured graph and a lowered one, in the order in which they run."""

from tintc.ir.pass_manager import Pass
from tintc.passes.optimize.dead_code import dead_code
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
CANONICAL_AFTER = refuse_unsupported.name
