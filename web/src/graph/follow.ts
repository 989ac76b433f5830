// A weight through the steps: its way stands in slots.json as nodes of the lowered graph, in order.

import type { PrefixSlot, Slots } from "../data.ts";
import type { Graph, GraphNode } from "./model.ts";

export interface Way {
  slot: PrefixSlot;
  nodes: GraphNode[];
}

/** The way of a slot in this stage; in others than lowered, by the names of nodes. */
export function way(graph: Graph, lowered: Graph, slots: Slots, name: string): Way | null {
  const slot = slots.prefix.find((one) => one.name === name);
  if (!slot) return null;
  const names = slot.path.map((index) => lowered.nodes[index]?.name ?? "");
  const nodes = names.flatMap((each) => graph.byName.get(each) ?? []);
  return { slot, nodes };
}

/** Slots that change come first: these are what a reader wants to follow. */
export function choices(slots: Slots): { updated: string[]; fixed: string[] } {
  const updated = slots.prefix.filter((slot) => slot.updated).map((slot) => slot.name);
  const fixed = slots.prefix.filter((slot) => !slot.updated).map((slot) => slot.name);
  return { updated, fixed };
}
