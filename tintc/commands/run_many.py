"""tintc run over many documents: each is trained on its own first part, and predicts its rest.

Documents of about the same length run in one call, so that little of it is padding. Legend: B
documents of a call, T tokens of the longest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tintc.commands import console
from tintc.commands.continuing import Continuing, adapt_to, contexts_at_once, prompt_of
from tintc.commands.documents import Document, Refused, fail_for, read_documents
from tintc.commands.generating import Generating
from tintc.commands.loaded import load_at_rate
from tintc.commands.sheet import Sheet
from tintc.commands.text import Reading, change, check_loss, check_rest, losses, rounded
from tintc.ir.errors import InputError, NumericalError
from tintc.ir.rule_values import rule_text
from tintc.runtime.simulator import Simulator


def run(
    path: Path,
    asked: Reading,
    generating: Generating,
    batch: int,
    device: str | None,
    dtype: torch.dtype | None,
    *,
    as_json: bool,
) -> None:
    """Prints a line a document, and the total. batch: documents of one call, at most."""
    prompt = generating.read() if generating.is_asked else None
    simulator = load_at_rate(path, asked.inner_lr, device, dtype)
    start = None if prompt is None else prompt_of(simulator, prompt)
    with console.work() as show, torch.inference_mode():
        found = read_documents(simulator, asked, simulator.program.facts.longest, show)
        refused = [each for each in found if isinstance(each, Refused)]
        documents, short = _with_a_rest(found, asked)
        refused += short
        rows: dict[int, dict[str, Any]] = {}
        continuing = (
            Continuing(simulator, generating, asked.generate)
            if asked.generate and documents
            else None
        )
        for call in _by_length(documents, batch):
            stage = partial(show, done=len(rows), total=len(documents))
            stage(f"{len(call)} documents of up to {len(call[0].ids)} tokens")
            rows |= _run(simulator, call, asked)
            if continuing is not None:
                _continue(continuing, call, asked, start, rows, stage)
    refused += _diverged(documents, rows, float(simulator.inner_lr.detach()))
    refused.sort(key=lambda each: each.number)
    for each in refused:
        rows[each.number] = {
            "document": each.number, "name": each.name, "error": str(each.error)
        }  # fmt: skip
    _show(_result(simulator, [rows[number] for number in sorted(rows)]), as_json)
    fail_for(refused, len(found))


def _with_a_rest(
    found: Sequence[Document | Refused], asked: Reading
) -> tuple[list[Document], list[Refused]]:
    """Documents of which something is left to predict, or that are gone on with; and the others."""
    documents, refused = [], []
    for each in found:
        if isinstance(each, Refused):
            continue
        try:
            check_rest(len(each.ids), asked.trained(len(each.ids)), asked.generate)
            documents.append(each)
        except InputError as error:
            refused.append(Refused(each.number, each.name, error))
    return documents, refused


def _by_length(documents: Sequence[Document], batch: int) -> list[list[Document]]:
    """Calls, the longest documents first: if memory is too small, that is seen at once."""
    ordered = sorted(documents, key=lambda document: len(document.ids), reverse=True)
    return [ordered[start : start + batch] for start in range(0, len(ordered), batch)]


def _run(
    simulator: Simulator, documents: list[Document], asked: Reading
) -> dict[int, dict[str, Any]]:
    """Number of a document -> its line, of one call."""
    ids_BT = torch.nn.utils.rnn.pad_sequence([each.ids for each in documents], batch_first=True)
    lengths_B1 = torch.tensor([len(each.ids) for each in documents]).unsqueeze(-1)
    trained_B1 = torch.tensor([asked.trained(len(each.ids)) for each in documents]).unsqueeze(-1)
    columns_T = torch.arange(ids_BT.shape[1])
    real_BT, train_BT = columns_T < lengths_B1, columns_T < trained_B1
    # Where nothing is left to predict, all tokens tell whether training diverged.
    whole_B1 = trained_B1.clamp(min=1) >= lengths_B1
    labels_BT = ids_BT.masked_fill(~real_BT | (train_BT & ~whole_B1), -100)
    labels_BT[:, 0] = -100
    mask_BT = None if bool(real_BT.all()) else real_BT.long()
    out = simulator.losses(
        ids_BT, train_BT.long(), labels_BT, attention_mask=mask_BT, return_initial=True
    )
    assert out.initial_losses is not None
    targets_B = (labels_BT != -100).sum(-1)
    before_B, after_B = (
        (each.double().sum(-1).cpu() / targets_B).tolist()
        for each in (out.initial_losses, out.losses)
    )
    rows = {}
    for row, document in enumerate(documents):
        tokens, trained = len(document.ids), int(trained_B1[row])
        rows[document.number] = {
            "document": document.number,
            "name": document.name,
            "tokens": tokens,
            "trained_tokens": trained,
            "predicted_tokens": tokens - max(trained, 1),
            **losses(before_B[row], after_B[row]),
        }
    return rows


def _continue(
    continuing: Continuing,
    documents: list[Document],
    asked: Reading,
    prompt: list[int] | None,
    rows: dict[int, dict[str, Any]],
    stage: Callable[[str], None],
) -> None:
    """Adds to the lines of a call what follows each document, or the prompt. Own weights of many
    documents are large, so that fewer may run together; what diverged is left out.
    """
    documents = [each for each in documents if math.isfinite(rows[each.number]["loss_after"])]
    size = contexts_at_once(continuing.simulator, len(documents))
    for first in range(0, len(documents), size):
        part = documents[first : first + size]
        adapted = adapt_to(
            continuing.simulator, [each.ids.tolist() for each in part], asked.trained
        )
        prompts = [each.ids.tolist() if prompt is None else prompt for each in part]
        for document, found in zip(part, continuing.rows(adapted, prompts, stage), strict=True):
            rows[document.number] |= {"generated": found.text, "generated_tokens": found.tokens}


def _diverged(
    documents: Sequence[Document], rows: dict[int, dict[str, Any]], inner_lr: float
) -> list[Refused]:
    found = []
    for document in documents:
        row = rows[document.number]
        try:
            check_loss(row["loss_after"], inner_lr)
        except NumericalError as error:
            found.append(Refused(document.number, document.name, error))
        if not row["predicted_tokens"]:
            row |= losses(None, None)
    return found


def _result(simulator: Simulator, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """As JSON values. The total has the mean loss of all predicted tokens."""
    done = [row for row in rows if "error" not in row]
    count = sum(row["predicted_tokens"] for row in done)
    means = [
        math.fsum(row[name] * row["predicted_tokens"] for row in done if row["predicted_tokens"])
        / count
        if count
        else None
        for name in ("loss_before", "loss_after")
    ]
    return {
        "inner_lr": float(simulator.inner_lr.detach()),
        "steps": simulator.config.steps,
        "rule": simulator.config.rule,
        "total": {
            "documents": len(done),
            "failed": len(rows) - len(done),
            **{
                name: sum(row[name] for row in done)
                for name in ("tokens", "trained_tokens", "predicted_tokens")
            },
            **losses(*means),
        },
        "documents": rows,
    }


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        console.print_json(result)
        return
    sheet = Sheet(
        "document", "trained", "predicted", "perplexity before", "after", "change", numeric=1
    )
    done = [row for row in result["documents"] if "error" not in row]
    for row in [*done, {"name": "total", **result["total"]}]:
        before, after = row["perplexity_before"], row["perplexity_after"]
        numbers = ("-", "-", "")
        if before is not None and after is not None:
            numbers = (rounded(before), rounded(after), change(before, after))
        sheet.add_row(
            row["name"], str(row["trained_tokens"]), str(row["predicted_tokens"]), *numbers
        )
    console.print_table(sheet)
    rule = f", {rule_text(result['rule'])}" if result["rule"] else ""
    console.print_text(
        f"{console.steps(result['steps'])} at learning rate {result['inner_lr']:g}{rule}"
    )
    for row in result["documents"]:
        if "error" in row:
            console.out.print(f"{row['name']}: {row['error']}", markup=False)
        elif "generated" in row:
            console.out.print(f"{row['name']}: {row['generated']}", markup=False)
