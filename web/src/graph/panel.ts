// What is known of the selected node, or of the stage where none is selected.

import type { Operators } from "../data.ts";
import { fill, h, type Child } from "../dom.ts";
import { current, href } from "../route.ts";
import { bytes, count, flops } from "../text.ts";
import { tone } from "./draw.ts";
import type { Graph, GraphNode } from "./model.ts";

const SHOWN = 24;

export interface Panel {
  element: HTMLElement;
  show(graph: Graph, operators: Operators, node: GraphNode | null): void;
}

export function createPanel(summary: [string, string][]): Panel {
  const element = h("aside", { class: "panel", "aria-label": "Selected node", tabindex: "0" });
  let stage: Graph | null = null; // that the panel tells of
  return {
    element,
    show(graph, operators, node) {
      if (!node && stage === graph) return; // nothing of it depends on what is open
      stage = node ? null : graph;
      fill(element, node ? ofNode(graph, operators, node) : ofStage(graph, summary));
    },
  };
}

function ofStage(graph: Graph, summary: [string, string][]): Child {
  return [
    h("h2", {}, "This simulator"),
    facts(summary),
    h("h2", {}, `Stage: ${graph.stage}`),
    h("p", { class: "soft" }, graph.note),
    h(
      "p",
      { class: "soft" },
      "Each column is a phase of the program and each row a module, so a weight's way through the " +
        "steps runs from left to right. Click a cell to open it, a node to read about it.",
    ),
    h(
      "ul",
      { class: "keys soft" },
      [
        ["/", "search"],
        ["Esc", "let go of what is selected"],
        ["arrows, Enter", "walk and open the outline"],
        ["+  −  0", "zoom, fit"],
      ].map(([key, does]) => h("li", {}, h("kbd", {}, key), " ", does)),
    ),
  ];
}

function ofNode(graph: Graph, operators: Operators, node: GraphNode): Child {
  const known = operators[node.operator];
  const lane = graph.lanes[node.lane];
  const slot = node.slot || slotRead(graph, node);
  return [
    h("p", { class: `badge ${tone(lane)}` }, lane?.name ?? ""),
    h("h2", { class: "mono wrap" }, node.name),
    h("p", { class: "operator mono" }, node.operator),
    known ? h("p", {}, known.meaning) : null,
    known?.formula ? h("p", { class: "formula mono" }, known.formula) : null,
    facts([
      ["kind", node.kind],
      ["shape", node.shape],
      ["dtype", node.dtype],
      ["module", node.module],
      ["source", node.source],
      ["slot", node.slot ? `${node.slot}${node.trainable ? " (trainable)" : ""}` : ""],
      ["memory", node.memory],
      ["work", node.flops ? flops(node.flops) : ""],
      ["size", node.bytes ? bytes(node.bytes) : ""],
      ["change", node.change === "same" ? "" : `${node.change} in this stage`],
    ]),
    h(
      "p",
      { class: "actions" },
      slot ? h("a", { class: "button", href: at({ slot, node: node.name }) }, "Follow this weight") : null,
      node.slot ? h("a", { class: "button", href: href("slots", { slot: node.slot }) }, "Its prefix slot") : null,
      node.memory
        ? h("a", { class: "button", href: href("slots", { map: "memory", memory: node.memory }) }, "Its memory")
        : null,
    ),
    node.args ? [h("h3", {}, "Arguments"), h("p", { class: "mono wrap args" }, node.args)] : null,
    linked(graph, `Reads ${count(node.inputs.length)}`, node.inputs),
    linked(graph, `Read by ${count(node.users.length)}`, node.users),
  ];
}

/** The slot of a weight that a node reads, so that it can be followed from there. */
function slotRead(graph: Graph, node: GraphNode): string {
  return node.inputs.map((index) => graph.nodes[index]?.slot ?? "").find(Boolean) ?? "";
}

function linked(graph: Graph, title: string, indices: number[]): Child {
  if (!indices.length) return null;
  const one = (index: number) => {
    const node = graph.nodes[index];
    return node
      ? h("li", {}, h("a", { class: "mono wrap", href: at({ node: node.name }) }, node.name))
      : null;
  };
  const rest = indices.slice(SHOWN);
  return [
    h("h3", {}, title),
    h("ul", { class: "links" }, indices.slice(0, SHOWN).map(one)),
    rest.length
      ? h("details", {}, h("summary", {}, `${count(rest.length)} more`), h("ul", { class: "links" }, rest.map(one)))
      : null,
  ];
}

function at(changes: Record<string, string>): string {
  return href("graph", { ...Object.fromEntries(current().params), ...changes });
}

function facts(rows: [string, string][]): HTMLElement {
  return h(
    "dl",
    { class: "facts" },
    rows.filter(([, value]) => value).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]),
  );
}
