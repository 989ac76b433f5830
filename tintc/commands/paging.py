"""Options of `tintc page`. Nothing here imports torch.

Annotations are no strings here, as in options.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from tintc.commands.flags import at_least
from tintc.ir.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Paging:
    """What is written, and whether it is shown."""

    output: Annotated[
        Path | None,
        Parameter(name=("-o", "--output"), metavar="OUT", help="Folder to write the page to."),
    ] = None
    model: Annotated[
        bool,
        Parameter(negative=None, help="With the model, so that the page can run a text."),
    ] = True
    limit_mb: Annotated[
        float, Parameter(help="A larger model is left out, and the page says so.")
    ] = 300.0
    force: Annotated[bool, Parameter(help="Replace a page that exists.")] = False
    serve: Annotated[
        bool,
        Parameter(negative=(), help="Serve the page on this machine alone, until Ctrl-C."),
    ] = False
    open: Annotated[bool, Parameter(negative=(), help="The same, and open it in a browser.")] = (
        False
    )
    port: Annotated[
        int | None,
        at_least(0),
        Parameter(help="With --serve or --open; default 8000, or a free one where it is taken."),
    ] = None

    @property
    def served(self) -> bool:
        return self.serve or self.open

    def check(self, *, of_page: bool, as_json: bool) -> None:
        """Raises UsageError for what makes no sense together. of_page: what is given is a page
        already.
        """
        if self.port is not None and not self.served:
            raise UsageError("--port is of a page that is served; pass --serve or --open beside it")
        if as_json and self.served:
            raise UsageError(
                "--json prints one document and ends, a page is served until Ctrl-C; expected one "
                "of --json and --serve"
            )
        if of_page and (self.output is not None or not self.served):
            raise UsageError(
                "this is a page already; expected --serve or --open alone, or the directory that "
                "`tintc compile` wrote and -o OUT"
            )
        if self.output is None and not self.served:
            raise UsageError("Missing option '-o': the folder to write; or --serve, to look once")
