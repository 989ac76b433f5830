"""Tables of rules: what a pass or a back end does with each operator.

    descent_rule = RuleTable[DescentRule]("descent", needed_by=lambda o: bool(o.weights))

    @descent_rule(linear_forward)
    def _linear(...): ...

The module that uses a table checks it when it is imported, by `complete()`. So an operator without
a rule stops every test, and never a user's run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import fx

from tintc.ir.dialect import AnyOperator, operator_of
from tintc.ir.errors import CompilerBug
from tintc.ir.ops import OPERATORS

Rule = TypeVar("Rule", bound=Callable[..., Any])


class RuleTable(Generic[Rule]):
    """One rule for each operator that needs one; `needed_by` says which do."""

    def __init__(self, name: str, needed_by: Callable[[AnyOperator], bool]) -> None:
        self.name, self.needed_by = name, needed_by
        self._rules: dict[AnyOperator, Rule] = {}

    def __call__(self, *operators: AnyOperator) -> Callable[[Rule], Rule]:
        """Decorates the rule of these operators. Raises CompilerBug for a second one of the same
        operator.
        """

        def register(rule: Rule) -> Rule:
            for operator in operators:
                if operator in self._rules:
                    raise CompilerBug(f"{operator} has two {self.name} rules")
                self._rules[operator] = rule
            return rule

        return register

    def of(self, node: fx.Node) -> Rule | None:
        """The rule of the operator that a node calls; None where it needs none."""
        operator = operator_of(node)
        return self._rules.get(operator) if operator is not None else None

    def complete(self) -> RuleTable[Rule]:
        """The table itself. Raises CompilerBug where an operator lacks a rule that it needs, or has
        one that nothing would call.
        """
        needed = {o for o in OPERATORS.values() if self.needed_by(o)}
        problems = [
            *(f"{o} has no {self.name} rule" for o in needed - set(self._rules)),
            *(f"{o} has a {self.name} rule and needs none" for o in set(self._rules) - needed),
        ]
        if problems:
            raise CompilerBug("; ".join(sorted(problems)))
        return self
