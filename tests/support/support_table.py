"""The table of docs/reference/support.md, rendered from the models that the tests run:
`python -m tests.support.support_table`.
"""

from __future__ import annotations

from tests.support.families import FAMILIES, Family

BEGIN, END = "<!-- support table -->", "<!-- end of support table -->"
HEADER = (
    "family",
    "for example",
    "norms",
    "positions",
    "attention",
    "feed-forward",
    "inputs compared",
    "approximations",
)


def render() -> str:
    """A Markdown table with one row a family; test_families.py runs every row."""
    rows = [HEADER, tuple("---" for _ in HEADER), *(_row(family) for family in FAMILIES.values())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(family: Family) -> tuple[str, ...]:
    inputs = ["padding"]
    inputs += ["(B, T, T) masks"] if family.masks else []
    inputs += ["`position_ids`"] if family.position_ids else []
    parts = (family.norm, family.positions, family.attention, family.feed_forward)
    approximations = "all" if family.linear_head else "all but `mean_embedding`"
    return (family.title, f"`{family.example}`", *parts, ", ".join(inputs), approximations)


if __name__ == "__main__":
    print(render())
