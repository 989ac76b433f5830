"""tintc run: which kind of run a command line asks for. Nothing here imports torch before that is
known.
"""

from __future__ import annotations

from pathlib import Path

from tintc.commands.exporting import is_pair
from tintc.commands.generating import Generating
from tintc.commands.options import Where
from tintc.commands.showing import Showing
from tintc.commands.stream_flags import StreamFlags
from tintc.commands.text import Reading
from tintc.ir.errors import UsageError


def run(
    path: Path,
    reading: Reading,
    generating: Generating,
    reads: StreamFlags,
    where: Where,
    showing: Showing,
    *,
    as_json: bool,
) -> None:
    """Raises UsageError for options that mean nothing together."""
    if reads.stream and (names := list(generating.names())):
        raise UsageError(
            f"{' and '.join(names)} with --stream, which generates nothing; expected one of the two"
        )
    asked = generating.settled(reading)
    reads.check(asked)
    if generating.each is None and generating.adapted is None:
        asked.check()
    showing.check(
        {
            "--each, of many texts": generating.each is not None,
            "--adapted, which reads no text": generating.adapted is not None,
            f"{asked.file}, which holds many documents": asked.is_many,
            "--state, which keeps no losses of an earlier run": reads.state is not None,
        }
    )
    if is_pair(path):
        _check_onnx(reads, where)
        if strange := [name for name in generating.names() if name in ("--each", "--adapted")]:
            raise UsageError(
                f"{', '.join(strange)}: a pair trains on one text and goes on with it, or with "
                "--prompt; expected the directory of a simulator"
            )
        from tintc.commands import run_pair

        prompt = generating.read() if generating.is_asked else None
        run_pair.run(path, asked, generating, prompt, showing, as_json=as_json)
    elif path.suffix == ".onnx":
        _check_onnx(reads, where)
        if names := list(generating.names()):
            raise UsageError(
                f"{', '.join(names)}: an ONNX model only goes on with its text, by the likeliest "
                "tokens; expected the directory of a simulator, or the folder of a pair"
            )
        from tintc.commands import run_onnx

        run_onnx.run(path, asked, showing, as_json=as_json)
    elif generating.adapted is not None:
        from tintc.commands.run import run_adapted

        run_adapted(path, generating, asked.generate or 0, *where.chosen(), as_json=as_json)
    elif reads.stream:
        from tintc.commands import stream

        stream.run(path, asked, reads, showing, *where.chosen(), as_json=as_json)
    elif generating.each is not None:
        from tintc.commands import run_each

        most = reads.side_by_side
        run_each.run(path, asked, generating, most, *where.chosen(), as_json=as_json)
    elif asked.is_many:
        from tintc.commands import run_many

        most = reads.side_by_side
        run_many.run(path, asked, generating, most, *where.chosen(), as_json=as_json)
    else:
        from tintc.commands import run as command

        command.run(path, asked, generating, showing, *where.chosen(), as_json=as_json)


def _check_onnx(reads: StreamFlags, where: Where) -> None:
    if reads.stream or reads.batch is not None:
        raise UsageError(
            "an ONNX model runs one text; expected neither --stream nor --batch, or the directory "
            "of a simulator"
        )
    if where != Where():
        raise UsageError(
            "an ONNX model runs on the CPU in the dtype that it was exported in; expected neither "
            "--device nor --dtype"
        )
