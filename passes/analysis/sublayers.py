"""Blocks by the repeated structure of the graph, where no one ModuleList holds them.

    x = a1(x); x = f1(x); x = a2(x); x = f2(x)   a: mixes tokens, f: works token by token
      ->  blocks (a1, f1), (a2, f2), whatever lists and names their weights stand in

A block has one step that mixes tokens: attention, or an island that looks at other tokens; several
that run side by side, heads as modules, are one step. Its other weights are those of the units
around it. A unit is the highest name, a module's or a weight's own, of what belongs to one step: a
child of a list, a list of one stack, a layer that is an attribute. Inside of blocks is what stands
between the first and the last sum of a value with something computed from it: the stream's
residual connections. So projections of embeddings and of the head are in no block.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import fx

from tintc.ir.dialect import argument, is_tint
from tintc.ir.node_meta import info
from tintc.ir.ops.attention import attention_forward
from tintc.ir.ops.elementwise import residual
from tintc.ir.ops.island import island_forward
from tintc.ir.ops.linear import linear_forward, prefix
from tintc.ir.ops.norm import norm_forward

Parts = tuple[str, ...]


def inside(module: str, blocks: Iterable[str]) -> bool:
    return any(module == block or module.startswith(block + ".") for block in blocks)


def repeated_blocks(graph: fx.Graph) -> tuple[str, list[Parts]]:
    """(a numbered container whose children are the blocks, "" for none; of each block, in order of
    execution, the names that its weights lie in). One block where nothing repeats, none where there
    are no weights.
    """
    items = _items(graph)
    if not items:
        return "", []
    joins, within = _stream(graph)
    levels = _levels(graph, joins)
    steps = max(max(levels.values()), 1)
    own = [item for item in items if within is None or any(u in within for u in item.readers)]
    foreign = {item.name for item in items} - {item.name for item in own}
    for item in own:
        item.level = min(levels[reader] for reader in item.readers)
    mixers = [(name, levels[node]) for node in graph.nodes if _mixes(node)
              if (name := next(_names_of_mixer(node, levels), ""))]  # fmt: skip
    units = _Units(items, mixers, foreign).found()
    if container := _container(units):
        mixing = sorted((u for u in units if u.mixing is not None), key=lambda u: u.mixing or 0)
        return container, [(unit.name,) for unit in mixing]
    names = [item.name for item in items]
    blocks = _grouped(sorted(units, key=lambda unit: unit.first), steps)
    return "", [_widened(parts, names) for parts in blocks]


def steps_and_sums(graph: fx.Graph) -> tuple[list[list[str]], list[str]]:
    """(of every step that mixes tokens, its own weights and those of layers before it, nearest
    first; the modules in which residual connections stand).
    """
    joins = _stream(graph)[0]
    levels = _levels(graph, joins)
    names = [list(_names_of_mixer(node, levels)) for node in graph.nodes if _mixes(node)]
    return names, [info(node).module for node in joins]


@dataclass
class _Item:
    """A weight. name: its own. readers: what reads it. at: where the first stands."""

    name: str
    readers: list[fx.Node]
    at: int
    level: int = 0

    @property
    def ends(self) -> bool:
        """Whether it is a norm's, whose result only layers read: it begins what follows."""
        return all(
            is_tint(n, norm_forward)
            and not any(is_tint(user, residual, norm_forward) for user in n.users)
            for n in self.readers
        )


@dataclass
class _Unit:
    """mixing: number of its step that mixes tokens; None for none."""

    name: str
    mixing: int | None
    items: list[_Item] = field(default_factory=list)

    @property
    def first(self) -> int:
        return min(item.at for item in self.items)

    @property
    def has_layer(self) -> bool:
        return any(is_tint(n, linear_forward) for item in self.items for n in item.readers)

    @property
    def level(self) -> int:
        return self.items[0].level


def _items(graph: fx.Graph) -> list[_Item]:
    order = {node: i for i, node in enumerate(graph.nodes)}
    found: dict[str, _Item] = {}
    for node in graph.nodes:
        if not is_tint(node, prefix) or not node.users:
            continue
        parameter = info(argument(node, "parameter"))
        name = parameter.parameter or ""
        if not parameter.buffer:
            item = found.setdefault(name, _Item(name, [], order[min(node.users)]))
            item.readers += node.users
            item.at = min(item.at, order[min(node.users)])
    return list(found.values())


def _mixes(node: fx.Node) -> bool:
    return is_tint(node, attention_forward) or (
        is_tint(node, island_forward) and argument(node, "mask") is not None
    )


def _levels(graph: fx.Graph, joins: set[fx.Node]) -> dict[fx.Node, int]:
    """How many steps that mix tokens a value has gone through, one after the other. What is mixed
    again before it comes back to the stream, queries that an island turns, is in one step.
    """
    levels: dict[fx.Node, int] = {}
    mixed: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        sources = node.all_input_nodes
        level = max((levels[n] for n in sources), default=0)
        going = any(mixed[n] for n in sources if levels[n] == level)
        mixes = _mixes(node)
        levels[node] = level + (mixes and not (going and joins))
        mixed[node] = mixes or (going and node not in joins)
    return levels


def _names_of_mixer(node: fx.Node, levels: dict[fx.Node, int]) -> Iterator[str]:
    """Of weights that are its own, then of the layers that made its values."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop(0)
        for source in reversed(current.all_input_nodes):
            if is_tint(source, prefix):
                yield info(argument(source, "parameter")).parameter or ""
            elif source not in seen and levels[source] >= levels[node] - 1:
                seen.add(source)
                pending.append(source)


def _stream(graph: fx.Graph) -> tuple[set[fx.Node], set[fx.Node] | None]:
    """(residual connections, what stands between the first and the last); None without any."""
    behind: dict[fx.Node, set[fx.Node]] = {}  # all that a value is computed from
    for node in graph.nodes:
        sources = node.all_input_nodes
        behind[node] = {n for source in sources for n in (source, *behind[source])}
    through: dict[fx.Node, set[fx.Node]] = {}  # what it is computed from by weights
    for node in graph.nodes:
        sources = activations(node)
        through[node] = {n for source in sources for n in through[source]}
        if any(is_tint(n, prefix) for n in node.all_input_nodes):
            through[node].update(sources, *(behind[n] for n in sources))
    joins: dict[fx.Node, set[fx.Node]] = {}  # -> what its stream was before
    for node in graph.nodes:
        operands = activations(node) if is_tint(node, residual, island_forward) else []
        for x in operands:
            before = {x} | joins.get(x, set())
            if any(y is not x and before & through[y] for y in operands):
                joins.setdefault(node, set()).update(before)
    if not joins:
        return set(), None
    starts = set().union(*joins.values())  # several where tables of values are added as well
    end = _normed(list(joins)[-1])
    return set(joins), {n for n in (end, *behind[end]) if starts & behind[n]}


def _normed(stream: fx.Node) -> fx.Node:
    """The norm behind the last sum, where another one follows: then it is no final norm."""
    after = list(stream.users)
    if len(after) == 1 and is_tint(after[0], norm_forward):
        readers = list(after[0].users)
        if len(readers) == 1 and is_tint(readers[0], norm_forward):
            return after[0]
    return stream


def activations(node: fx.Node) -> list[fx.Node]:
    """Those that an operator reads."""
    return [n for n in node.all_input_nodes if n.op == "call_function" and not is_tint(n, prefix)]


class _Units:
    """Names from the top down, until what lies below belongs to one step that mixes tokens."""

    def __init__(
        self, items: list[_Item], mixers: list[tuple[str, int]], foreign: set[str]
    ) -> None:
        self.items, self.mixers, self.foreign = items, mixers, foreign

    def found(self) -> list[_Unit]:
        return self._below("", self.items)

    def _below(self, name: str, items: list[_Item]) -> list[_Unit]:
        own = [item for item in items if item.name not in self.foreign]
        if not own:
            return []
        mixing = {level for at, level in self.mixers if not name or inside(at, {name})}
        alike = len({(item.level, item.ends) for item in own}) == 1
        listed = bool(mixing) and name.rpartition(".")[2].isdigit()  # then all that it holds
        whole = listed or len(own) == len(items)
        if name and whole and (len(mixing) == 1 or (not mixing and alike)):
            return [_Unit(name, next(iter(mixing), None), items)]
        if name in {item.name for item in own}:  # a weight that several steps read
            return [_Unit(name, None, own)]
        children: dict[str, list[_Item]] = defaultdict(list)
        prefixed = f"{name}." if name else ""
        for item in items:
            rest = item.name.removeprefix(prefixed)
            children[prefixed + rest.partition(".")[0]].append(item)
        return [unit for child, part in children.items() for unit in self._below(child, part)]


def _container(units: list[_Unit]) -> str:
    """The one list whose items are the units that mix tokens, if no layer stands beside them."""
    lists = {unit.name.rpartition(".")[0] for unit in units if unit.mixing is not None}
    beside = [unit for unit in units if unit.mixing is None]
    numbered = all(u.name.rpartition(".")[2].isdigit() for u in units if u.mixing is not None)
    if len(lists) != 1 or not numbered or any(unit.has_layer for unit in beside):
        return ""
    (container,) = lists
    return "" if any(inside(unit.name, {container}) for unit in beside) else container


def _widened(parts: Parts, names: list[str]) -> Parts:
    """The same by the highest names that hold nothing else."""

    def highest(part: str) -> str:
        while above := part.rpartition(".")[0]:
            if not all(inside(name, parts) for name in names if inside(name, {above})):
                break
            part = above
        return part

    return tuple(dict.fromkeys(map(highest, parts)))


def _grouped(units: list[_Unit], steps: int) -> list[Parts]:
    """Units without a step of their own go to the one before; as many as stand in front of the
    first go to the one behind, so that (f, a, f, a) and (f, a, f, f, a, f) are two blocks as well.
    """
    free: dict[int, list[_Unit]] = defaultdict(list)
    blocks: dict[int, list[_Unit]] = defaultdict(list)
    for unit in units:
        if unit.mixing is not None:
            blocks[unit.mixing].append(unit)
        elif not unit.items[0].ends:
            free[unit.level].append(unit)
    front = len(free[0])
    for level, there in free.items():
        cut = len(there) if level == steps else max(len(there) - front, 0)
        if level:
            blocks[level] += there[:cut]
            there = there[cut:]
        blocks[min(level + 1, steps)] += there
    _add_norms(units, blocks)
    return [
        tuple(unit.name for unit in sorted(blocks[step], key=lambda unit: unit.first))
        for step in range(1, steps + 1)
        if blocks[step]
    ]


def _add_norms(units: list[_Unit], blocks: dict[int, list[_Unit]]) -> None:
    """Norms that begin something belong to the unit that reads them."""
    of = {item.name: step for step, there in blocks.items() for u in there for item in u.items}
    for unit in units:
        if unit.mixing is None and unit.items[0].ends:
            read = {
                info(argument(n, "parameter")).parameter or ""
                for item in unit.items
                for norm in item.readers
                for user in norm.users
                if is_tint(user, linear_forward, island_forward)
                for n in user.all_input_nodes
                if is_tint(n, prefix)
            }
            steps = [of[name] for name in read if name in of]
            if steps:
                blocks[min(steps)].append(unit)
