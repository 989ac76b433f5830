"""Shape rules that operators of several families share. B: one for each sequence."""

from tintc.ir.node_meta import Shape


def same_shape(x: Shape, *_: object) -> Shape:
    """That of the first argument."""
    return x


def each_matrix(weight: Shape, *_: object) -> Shape:
    """(O, I) or (B, O, I) -> (B, O, I): what a descent makes of a weight."""
    return ("B", *weight[-2:])


def each_vector(vector: Shape, *_: object) -> Shape:
    """(D,) or (B, D) -> (B, D): what a descent makes of a bias or a gain."""
    return ("B", vector[-1])
