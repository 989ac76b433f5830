// Edges between what is visible: one for all that lead from an item to another.

import { type Graph, INPUTS } from "./model.ts";
import type { Item, Placed } from "./place.ts";

export interface Link {
  id: string;
  from: Item;
  to: Item;
  count: number;
  weight: boolean; // of a weight or an input
  quiet: boolean; // drawn only where one of its ends is selected
  paired: boolean; // another one leads back
}

const BROADCAST = 12; // readers of what says nothing by its edges

export function links(graph: Graph, placed: Placed): Link[] {
  const found = new Map<string, Link>();
  for (const node of graph.nodes) {
    const to = placed.itemOf.get(node.index);
    if (!to) continue;
    for (const input of node.inputs) {
      const from = placed.itemOf.get(input);
      if (!from || from === to) continue;
      const id = `${from.id}>${to.id}`;
      const known = found.get(id);
      // Masks, rotations and the learning rate are read everywhere; the output reads every weight.
      const source = graph.nodes[input];
      const everywhere = from.lane > 0 && (source?.users.length ?? 0) > BROADCAST;
      const quiet = everywhere || from.group.label === INPUTS || node.kind === "output";
      if (known) {
        known.count += 1;
        known.quiet &&= quiet;
      } else found.set(id, { id, from, to, count: 1, weight: from.lane === 0, quiet, paired: false });
    }
  }
  for (const link of found.values()) link.paired = found.has(`${link.to.id}>${link.from.id}`);
  return [...found.values()];
}

/** How far an edge bends aside: one that passes over other lanes of its row goes around them. */
export function bend(link: Link): number {
  const hops = Math.abs(link.to.lane - link.from.lane);
  if (link.from.row !== link.to.row || hops < 2) return 0;
  return -(22 + 7 * Math.min(hops, 4)) * Math.sign(link.to.lane - link.from.lane);
}
