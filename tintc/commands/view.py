"""What `tintc inspect` is asked to show. Nothing here imports torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from cyclopts import Parameter

from tintc.ir.errors import UsageError
from tintc.ir.named import Stage

Form = Literal["table", "code", "dot", "json", "model-explorer"]


@dataclass(frozen=True, kw_only=True)
class View:
    """The summary of a simulator, or what is asked for."""

    stage: Annotated[Stage | None, Parameter(help="Show the graph after this stage.")] = None
    form: Annotated[Form, Parameter(name="--format", help="How a graph is written.")] = "table"
    slots: Annotated[bool, Parameter(help="Show the prefix and memory slots.")] = False
    params: Annotated[bool, Parameter(help="Show what every parameter is for.")] = False
    node: Annotated[str | None, Parameter(metavar="NAME", help="Show one node of the stage.")] = (
        None
    )

    def checked(self, *, as_json: bool) -> View:
        """The same, in JSON if that is asked for. Raises UsageError for what excludes each
        other.
        """
        if as_json and self.form not in ("table", "json"):
            raise UsageError(
                f"--json and --format {self.form} exclude each other; pass one of them"
            )
        form: Form = "json" if as_json else self.form
        whole, other = ("--slots", "--params") if self.slots else ("--params", "--slots")
        of_all = self.slots or self.params
        both = self.slots and self.params
        if of_all and (self.stage is not None or self.node is not None or both):
            raise UsageError(
                f"{whole} shows the whole simulator; pass it without --stage, --node and {other}"
            )
        if (of_all or self.node is not None) and form not in ("table", "json"):
            raise UsageError(
                f"--format is {form}; {whole if of_all else '--node'} has the formats table and "
                "json"
            )
        return replace(self, form=form)
