"""What `tintc run --stream` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tintc.commands import console
from tintc.commands.documents import Refused
from tintc.commands.sheet import Sheet
from tintc.commands.stream_totals import Totals
from tintc.commands.text import change, rounded
from tintc.ir.rule_values import rule_text
from tintc.runtime.simulator import Simulator
from tintc.runtime.stream_settings import StreamSettings


def report(
    simulator: Simulator,
    settings: StreamSettings,
    batch: int,
    totals: Totals,
    refused: Sequence[Refused],
) -> dict[str, Any]:
    """As JSON values. Sums and means with _before are the unmodified model's in the same windows,
    those with _after the stream's. Losses in nats.
    """
    failed = [
        {"document": each.number, "name": each.name, "error": str(each.error)} for each in refused
    ]
    documents = sorted([*totals.of_documents(), *failed], key=lambda row: row["document"])
    return {
        "stream": {**asdict(settings), "batch": batch},
        "inner_lr": float(simulator.inner_lr.detach()),
        "steps": simulator.config.steps,
        "rule": simulator.config.rule,
        **totals.overall(),
        "curve": totals.curve(),
        "documents": documents,
    }


def show(result: dict[str, Any], as_json: bool) -> None:
    """Prints it."""
    if as_json:
        console.print_json(result)
        return
    console.print_table(console.named(_facts(result)))
    console.out.print()
    console.print_table(_overall(result))
    if len(result["documents"]) > 1:
        console.out.print()
        console.print_table(_documents(result["documents"]))
    for row in result["documents"]:
        if "error" in row:
            console.out.print(f"{row['name']}: {row['error']}", markup=False)
    if len(result["curve"]) > 1:
        console.out.print()
        console.print_table(_curve(result["curve"]))


def _facts(result: dict[str, Any]) -> dict[str, str]:
    """The lines at the top."""
    stream = result["stream"]
    keys = {"recompute": "computed anew", "cache": "kept"}[stream["keys"]]
    starts = "each document starts anew"
    if stream["reset"] == "never":
        starts = "weights are carried from document to document"
        if stream["batch"] > 1:
            starts += f", in {stream['batch']} rows: with another --batch results differ"
    counted = {None: "unknown: this tokenizer gives no offsets", "all": "all"}
    count = result["bytes"]
    return {
        "tokens": f"{result['tokens']}: {result['scored_tokens']} scored",
        "bytes": ("" if count is None else f"{count}: ")
        + counted.get(result["bytes_counted"], result["bytes_counted"]),
        "windows": f"{stream['chunk']} targets, up to {stream['context']} tokens in front, whose "
        f"keys are {keys}",
        "documents": starts,
        "inner training": f"{console.steps(result['steps'])} a chunk at learning rate "
        f"{result['inner_lr']:g}",
        **({"inner rule": rule_text(result["rule"])} if result["rule"] else {}),
        **({"stopped": result["stopped"]["reason"]} if "stopped" in result else {}),
    }


def _overall(result: dict[str, Any]) -> Sheet:
    sheet = Sheet("", "before", "after", "change", numeric=1)
    for title, name in (
        ("summed loss", "nll"),
        ("perplexity", "perplexity"),
        ("bits per byte", "bits_per_byte"),
    ):
        sheet.add_row(title, *_compared(result, name))
    return sheet


def _documents(rows: Sequence[dict[str, Any]]) -> Sheet:
    sheet = Sheet("document", "scored", "perplexity before", "after", "change", numeric=1)
    for row in rows:
        if "error" not in row:
            sheet.add_row(row["name"], str(row["scored_tokens"]), *_compared(row, "perplexity"))
    return sheet


def _curve(rows: Sequence[dict[str, Any]]) -> Sheet:
    sheet = Sheet("positions", "scored", "loss before", "after", "change", numeric=1)
    for row in rows:
        where = f"{row['first']} to {row['last']}"
        sheet.add_row(where, str(row["scored_tokens"]), *_compared(row, "loss"))
    return sheet


def _compared(row: dict[str, Any], name: str) -> tuple[str, str, str]:
    """Before, after, and the change in per cent."""
    before, after = row[f"{name}_before"], row[f"{name}_after"]
    if before is None or after is None:
        return "-", "-", ""
    return rounded(before), rounded(after), change(before, after)
