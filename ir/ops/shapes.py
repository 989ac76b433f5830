"""Shape rules that operators of several families share, and what rules demand of their operands.

B: one for each sequence. A rule raises ValueError for operands that do not fit each other: torch's
kernels do not check all that they rely on, and an artifact may hold any graph.
"""

from collections.abc import Collection

from tintc.ir.node_meta import Shape, Size


def same_shape(x: Shape, *_: object) -> Shape:
    """That of the first argument."""
    return x


def alike(x: Shape, y: Shape, *_: object) -> Shape:
    """That of the first two arguments, which have the same."""
    demand(x == y, f"operands have shapes {said(x)} and {said(y)}; expected the same")
    return x


def each_matrix(weight: Shape, *_: object) -> Shape:
    """(O, I) or (B, O, I) -> (B, O, I): what a descent makes of a weight."""
    return ("B", *weight[-2:])


def each_vector(vector: Shape, *_: object) -> Shape:
    """(D,) or (B, D) -> (B, D): what a descent makes of a bias or a gain."""
    return ("B", vector[-1])


def demand(holds: bool, otherwise: str) -> None:
    """Raises ValueError, saying `otherwise`, unless it holds."""
    if not holds:
        raise ValueError(otherwise)


def demand_one_of(value: str, choices: Collection[str]) -> None:
    demand(value in choices, f"{value!r} is none of {', '.join(choices)}")


def demand_activation(x: Shape) -> None:
    """(B, T, D), or of some tokens."""
    demand(len(x) == 3, f"an operand has shape {said(x)}; expected (B, T, D)")


def demand_weight(weight: Shape | None, batch: Size, *sizes: Size) -> None:
    """One weight of these sizes, or one for each sequence of the batch, or none."""
    demand(
        weight is None or weight in (sizes, (batch, *sizes)),
        f"a weight has shape {said(weight or ())}; expected {said(sizes)}",
    )


def demand_rate(rate: Shape) -> None:
    """One number, or one for each sequence."""
    demand(rate in ((), ("B",)), f"a rate has shape {said(rate)}; expected a number or (B,)")


def demand_matrix(weight: Shape) -> None:
    """(O, I), or one for each sequence."""
    demand(len(weight) in (2, 3), f"a weight has shape {said(weight)}; expected (O, I)")


def part(size: Size, pieces: int) -> int:
    """The size of each of so many equal pieces of a dimension."""
    demand(
        isinstance(size, int) and pieces > 0 and size % pieces == 0,
        f"{size} coordinates cannot be cut into {pieces} pieces",
    )
    return int(size) // pieces


def said(shape: Shape) -> str:
    return f"({', '.join(map(str, shape))})"
