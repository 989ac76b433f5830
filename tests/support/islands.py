"""Programs of islands that are written by hand."""

from __future__ import annotations

import json


def scaled(width: int) -> str:
    """y = x w: an activation (T, W) times a weight (W,)."""
    x, w = {"v": 0}, {"v": 1}
    dy, x_, w_ = {"v": 0}, {"v": 1}, {"v": 2}
    return json.dumps(
        {
            "inputs": [["tokens", [width], "own"], ["weight", [width], "own"]],
            "widths": [width],
            "forward": {"nodes": [["mul.Tensor", [x, w], {}]], "results": [2]},
            "backward": {
                "nodes": [
                    ["mul.Tensor", [dy, w_], {}],
                    ["mul.Tensor", [dy, x_], {}],
                    ["sum.dim_IntList", [{"v": 4}, [0]], {}],
                ],
                "results": [3, 5],
            },
        }
    )
