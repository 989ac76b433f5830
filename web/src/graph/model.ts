// A stage's graph as objects: nodes, lanes (step and phase), and a tree of groups in which a group
// holds either groups or nodes. Nodes that stand between the modules of a group get a group of their
// own there (runs.ts), so that every node has one row and one lane.

import type { Change, GraphFile } from "../data.ts";
import { assignRuns } from "./runs.ts";

export interface GraphNode {
  index: number;
  name: string;
  operator: string;
  kind: string;
  phase: string;
  step: number;
  module: string;
  source: string;
  shape: string;
  dtype: string;
  slot: string;
  memory: string;
  trainable: boolean;
  args: string;
  flops: number;
  bytes: number;
  change: Change;
  group: number;
  lane: number;
  inputs: number[];
  users: number[];
}

export interface Group {
  index: number;
  path: string;
  label: string;
  parent: number;
  block: number;
  made: boolean; // by this page: no module has this name
  children: number[];
  nodes: number[]; // its own
  size: number; // nodes in it and below
  order: number; // where it first stands in the program
}

export interface Lane {
  name: string;
  phase: string; // "" for what is there before the program starts
  step: number;
  last: boolean; // the forward pass that predicts
  nodes: number;
  flops: number;
}

export interface Graph {
  stage: string;
  note: string;
  removed: number;
  nodes: GraphNode[];
  groups: Group[];
  roots: number[];
  lanes: Lane[];
  byName: Map<string, GraphNode>;
  byPath: Map<string, Group>;
  counts: Record<Change, number>;
}

export const INPUTS = "inputs"; // the group of what is given to the program
export const PHASES = ["forward", "backward", "descent"];

export function decode(file: GraphFile, steps: number): Graph {
  const nodes = decodeNodes(file);
  const groups: Group[] = file.groups.map((group, index) => ({
    ...newGroup(index, group.path, group.label, group.parent),
    block: group.block,
  }));
  const lanes = assignLanes(nodes, steps);
  adoptParameters(nodes);
  placeOutside(nodes, groups);
  link(groups);
  assignRuns(nodes, groups, lanes);
  const roots = link(groups);
  measure(nodes, groups, lanes);
  sort(groups, roots);
  const counts = { same: 0, changed: 0, new: 0 };
  for (const node of nodes) counts[node.change] += 1;
  return {
    stage: file.stage,
    note: file.note,
    removed: file.removed,
    nodes,
    groups,
    roots,
    lanes,
    byName: new Map(nodes.map((node) => [node.name, node])),
    byPath: new Map(groups.map((group) => [group.path, group])),
    counts,
  };
}

export function newGroup(index: number, path: string, label: string, parent: number): Group {
  return {
    index,
    path,
    label,
    parent,
    block: -1,
    made: false,
    children: [],
    nodes: [],
    size: 0,
    order: Infinity,
  };
}

/** The groups that hold a group, itself last. */
export function lineage(groups: readonly Group[], index: number): Group[] {
  const found: Group[] = [];
  for (let group = groups[index]; group; group = groups[group.parent]) found.unshift(group);
  return found;
}

function decodeNodes(file: GraphFile): GraphNode[] {
  const { nodes: column, strings } = file;
  const text = (values: number[], index: number) => strings[values[index] ?? -1] ?? "";
  const nodes = column.name_s.map((_, index): GraphNode => ({
    index,
    name: text(column.name_s, index),
    operator: text(column.operator_s, index),
    kind: text(column.kind_s, index),
    phase: text(column.phase_s, index),
    step: column.step[index] ?? -1,
    module: text(column.module_s, index),
    source: text(column.source_s, index),
    shape: text(column.shape_s, index),
    dtype: text(column.dtype_s, index),
    slot: text(column.slot_s, index),
    memory: text(column.memory_s, index),
    trainable: column.trainable[index] === 1,
    args: text(column.args_s, index),
    flops: column.flops[index] ?? 0,
    bytes: column.bytes[index] ?? 0,
    change: text(column.change_s, index) as Change,
    group: column.group[index] ?? -1,
    lane: 0,
    inputs: [],
    users: [],
  }));
  file.edges.from.forEach((from, place) => {
    const to = file.edges.to[place] ?? -1;
    nodes[to]?.inputs.push(from);
    nodes[from]?.users.push(to);
  });
  return nodes;
}

/** Lane 0 is what is there before the program starts; the output stands in the last one. */
function assignLanes(nodes: GraphNode[], steps: number): Lane[] {
  const first = { name: "weights, inputs", phase: "", step: -1, last: false, nodes: 0, flops: 0 };
  const key = (node: GraphNode) => node.step * PHASES.length + PHASES.indexOf(node.phase);
  const found = new Map<number, Lane>();
  for (const node of nodes) {
    if (!node.phase || found.has(key(node))) continue;
    const last = node.phase === "forward" && node.step === steps;
    const name = last ? "last forward" : `step ${node.step} ${node.phase}`;
    found.set(key(node), { ...first, name, phase: node.phase, step: node.step, last });
  }
  const order = [...found.keys()].sort((a, b) => a - b);
  const lanes = [first, ...order.map((at) => found.get(at) as Lane)];
  if (lanes.length === 1) lanes.push({ ...first, name: "program", phase: "forward", step: 0 });
  const before = (node: GraphNode) =>
    node.kind === "input" || node.kind === "parameter" || (node.slot !== "" && !node.phase);
  for (const node of nodes) {
    if (node.phase) node.lane = order.indexOf(key(node)) + 1;
    else if (node.kind === "output") node.lane = lanes.length - 1;
    else node.lane = before(node) ? 0 : 1;
  }
  return lanes;
}

/** A weight stands with what reads it: exported graphs list all of them in front. */
function adoptParameters(nodes: GraphNode[]): void {
  for (const node of nodes) {
    if (node.group >= 0 || node.kind !== "parameter") continue;
    const home = node.users.map((user) => nodes[user]?.group ?? -1).find((group) => group >= 0);
    node.group = home ?? -1;
  }
}

const PART = 40; // nodes of a program without modules that stand together

/** Nodes outside every module: inputs in front, what only they feed behind them, the rest last. */
function placeOutside(nodes: GraphNode[], groups: Group[]): void {
  const make = (label: string, members: GraphNode[]) => {
    if (!members.length) return;
    const group = newGroup(groups.length, `(${label})`, label, -1);
    group.made = true;
    groups.push(group);
    for (const node of members) node.group = group.index;
  };
  const outside = () => nodes.filter((node) => node.group < 0 && node.kind !== "parameter");
  const early = new Set<number>();
  for (const node of outside()) {
    const follows = node.kind === "call" && node.inputs.every((input) => early.has(input));
    if (node.kind === "input" || follows) early.add(node.index);
  }
  make(INPUTS, nodes.filter((node) => early.has(node.index)));
  const late = outside().filter((node) => node.kind === "call");
  if (late.length > 2 * PART) {
    for (let start = 0; start < late.length; start += PART) {
      const part = late.slice(start, start + PART);
      make(`calls ${start + 1} to ${start + part.length}`, part);
    }
  }
  make("loss and outputs", outside());
  adoptParameters(nodes);
  make("unused weights", nodes.filter((node) => node.group < 0));
}

function link(groups: Group[]): number[] {
  const roots: number[] = [];
  for (const group of groups) group.children = [];
  for (const group of groups) (groups[group.parent]?.children ?? roots).push(group.index);
  return roots;
}

function measure(nodes: GraphNode[], groups: Group[], lanes: Lane[]): void {
  for (const group of groups) group.nodes = [];
  for (const node of nodes) {
    groups[node.group]?.nodes.push(node.index);
    const lane = lanes[node.lane];
    if (lane) {
      lane.nodes += 1;
      lane.flops += node.flops;
    }
    // Weights are listed in front of the program, so that they say nothing about its order.
    const place = node.lane === 0 ? node.index + nodes.length : node.index;
    for (const group of lineage(groups, node.group)) {
      group.size += 1;
      if (!group.made || group.parent < 0) group.order = Math.min(group.order, place);
    }
  }
}

/** In the order of the forward pass; inputs first, what is outside and late last. */
function sort(groups: Group[], roots: number[]): void {
  const rank = (index: number) => {
    const group = groups[index];
    if (!group) return 0;
    return group.made && group.parent < 0 ? (group.label === INPUTS ? -1 : Infinity) : group.order;
  };
  const ordered = (indices: number[]) =>
    indices.sort((a, b) => (rank(a) === rank(b) ? a - b : rank(a) - rank(b)));
  ordered(roots);
  for (const group of groups) ordered(group.children);
}
