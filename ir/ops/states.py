"""What inner rules do with weights beside descending: momentum, decay, moments, orthogonal steps.

A state (momentum v, moments) is a slot like a weight: shared and zero before the first step, one
for each sequence after it. Shapes: a weight or state is (O, I) or (D,) shared, (B, O, I) or (B, D)
of each sequence. Rates: see `rates`.
Source: TINT.md section 7.
"""

import torch
from torch import Tensor

from tintc.ir.dialect import operator
from tintc.ir.node_meta import Shape
from tintc.ir.ops.rates import along, gradient_products, root, token_products
from tintc.ir.ops.shapes import demand, demand_activation, demand_rate, said, same_shape
from tintc.ir.precision import narrow_like, wide

# of torch.optim.Muon
NEWTON_SCHULZ, NEWTON_SCHULZ_STEPS, MUON_EPS = (3.4445, -4.7750, 2.0315), 5, 1e-7


@operator(
    "(Tensor weight) -> Tensor",
    shape=same_shape,
    meaning="a state before the first step",
    kind="read",
    wide=True,
)
def zero_state(weight: Tensor) -> Tensor:
    """Zeros of a weight's shape."""
    return torch.zeros_like(wide(weight))


def _each(*values: Shape) -> Shape:
    """(B, ...) of weights of one size, one of which belongs to a sequence."""
    owned = [value for value in values if value[:1] == ("B",)]
    size = values[0][1:] if values[0][:1] == ("B",) else values[0]
    fits = all(value in (size, ("B", *size)) for value in values)
    demand(fits, f"weights have shapes {', '.join(map(said, values))}; expected the same")
    return ("B", *size) if owned else size


@operator(
    "(Tensor state, float factor) -> Tensor",
    shape=lambda state, factor: state,
    meaning="a state times a constant",
    kind="descent",
)
def fade(state: Tensor, factor: float) -> Tensor:
    """factor * v."""
    return state * factor


def _descend_shape(value: Shape, direction: Shape, rate: Shape) -> Shape:
    demand_rate(rate)
    return _each(value, direction)


@operator(
    "(Tensor value, Tensor direction, Tensor rate) -> Tensor",
    shape=_descend_shape,
    meaning="W - rate v",
    kind="descent",
)
def descend(value: Tensor, direction: Tensor, rate: Tensor) -> Tensor:
    """W - rate v."""
    return wide(value) - along(rate, direction, direction.ndim - 1) * direction


def _toward_shape(value: Shape, anchor: Shape, share: float, each: Shape | None) -> Shape:
    demand(0 <= share <= 1, f"a share is {share}; expected 0 to 1")
    demand_rate(each or ())
    return _each(value, anchor)


@operator(
    "(Tensor value, Tensor anchor, float share, Tensor? each) -> Tensor",
    shape=_toward_shape,
    meaning="W + share (W_0 - W)",
    kind="descent",
)
def toward(value: Tensor, anchor: Tensor, share: float, each: Tensor | None) -> Tensor:
    """W + share * each * (W_0 - W): back towards the original weights. each: 1 where left out."""
    back = wide(anchor) - wide(value)
    return wide(value) + (
        back * share if each is None else back * (along(each, value, value.ndim - 1) * share)
    )


def _one_each(value: Shape, *others: Shape) -> Shape:
    demand(value[:1] == ("B",), f"{said(value)} is not of each sequence")
    _each(value, *others)
    return ("B",)


@operator(
    "(Tensor gradient) -> Tensor",
    shape=_one_each,
    meaning="|g|^2",
    kind="descent",
)
def gradient_square(gradient: Tensor) -> Tensor:
    """The sum of squares of each sequence's gradient of one weight, (B,)."""
    return torch.square(wide(gradient)).flatten(1).sum(-1)


@operator(
    "(Tensor value, Tensor anchor) -> Tensor",
    shape=_one_each,
    meaning="|W - W_0|^2",
    kind="descent",
)
def change_square(value: Tensor, anchor: Tensor) -> Tensor:
    """The sum of squares of what each sequence's weight has changed by, (B,)."""
    return torch.square(wide(value) - wide(anchor)).flatten(1).sum(-1)


@operator(
    "(Tensor anchor) -> Tensor",
    shape=lambda anchor: (),
    meaning="|W_0|^2",
    kind="descent",
)
def original_square(anchor: Tensor) -> Tensor:
    """The sum of squares of an auxiliary weight."""
    return torch.square(wide(anchor)).sum()


def _linear_square_shape(dy: Shape, x: Shape) -> Shape:
    for activation in (dy, x):
        demand_activation(activation)
    demand(dy[:-1] == x[:-1], f"dy is {said(dy)} and x {said(x)}; expected the same tokens")
    return (dy[0],)


@operator(
    "(Tensor dy, Tensor x) -> Tensor",
    shape=_linear_square_shape,
    meaning="|sum_t dy x^T|^2",
    kind="descent",
    whole=True,
)
def linear_square(dy_BTO: Tensor, x_BTI: Tensor) -> Tensor:
    """The sum of squares of a linear layer's gradient, (B,): from products of tokens, or from the
    gradient, whichever costs less.
    """
    tokens, outputs, inputs = dy_BTO.shape[-2], dy_BTO.shape[-1], x_BTI.shape[-1]
    if torch.compiler.is_compiling() or tokens * (outputs + inputs) < outputs * inputs:
        of_values, of_keys = token_products(dy_BTO, dy_BTO), token_products(x_BTI, x_BTI)
        return gradient_products(of_values, of_keys, 1)[:, 0]
    return gradient_square(torch.matmul(wide(dy_BTO).mT, wide(x_BTI)))


# adam, rms and muon


@operator(
    "(Tensor mask) -> Tensor",
    shape=lambda mask: (mask[0],),
    meaning="steps before the first",
    kind="read",
    wide=True,
)
def zero_count(mask_BT: Tensor) -> Tensor:
    """Zeros, (B,), in at least float32: how many steps a sequence has taken."""
    return torch.zeros_like(wide(mask_BT)[:, 0])


@operator(
    "(Tensor count, Tensor mask) -> Tensor",
    shape=lambda count, mask: (mask[0],),
    meaning="steps so far, this one included",
    kind="descent",
)
def next_count(count_B: Tensor, mask_BT: Tensor) -> Tensor:
    """count + 1 where a sequence has a training target."""
    return count_B + (mask_BT != 0).any(-1).to(count_B.dtype)


def _moment_shape(state: Shape, gradient: Shape, beta: float, squared: bool) -> Shape:
    demand(0 <= beta < 1, f"beta is {beta}; expected 0 to below 1")
    return _each(state, gradient)


@operator(
    "(Tensor state, Tensor gradient, float beta, bool squared) -> Tensor",
    shape=_moment_shape,
    meaning="beta m + (1 - beta) g, or g^2",
    kind="descent",
)
def moment(state: Tensor, gradient: Tensor, beta: float, squared: bool) -> Tensor:
    """beta m + (1 - beta) g, or of g^2: the moments of torch.optim.Adam."""
    seen = torch.square(wide(gradient)) if squared else wide(gradient)
    return state * beta + seen * (1 - beta)


def _adam_shape(
    value: Shape, first: Shape, second: Shape, count: Shape, rate: Shape,
    beta1: float, beta2: float, eps: float,
) -> Shape:  # fmt: skip
    for beta in (beta1, beta2):
        demand(0 <= beta < 1, f"beta is {beta}; expected 0 to below 1")
    demand(eps > 0, f"eps is {eps}; expected a number above 0")
    demand_rate(count)
    demand_rate(rate)
    return _each(value, first, second)


@operator(
    "(Tensor value, Tensor first, Tensor second, Tensor count, Tensor rate, float beta1, float "
    "beta2, float eps) -> Tensor",
    shape=_adam_shape,
    meaning="W - rate m^ / (sqrt(n^) + eps)",
    kind="descent",
)
def adam_descent(
    value: Tensor,
    first: Tensor,
    second: Tensor,
    count: Tensor,
    rate: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> Tensor:
    """W - rate * (m / (1 - beta1^k)) / (sqrt(n / (1 - beta2^k)) + eps), k = count: that of
    torch.optim.Adam. Before the first step, W.
    """
    by, steps = along(rate, first, first.ndim - 1), count.clamp(min=1)
    for _ in range(first.ndim - 1):
        steps = steps.unsqueeze(-1)
    unbiased = [(1 - beta**steps).to(first.dtype) for beta in (beta1, beta2)]
    first, second = first / unbiased[0], second / unbiased[1]
    return wide(value) - by * (first / (root(second) + eps))


@operator(
    "(Tensor gradient, Tensor statistics, float eps) -> Tensor",
    shape=lambda gradient, statistics, eps: _each(gradient, statistics),
    meaning="g / (RMS + eps)",
    kind="descent",
)
def divide(gradient: Tensor, statistics: Tensor, eps: float) -> Tensor:
    """g / (RMS + eps), RMS the root mean square of gradients gathered before."""
    return gradient / (wide(statistics) + eps)


def _stacked_shape(parts: list[Shape]) -> Shape:
    demand(bool(parts) and all(len(part) == 3 for part in parts), "expected matrices")
    return ("B", sum(int(part[-2]) for part in parts), parts[0][-1])


@operator(
    "(Tensor[] parts) -> Tensor",
    shape=_stacked_shape,
    meaning="slots of one weight, one below the other, made orthogonal",
    kind="descent",
    whole=True,
)
def orthogonal(parts: list[Tensor]) -> Tensor:
    """U V^T of a matrix U S V^T, (B, O, I), roughly: five Newton-Schulz steps of torch.optim.Muon,
    and its factor sqrt(max(1, O / I)).

    Parts are slots of one parameter; their order changes nothing but that of the rows.
    """
    rows, columns = sum(part.shape[-2] for part in parts), parts[0].shape[-1]
    whole_BOI = torch.cat(parts, 1)
    a, b, c = NEWTON_SCHULZ
    x = wide(whole_BOI.mT if rows > columns else whole_BOI)
    norm = torch.sqrt(torch.square(x).flatten(1).sum(-1).clamp(min=MUON_EPS**2))
    x = x / norm.unsqueeze(-1).unsqueeze(-1)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = torch.matmul(x, x.mT)
        x = a * x + torch.matmul(b * gram + c * torch.matmul(gram, gram), x)
    x = x.mT if rows > columns else x
    return narrow_like(x * max(1.0, rows / columns) ** 0.5, whole_BOI)


def _rows_shape(matrix: Shape, start: int, stop: int) -> Shape:
    demand(len(matrix) == 3, f"{said(matrix)} is no matrix of each sequence")
    demand(0 <= start < stop <= int(matrix[1]), f"{start}:{stop} are no rows of {said(matrix)}")
    return (matrix[0], stop - start, matrix[2])


@operator(
    "(Tensor matrix, int start, int stop) -> Tensor",
    shape=_rows_shape,
    meaning="one slot's rows of a weight",
    kind="descent",
)
def rows(matrix_BOI: Tensor, start: int, stop: int) -> Tensor:
    """Rows start .. stop-1, (B, O, I)."""
    return matrix_BOI[:, start:stop]
