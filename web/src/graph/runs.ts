// Nodes that belong to a module and to none of its submodules (a residual connection, say) stand
// between these in the program. Each gets a group of its own there, a *run*: run r of a group stands
// in front of its r-th submodule. A forward node comes behind what it reads, a backward node in
// front of it, a weight at what reads it, and a descent at its weight.

import { type Graph, type GraphNode, type Group, type Lane, newGroup } from "./model.ts";

type Nodes = Graph["nodes"];

export function assignRuns(nodes: Nodes, groups: Group[], lanes: Lane[]): void {
  const inner = groups.filter((group) => group.children.length > 0);
  const own = new Map<number, GraphNode[]>(inner.map((group) => [group.index, []]));
  for (const node of nodes) own.get(node.group)?.push(node);
  const first = firstPlaces(nodes, groups);
  for (const group of inner) {
    const direct = own.get(group.index) ?? [];
    const place = (index: number) => first[index] ?? Infinity;
    const children = [...group.children].sort((a, b) => place(a) - place(b));
    settle(group, children, direct, nodes, groups, lanes, place);
  }
}

/** Of each group, where its first node that is no weight stands. */
function firstPlaces(nodes: Nodes, groups: Group[]): number[] {
  const first = groups.map(() => Infinity);
  for (const node of nodes) {
    if (node.lane === 0) continue;
    for (let at = node.group; at >= 0; at = groups[at]?.parent ?? -1) {
      first[at] = Math.min(first[at] ?? Infinity, node.index);
    }
  }
  return first;
}

function settle(
  group: Group,
  children: number[],
  direct: GraphNode[],
  nodes: Nodes,
  groups: Group[],
  lanes: Lane[],
  place: (index: number) => number,
): void {
  const run = new Map<number, number>();
  const position = new Map(children.map((child, at) => [child, at]));
  const under = (index: number): number => {
    for (let at = nodes[index]?.group ?? -1; at >= 0; at = groups[at]?.parent ?? -1) {
      if (groups[at]?.parent === group.index) return position.get(at) ?? -1;
    }
    return -1;
  };
  const known = (indices: number[], behind: number, lane = -1): number[] =>
    indices.flatMap((index) => {
      if (lane >= 0 && nodes[index]?.lane !== lane) return [];
      const settled = run.get(index);
      if (settled !== undefined) return [settled];
      const at = under(index);
      return at < 0 ? [] : [at + behind];
    });
  const phase = (node: GraphNode) => lanes[node.lane]?.phase ?? "";
  const of = (name: string) => direct.filter((node) => phase(node) === name);
  for (const node of of("forward")) run.set(node.index, Math.max(0, ...known(node.inputs, 1, node.lane)));
  for (const node of of("backward")) {
    run.set(node.index, Math.min(children.length, ...known(node.inputs, 0, node.lane)));
  }
  for (const node of [...of("")].reverse()) run.set(node.index, known(node.users, 0)[0] ?? 0);
  for (const node of of("descent")) run.set(node.index, known(node.inputs, 0)[0] ?? 0);

  const made = new Map<number, Group>();
  for (const node of direct) {
    const at = run.get(node.index) ?? 0;
    let home = made.get(at);
    if (!home) {
      home = newGroup(groups.length, `${group.path}.(${at})`, "", group.index);
      home.made = true;
      home.block = group.block;
      // Just in front of the submodule that follows.
      const next = children[at];
      home.order = next === undefined ? Number.MAX_VALUE : place(next) - 0.5;
      made.set(at, home);
      groups.push(home);
    }
    node.group = home.index;
  }
  for (const home of made.values()) home.label = title(direct.filter((n) => n.group === home.index));
}

/** What most of them do. */
function title(nodes: GraphNode[]): string {
  const counts = new Map<string, number>();
  for (const node of nodes) {
    if (node.kind !== "call") continue;
    const name = shortOperator(node.operator);
    counts.set(name, (counts.get(name) ?? 0) + 1);
  }
  const names = [...counts].sort((a, b) => b[1] - a[1]).map(([name]) => name);
  return names.length > 2 ? `${names.slice(0, 2).join(", ")} …` : names.join(", ") || "weights";
}

/** tint.linear_forward -> linear_forward; aten.view.default -> view. */
export function shortOperator(operator: string): string {
  return operator
    .replace(/^(tint|aten)\./, "")
    .replace(/^\./, "")
    .replace(/\.(default|Tensor|int|Scalar|dtype|dtype_layout)$/, "");
}
