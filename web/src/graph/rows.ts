// What is visible: rows (groups that are closed, or hold nodes alone), and the bands of the open
// groups around them.

import { type Graph, type Group, lineage } from "./model.ts";

export interface Row {
  group: Group;
  open: boolean; // its nodes are shown one by one
  depth: number;
}

export interface Band {
  group: Group;
  first: number; // rows
  last: number;
  depth: number;
}

export interface Rows {
  rows: Row[];
  bands: Band[];
}

export const ALL = "*";

export function visible(graph: Graph, open: ReadonlySet<string>): Rows {
  const rows: Row[] = [];
  const bands: Band[] = [];
  const walk = (index: number, depth: number) => {
    const group = graph.groups[index];
    if (!group || !group.size) return;
    const opened = isOpen(graph, group, open);
    if (!group.children.length) rows.push({ group, open: opened, depth });
    else if (!opened) rows.push({ group, open: false, depth });
    else {
      const first = rows.length;
      const through = isSpine(graph, group);
      for (const child of group.children) walk(child, through ? depth : depth + 1);
      if (!through) bands.push({ group, first, last: rows.length - 1, depth });
    }
  };
  for (const root of graph.roots) walk(root, 0);
  return { rows, bands: bands.reverse() };
}

export function isOpen(graph: Graph, group: Group, open: ReadonlySet<string>): boolean {
  return isSpine(graph, group) || open.has(ALL) || open.has(group.path);
}

const spines = new WeakMap<Graph, Set<number>>();

/** Groups around the blocks: always open, and no frame is drawn around them. Of a model without
 * blocks, the outermost groups.
 */
export function isSpine(graph: Graph, group: Group): boolean {
  let found = spines.get(graph);
  if (!found) {
    found = new Set();
    const blocks = graph.groups.filter((one) => one.block >= 0);
    for (const block of blocks) {
      for (const above of lineage(graph.groups, block.parent)) {
        if (above.block < 0) found.add(above.index);
      }
    }
    if (!blocks.length) for (const root of graph.roots) found.add(root);
    for (const index of [...found]) if (!graph.groups[index]?.children.length) found.delete(index);
    spines.set(graph, found);
  }
  return found.has(group.index);
}

/** What must be open for a node to be seen by itself. */
export function revealing(graph: Graph, nodes: Iterable<number>): string[] {
  const found = new Set<string>();
  for (const index of nodes) {
    for (const group of lineage(graph.groups, graph.nodes[index]?.group ?? -1)) {
      if (!isSpine(graph, group)) found.add(group.path);
    }
  }
  return [...found];
}

export function readOpen(text: string | undefined): Set<string> {
  return new Set((text ?? "").split(",").filter(Boolean).map(decodeURIComponent));
}

export function writeOpen(open: Iterable<string>): string | null {
  const all = [...open];
  return all.includes(ALL) ? ALL : all.map(encodeURIComponent).join(",") || null;
}
