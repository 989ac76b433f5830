"""Rows of the classification's table: comparisons within a task and averages over tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tintc.evaluate.settings import Settings
from tintc.evaluate.statistics import paired_p_value

ROW_UNMODIFIED, ROW_IN_CONTEXT, ROW_DYNAMIC = (
    "unmodified",
    "unmodified, in context",
    "dynamic evaluation",
)


_COMPARED = {
    "p_unmodified": ROW_UNMODIFIED,
    "p_in_context": ROW_IN_CONTEXT,
    "p_dynamic_evaluation": ROW_DYNAMIC,
}


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds to each row the p-values of its difference from those that it is compared with; None for
    itself, or where there is none.
    """
    for key, name in _COMPARED.items():
        base = next((row for row in rows if row["name"] == name), None)
        for row in rows:
            row[key] = (
                None if base is None or row is base else paired_p_value(row["right"], base["right"])
            )


def averages(results: list[dict[str, Any]], shots: Sequence[int]) -> list[dict[str, Any]]:
    """Of each row over all tasks: the mean accuracy, and the paired tests over the items of all
    tasks together.
    """
    found = []
    for count in shots:
        cells = [result["rows"] for result in results if result["shots"] == count]
        rows = []
        for parts in zip(*cells, strict=True):
            accuracy = sum(part["accuracy"] for part in parts) / len(parts)
            right = [value for part in parts for value in part["right"]]
            same = {"shots": count, "name": parts[0]["name"], "control": parts[0]["control"]}
            seconds = round(sum(part["seconds"] for part in parts), 3)
            rows.append(
                {
                    **same,
                    "accuracy": accuracy,
                    "tasks": len(parts),
                    "n": len(right),
                    "seconds": seconds,
                    "right": right,
                }
            )
        compare(rows)
        found += [{name: value for name, value in row.items() if name != "right"} for row in rows]
    return found


def plain(settings: Settings) -> dict[str, Any]:
    """JSON values, without what changes no result."""
    found = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(settings).items()
    }
    return {name: value for name, value in found.items() if name not in ("batch", "data_dir")}
