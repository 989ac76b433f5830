"""tintc statistics: root mean squares of a model's gradients over a text, for the optimizer rms."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tintc.commands import console
from tintc.commands.evaluate import access_of
from tintc.commands.options import Chunks
from tintc.compiler.driver import compile as compile_model
from tintc.compiler.gathering import gather_statistics
from tintc.compiler.gradient_statistics import Statistics, check_target
from tintc.evaluate.text import Text, read_text, token_ids
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import SourceError


def run(
    source: str,
    data: str,
    output: Path,
    config: SimulatorConfig,
    chunks: Chunks,
    how: dict[str, Any],
    *,
    force: bool,
    as_json: bool,
) -> None:
    """Gathers, writes the file and prints what is in it. how: device, dtype and options of
    `tintc.compile`.
    """
    check_target(output, force=force)
    text = read_text(data, choose=True, access=access_of(how))
    device, options = how["device"], {k: v for k, v in how.items() if k != "device"}
    start = time.monotonic()
    with console.work() as show:
        simulator = compile_model(source, config.by_plain_sgd(), progress=show, **options)
        if simulator.tokenizer is None:
            raise SourceError(
                f"{source} has no tokenizer; expected a source with one, since the data are texts; "
                "tintc.gather_statistics takes token ids"
            )
        ids = token_ids(simulator.tokenizer, text)[: chunks.tokens]
        simulator = simulator if device is None else simulator.to(device)
        sizes = {"chunk": chunks.chunk, "context": chunks.context, "batch": chunks.batch}
        found = gather_statistics(simulator, ids, **sizes, progress=show)
    written = found.save(output)
    facts = _facts(found, text, len(ids), written)
    facts["seconds"] = round(time.monotonic() - start, 2)
    if as_json:
        console.print_json({"source": source, **facts})
        return
    _print(source, facts)


def _facts(found: Statistics, text: Text, tokens: int, written: Path) -> dict[str, Any]:
    """unreached: how many numbers had no gradient in any chunk."""
    about, values = found.about, found.tensors.values()
    return {
        "output": str(written),
        "data": {"name": text.name, "sha256": text.sha256, "tokens": tokens},
        "chunk": about.chunk,
        "context": about.context,
        "chunks": about.chunks,
        "gradients": about.gradients.model_dump(),
        "dtype": about.dtype,
        "weights": len(values),
        "parameters": sum(value.numel() for value in values),
        "unreached": sum(int((value == 0).sum()) for value in values),
    }


def _print(source: str, facts: dict[str, Any]) -> None:
    number = console.number
    rows = {
        "source": source,
        "text": f"{facts['data']['name']}, {facts['data']['tokens']} tokens",
        "gradients": f"of {facts['chunks']} chunks of {facts['chunk']} targets, with up to "
        f"{facts['context']} tokens before them",
        "statistics": f"of {facts['weights']} weights, {number(facts['parameters'])} parameters",
    }
    if facts["unreached"]:
        rows["no gradient"] = (
            f"{number(facts['unreached'])} parameters in any chunk: a step divides theirs by "
            "eps alone"
        )
    console.print_table(console.named(rows))
    if not console.Verbosity.quiet:
        console.err.print(
            f"wrote {facts['output']} in {facts['seconds']:.1f} s; next, with the same preset: "
            f"tintc compile {source} -o DIR --optimizer rms --statistics {facts['output']}",
            markup=False,
        )
