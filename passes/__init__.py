"""The passes, one a file. `lowering` and `specializing` hold the orders in which they run: two, so
that a call of a finished simulator loads nothing of what recognises a captured graph.

Beside them stand what they ask about a captured value: what it is at given sizes (`evaluation`),
which coordinates of which activation it is (`coordinates`, `heads`), what happens to scores before
their softmax (`scores`), small questions (`patterns`); and where they keep what positions give
(`tables`).
"""
