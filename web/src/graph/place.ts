// Where everything visible stands. Lanes are columns and groups are rows, so that a module's forward,
// backward and descent stand side by side and a weight's way through the steps is a line. What is
// inside one open cell is laid out by dagre; equal cells are laid out once.

import { graphlib, layout } from "@dagrejs/dagre";

import type { Graph, GraphNode, Group } from "./model.ts";
import type { Rows } from "./rows.ts";

export interface Box {
  x: number; // the centre
  y: number;
  width: number;
  height: number;
}

export interface Item extends Box {
  id: string;
  row: number;
  lane: number;
  group: Group;
  nodes: number[];
  single: GraphNode | null; // shown by itself, and not as a closed cell
}

export interface BandBox extends Box {
  group: Group;
  depth: number;
}

export interface LaneBox {
  left: number;
  width: number;
}

export interface Placed {
  items: Item[];
  bands: BandBox[];
  lanes: LaneBox[];
  itemOf: Map<number, Item>; // by node
  width: number;
  height: number;
}

export const CELL = { width: 164, height: 46 };
const GAP = { row: 26, column: 40, inside: 14, rank: 26 };
const BAND = { head: 24, foot: 12, side: 14 };

interface Cell {
  width: number;
  height: number;
  centres: { x: number; y: number }[];
}

export function place(graph: Graph, { rows, bands }: Rows): Placed {
  const lanes = graph.lanes.length;
  const content = rows.map((row) => {
    const cells: number[][] = Array.from({ length: lanes }, () => []);
    for (const index of nodesUnder(graph, row.group)) cells[graph.nodes[index]?.lane ?? 0]?.push(index);
    return cells;
  });
  const shapes = rows.map((row, at) =>
    (content[at] ?? []).map((nodes, lane) =>
      row.open && nodes.length > 1 ? arranged(graph, nodes, lane) : nodes.length ? closed() : null,
    ),
  );
  const laneBoxes = columns(shapes, lanes);
  const tops = rowTops(shapes, bands);
  const items: Item[] = [];
  const itemOf = new Map<number, Item>();
  rows.forEach((row, at) => {
    const { top = 0, height = 0 } = tops.rows[at] ?? {};
    (content[at] ?? []).forEach((nodes, lane) => {
      const shape = shapes[at]?.[lane];
      const column = laneBoxes[lane];
      if (!shape || !column) return;
      const left = column.left + (column.width - shape.width) / 2;
      const upper = top + (height - shape.height) / 2;
      const common = { row: at, lane, group: row.group, ...CELL };
      const add = (item: Item) => {
        items.push(item);
        for (const node of item.nodes) itemOf.set(node, item);
      };
      if (!row.open && nodes.length > 1) {
        const id = `g${row.group.index}l${lane}`;
        const centre = { x: left + shape.width / 2, y: upper + shape.height / 2 };
        add({ ...common, ...centre, id, nodes, single: null });
      } else {
        nodes.forEach((index, which) => {
          const centre = shape.centres[which] ?? { x: 0, y: 0 };
          const single = graph.nodes[index] ?? null;
          add({ ...common, x: left + centre.x, y: upper + centre.y, id: `n${index}`, nodes: [index], single });
        });
      }
    });
  });
  const end = laneBoxes.at(-1);
  const width = end ? end.left + end.width : 0;
  return { items, bands: frames(bands, tops.rows, width), lanes: laneBoxes, itemOf, width, height: tops.end };
}

function nodesUnder(graph: Graph, group: Group): number[] {
  if (!group.children.length) return group.nodes;
  const found = [...group.nodes];
  for (const child of group.children) {
    const below = graph.groups[child];
    if (below) found.push(...nodesUnder(graph, below));
  }
  return found.sort((a, b) => a - b);
}

function closed(): Cell {
  return { ...CELL, centres: [{ x: CELL.width / 2, y: CELL.height / 2 }] };
}

function columns(shapes: (Cell | null)[][], lanes: number): LaneBox[] {
  const found: LaneBox[] = [];
  let left = BAND.side;
  for (let lane = 0; lane < lanes; lane += 1) {
    const width = Math.max(CELL.width, ...shapes.map((row) => row[lane]?.width ?? 0));
    found.push({ left, width });
    left += width + GAP.column;
  }
  return found;
}

function rowTops(shapes: (Cell | null)[][], bands: Rows["bands"]) {
  const rows: { top: number; height: number }[] = [];
  let y = 0;
  shapes.forEach((row, at) => {
    y += BAND.head * bands.filter((band) => band.first === at).length;
    const height = Math.max(CELL.height, ...row.map((cell) => cell?.height ?? 0));
    rows.push({ top: y, height });
    y += height + GAP.row;
    y += BAND.foot * bands.filter((band) => band.last === at).length;
  });
  return { rows, end: y };
}

function frames(
  bands: Rows["bands"],
  rows: { top: number; height: number }[],
  width: number,
): BandBox[] {
  return bands.map((band) => {
    const outer = bands.filter((one) => one.first >= band.first && one.last <= band.last);
    const starting = outer.filter((one) => one.first === band.first).length;
    const ending = outer.filter((one) => one.last === band.last).length;
    const top = (rows[band.first]?.top ?? 0) - BAND.head * starting;
    const last = rows[band.last];
    const bottom = last ? last.top + last.height + BAND.foot * ending : top;
    const inset = 5 * band.depth;
    const wide = width + 2 * BAND.side - 2 * inset;
    return {
      group: band.group,
      depth: band.depth,
      x: (width + BAND.side) / 2,
      y: (top + bottom) / 2,
      width: wide,
      height: bottom - top,
    };
  });
}

const arrangements = new Map<string, Cell>();

/** Nodes of one lane. In a backward lane the program runs upwards; what becomes a weight stands in
 * front of it.
 */
function arranged(graph: Graph, nodes: number[], lane: number): Cell {
  const places = new Map(nodes.map((index, at) => [index, at]));
  const edges = nodes.flatMap((index, to) =>
    (graph.nodes[index]?.inputs ?? []).flatMap((input) => {
      const from = places.get(input);
      return from === undefined ? [] : [[from, to] as const];
    }),
  );
  const direction = lane === 0 ? "LR" : graph.lanes[lane]?.phase === "backward" ? "BT" : "TB";
  const key = `${direction}|${nodes.length}|${edges.map((edge) => edge.join("-")).join()}`;
  let cell = arrangements.get(key);
  if (!cell) {
    cell = edges.length ? layered(nodes.length, edges, direction) : stacked(nodes.length);
    arrangements.set(key, cell);
  }
  return cell;
}

/** Nodes that do not read each other, one below the other. */
function stacked(count: number): Cell {
  const step = CELL.height + GAP.inside;
  const wide = count > 12 ? Math.ceil(count / 8) : 1;
  const centres = Array.from({ length: count }, (_, at) => ({
    x: (at % wide) * (CELL.width + GAP.inside) + CELL.width / 2,
    y: Math.floor(at / wide) * step + CELL.height / 2,
  }));
  return {
    width: wide * (CELL.width + GAP.inside) - GAP.inside,
    height: Math.ceil(count / wide) * step - GAP.inside,
    centres,
  };
}

function layered(count: number, edges: (readonly [number, number])[], rankdir: string): Cell {
  const inside = new graphlib.Graph();
  inside.setGraph({ rankdir, nodesep: GAP.inside, ranksep: GAP.rank, marginx: 0, marginy: 0 });
  inside.setDefaultEdgeLabel(() => ({}));
  for (let at = 0; at < count; at += 1) inside.setNode(String(at), { ...CELL });
  for (const [from, to] of edges) inside.setEdge(String(from), String(to));
  layout(inside);
  const centres = Array.from({ length: count }, (_, at) => {
    const { x, y } = inside.node(String(at)) as unknown as { x: number; y: number };
    return { x, y };
  });
  const left = Math.min(...centres.map((one) => one.x)) - CELL.width / 2;
  const top = Math.min(...centres.map((one) => one.y)) - CELL.height / 2;
  return {
    width: Math.max(...centres.map((one) => one.x)) + CELL.width / 2 - left,
    height: Math.max(...centres.map((one) => one.y)) + CELL.height / 2 - top,
    centres: centres.map((one) => ({ x: one.x - left, y: one.y - top })),
  };
}
