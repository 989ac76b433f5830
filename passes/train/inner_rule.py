"""The inner rule as operators: from the gradient of every trained slot to its new value.

    plain:     W' = linear_descent(W, dy, x, rate)
    momentum:  v' = linear_descent(fade(v, mu), dy, x, -1);  W' = descend(W, v', rate)
    clip_norm, normalize: a rate of each sequence, from sums of squares over weights
    adam, rms, muon: from the gradient itself, which descends from zero
    decay, max_drift: W'' = toward(W', W_0, share)

W is the value before the step and W_0 the auxiliary weight, read once more as `slot/original`.
States are slots, `slot/momentum`, `slot/first` and `slot/second`, and `count`; a gradient that is
wanted for itself is `slot/gradient`. Order and formulas: TINT.md section 7.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from tintc.ir.builder import Builder, input_node
from tintc.ir.config import SimulatorConfig
from tintc.ir.dialect import AnyOperator, argument
from tintc.ir.inputs import statistics_name
from tintc.ir.node_meta import copy_info, info
from tintc.ir.ops import rates, states
from tintc.ir.ops.linear import linear_descent
from tintc.passes.train.descent_rules import Update


@dataclass
class Trained:
    """A trained slot: its value before the step, and what descends it, with the layers that do."""

    name: str
    value: fx.Node  # the tint.prefix
    factor: float  # of the learning rate
    updates: list[tuple[Update, fx.Node]] = field(default_factory=list)
    of_head: bool = False  # a layer that makes logits reads it

    @property
    def parameter(self) -> fx.Node:
        """The placeholder of the whole weight, of which the slot may be some rows."""
        node: fx.Node = argument(self.value, "parameter")
        return node

    @property
    def is_matrix(self) -> bool:
        """Whether it is a weight of linear layers alone."""
        return all(update.operator is linear_descent for update, _ in self.updates)


class InnerRule:
    """Builds one step for all trained slots. states: slot -> the newest value of a state."""

    def __init__(self, graph: fx.Graph, config: SimulatorConfig) -> None:
        self.build, self.config = Builder(graph), config
        self.inner_lr = input_node(graph, "inner_lr")
        self.states: dict[str, fx.Node] = {}
        self._factors: dict[fx.Node, fx.Node] = {}  # of a weight's gradient
        self._again: dict[str, fx.Node] = {}  # by slot: what is read beside the slot's own value
        self._rates: dict[tuple[fx.Node | None, float, bool], fx.Node] = {}

    def updated(self, slots: list[Trained]) -> dict[str, fx.Node]:
        """Slot -> its value after the step."""
        of_weight: dict[fx.Node, list[Trained]] = defaultdict(list)
        for slot in slots:
            of_weight[slot.parameter].append(slot)
        self._scale_gradients(of_weight)
        newest = self._stepped(slots, of_weight)
        self._decay(slots, newest)
        self._limit_drift(of_weight, newest)
        return newest

    # Gradients

    def _scale_gradients(self, of_weight: dict[fx.Node, list[Trained]]) -> None:
        """What each weight's gradient is multiplied by, one factor a sequence."""
        config, squares = self.config, {}
        if config.clip_norm is not None or config.normalize != "none":
            squares = {
                weight: self._total([self._square(slot) for slot in slots])
                for weight, slots in of_weight.items()
            }
        if config.clip_norm is not None:
            norm = self._total(list(squares.values()))
            clip = self._call(rates.clip_factor, norm, config.clip_norm, label="clip_factor")
            self._factors = dict.fromkeys(of_weight, clip)
        elif config.normalize != "none":
            self._factors = {
                weight: self._call(rates.normal_factor, square, _numbers(weight), like=weight)
                for weight, square in squares.items()
            }

    def _square(self, slot: Trained) -> fx.Node:
        if len(slot.updates) == 1 and slot.is_matrix:
            (update, layer), *_ = slot.updates
            return self._call(states.linear_square, *update.args[:2], like=layer)
        gradient = self._descended(slot, self._zero(slot), self._rate(None, -1.0, with_lr=False))
        return self._call(states.gradient_square, gradient, like=slot.value)

    def _total(self, parts: list[fx.Node]) -> fx.Node:
        return parts[0] if len(parts) == 1 else self._call(rates.total, parts)

    def _descended(self, slot: Trained, value: fx.Node, rate: fx.Node, label: str = "") -> fx.Node:
        """value - rate g, through every layer that reads the slot."""
        for update, layer in slot.updates:
            value = self._call(
                update.operator, value, *update.args, rate, like=layer,
                label=label or f"{slot.value.name}_gradient", slot=info(value).slot,
            )  # fmt: skip
        return value

    def _gradient(self, slot: Trained) -> fx.Node:
        """The gradient itself, clipped or normalized."""
        minus = self._rate(self._factor(slot), -1.0, with_lr=False)
        return self._descended(slot, self._zero(slot), minus)

    def _factor(self, slot: Trained) -> fx.Node | None:
        return self._factors.get(slot.parameter)

    # Steps

    def _stepped(
        self, slots: list[Trained], of_weight: dict[fx.Node, list[Trained]]
    ) -> dict[str, fx.Node]:
        newest: dict[str, fx.Node] = {}
        by: dict[str, Callable[[Trained], fx.Node]] = {
            "sgd": self._sgd,
            "muon": self._sgd,
            "adam": self._adam,
            "rms": self._rms,
        }
        step = by[self.config.optimizer]
        for slot in slots:
            group = of_weight[slot.parameter]
            if slot.name in newest:
                continue
            hidden = all(each.is_matrix and not each.of_head for each in group)
            if self.config.optimizer == "muon" and hidden:
                newest |= self._muon(group)
            else:
                newest[slot.name] = step(slot)
        return {slot.name: newest[slot.name] for slot in slots}

    def _sgd(self, slot: Trained) -> fx.Node:
        factor, mu = self._factor(slot), self.config.momentum
        rate = self._rate(None if mu else factor, slot.factor)
        if not mu:
            return self._descended(slot, slot.value, rate, _updated(slot))
        v = self._momentum(slot)
        if not self.config.nesterov:
            return self._descend(slot, v, rate)
        ahead = self._descend(slot, v, self._rate(None, slot.factor * mu))
        return self._descended(slot, ahead, self._rate(factor, slot.factor), _updated(slot))

    def _momentum(self, slot: Trained) -> fx.Node:
        """v' = mu v + g."""
        state = self._state(slot, "momentum")
        faded = self._call(
            states.fade, state, self.config.momentum, like=slot.value, slot=info(state).slot
        )
        minus = self._rate(self._factor(slot), -1.0, with_lr=False)
        v = self._descended(slot, faded, minus, _named(slot, "momentum"))
        return self._keep(slot, "momentum", v)

    def _adam(self, slot: Trained) -> fx.Node:
        beta1, beta2 = self.config.betas
        gradient = self._gradient(slot)
        moments = [
            self._keep(slot, name, self._call(
                states.moment, self._state(slot, name), gradient, beta, squared,
                like=slot.value, label=_named(slot, name),
            ))
            for name, beta, squared in (("first", beta1, False), ("second", beta2, True))
        ]  # fmt: skip
        rate = self._rate(None, slot.factor)
        return self._call(
            states.adam_descent, slot.value, *moments, self._count(), rate, beta1, beta2,
            self.config.eps, like=slot.value, label=_updated(slot), slot=slot.name,
        )  # fmt: skip

    def _rms(self, slot: Trained) -> fx.Node:
        name = statistics_name(info(slot.parameter).parameter or "")
        statistics = self._read_again(slot, "statistics", name)
        gradient = self._gradient(slot)
        direction = self._call(
            states.divide, gradient, statistics, self.config.eps,
            like=slot.value, slot=info(gradient).slot,
        )  # fmt: skip
        return self._descend(slot, direction, self._rate(None, slot.factor))

    def _muon(self, group: list[Trained]) -> dict[str, fx.Node]:
        """Of all slots of one weight at once: its rows, in any order, have one orthogonal step."""
        directions = [self._muon_direction(slot) for slot in group]
        whole = self._call(states.orthogonal, directions, like=group[0].value)
        found, start = {}, 0
        for slot in group:
            stop = start + int(info(slot.value).shape[0])
            part = self._call(states.rows, whole, start, stop, like=slot.value)
            found[slot.name] = self._descend(slot, part, self._rate(None, slot.factor))
            start = stop
        return found

    def _muon_direction(self, slot: Trained) -> fx.Node:
        if not self.config.momentum:
            return self._gradient(slot)
        v = self._momentum(slot)
        if not self.config.nesterov:
            return v
        faded = self._call(
            states.fade, v, self.config.momentum, like=slot.value, slot=f"{slot.name}/gradient"
        )
        minus = self._rate(self._factor(slot), -1.0, with_lr=False)
        return self._descended(slot, faded, minus)

    def _descend(self, slot: Trained, direction: fx.Node, rate: fx.Node) -> fx.Node:
        return self._call(
            states.descend, slot.value, direction, rate,
            like=slot.value, label=_updated(slot), slot=slot.name,
        )  # fmt: skip

    # Back towards the original weights

    def _decay(self, slots: list[Trained], newest: dict[str, fx.Node]) -> None:
        if self.config.decay:
            for slot in slots:
                newest[slot.name] = self._toward(
                    slot, newest[slot.name], self.config.decay, None, "decayed"
                )

    def _limit_drift(
        self, of_weight: dict[fx.Node, list[Trained]], newest: dict[str, fx.Node]
    ) -> None:
        limit = self.config.max_drift
        for weight, slots in of_weight.items() if limit is not None else ():
            changes, originals = [], []
            for slot in slots:
                anchor = self._read_again(slot, "original")
                changes.append(
                    self._call(states.change_square, newest[slot.name], anchor, like=slot.value)
                )
                originals.append(self._call(states.original_square, anchor, like=slot.value))
            share = self._call(
                rates.drift_share, self._total(changes), self._total(originals), limit, like=weight
            )
            for slot in slots:
                newest[slot.name] = self._toward(slot, newest[slot.name], 1.0, share, "limited")

    def _toward(
        self, slot: Trained, value: fx.Node, share: float, each: fx.Node | None, label: str
    ) -> fx.Node:
        return self._call(
            states.toward, value, self._read_again(slot, "original"), share, each,
            like=slot.value, label=_named(slot, label), slot=slot.name,
        )  # fmt: skip

    # Slots beside the weight's own

    def _read_again(self, slot: Trained, suffix: str, parameter: str | None = None) -> fx.Node:
        """The slot's rows of the auxiliary weight, or of another parameter of its shape, whatever
        the slot holds by now.
        """
        name = f"{slot.name}/{suffix}"
        if name in self._again:
            return self._again[name]
        graph, source = self.build.graph, slot.parameter
        if parameter is not None:
            source = self._statistics(parameter, slot)
        with graph.inserting_after(slot.value):
            node = graph.node_copy(slot.value, lambda n: source)
        node._rename(_named(slot, suffix))
        copy_info(slot.value, node, slot=name, trainable=False)
        self._again[name] = node
        return node

    def _statistics(self, parameter: str, slot: Trained) -> fx.Node:
        if parameter not in self._again:
            self._again[parameter] = self.build.placeholder(
                _named(slot, "statistics_of"), info(slot.parameter).shape, role="parameter",
                parameter=parameter, buffer=True,
            )  # fmt: skip
        return self._again[parameter]

    def _state(self, slot: Trained, suffix: str) -> fx.Node:
        """A state before the step."""
        return self._call(
            states.zero_state, slot.value, like=slot.value,
            label=_named(slot, f"{suffix}_before"), slot=f"{slot.name}/{suffix}",
        )  # fmt: skip

    def _keep(self, slot: Trained, suffix: str, value: fx.Node) -> fx.Node:
        """The value is the state after the step."""
        name = f"{slot.name}/{suffix}"
        info(value).slot = name
        self.states[name] = value
        return value

    def _zero(self, slot: Trained) -> fx.Node:
        """Where a gradient that is wanted for itself starts."""
        return self._call(
            states.zero_state, slot.value, like=slot.value, slot=f"{slot.name}/gradient"
        )

    def _count(self) -> fx.Node:
        if "count" not in self.states:
            mask = input_node(self.build.graph, "loss_mask")
            before = self._call(states.zero_count, mask, label="count_before", slot="count")
            self.states["count"] = self._call(
                states.next_count, before, mask, label="count", slot="count"
            )
        return self.states["count"]

    # Calls

    def _rate(self, factor: fx.Node | None, scale: float, with_lr: bool = True) -> fx.Node:
        """One node for each rate of the step; eta itself where nothing changes it."""
        if with_lr and factor is None and scale == 1:
            return self.inner_lr
        key = (factor, scale, with_lr)
        if key not in self._rates:
            self._rates[key] = self._call(rates.rate, self.inner_lr, factor, scale, with_lr)
        return self._rates[key]

    def _call(self, operator: AnyOperator, *args: Any, **fields: Any) -> fx.Node:
        return self.build.call(operator, *args, phase="descent", step=0, **fields)


def _updated(slot: Trained) -> str:
    return _named(slot, "updated")


def _named(slot: Trained, what: str) -> str:
    return f"{slot.value.name}_{what}"


def _numbers(weight: fx.Node) -> float:
    return float(math.prod(int(size) for size in info(weight).shape))
