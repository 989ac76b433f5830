// The canvas: cytoscape draws what place.ts says where. Only what changed is touched, so that opening
// a block of a large graph stays quick.

import cytoscape, {
  type Core,
  type ElementDefinition,
  type NodeSingular,
  type StylesheetJson,
} from "cytoscape";

import { themed } from "../dom.ts";
import { flops, plural, tail } from "../text.ts";
import { bend, type Link } from "./edges.ts";
import type { Graph, GraphNode, Lane } from "./model.ts";
import type { Item, Placed } from "./place.ts";
import { shortOperator } from "./runs.ts";

const NAME = 22; // characters that a cell has room for
const DETAIL = 0.62; // below this zoom, edges are not drawn while the picture moves

/** Which of the theme's colours a lane has. */
export function tone(lane: Lane | undefined): string {
  if (!lane || !lane.phase) return "before";
  return lane.last ? "last" : lane.phase;
}

export function createCanvas(container: HTMLElement): Core {
  return cytoscape({
    container,
    layout: { name: "preset" },
    minZoom: 0.08,
    maxZoom: 2,
    autoungrabify: true,
    boxSelectionEnabled: false,
    selectionType: "single",
    hideEdgesOnViewport: false,
    pixelRatio: Math.min(devicePixelRatio, 2),
    style: stylesheet(),
  });
}

export function show(
  canvas: Core,
  graph: Graph,
  placed: Placed,
  drawn: Link[],
  marks: boolean,
): void {
  const wanted = new Map<string, ElementDefinition>();
  for (const band of placed.bands) {
    const id = `b${band.group.index}`;
    const data = { id, label: `▾ ${band.group.path}`, width: band.width, height: band.height };
    const position = { x: band.x, y: band.y };
    wanted.set(id, { group: "nodes", data, position, classes: "band", selectable: false });
  }
  for (const item of placed.items) {
    const lane = tone(graph.lanes[item.lane]);
    const data = { id: item.id, label: label(graph, item, marks), width: item.width, height: item.height };
    const classes = `item ${lane} ${item.single ? "node" : "cell"} ${marks ? marked(graph, item) : ""}`;
    wanted.set(item.id, { group: "nodes", data, position: { x: item.x, y: item.y }, classes });
  }
  for (const link of drawn) {
    const data = { id: link.id, source: link.from.id, target: link.to.id, bend: bend(link) };
    const classes = [
      link.quiet ? "quiet" : "",
      link.weight ? "weight" : "",
      data.bend ? "bent" : link.paired ? "paired" : "",
    ].join(" ");
    wanted.set(link.id, { group: "edges", data, classes });
  }
  edges.set(canvas, drawn.length);
  canvas.batch(() => replace(canvas, wanted));
}

const EMPHASIS = ["selected", "near", "match", "dim", "followed"];
const emphasised = new WeakSet<Core>();
const shown = new WeakMap<Core, Map<string, ElementDefinition>>();
const edges = new WeakMap<Core, number>(); // how many are shown

/** Touches what differs: most of a graph only moves when a block opens. */
function replace(canvas: Core, wanted: Map<string, ElementDefinition>): void {
  const before = shown.get(canvas) ?? new Map<string, ElementDefinition>();
  shown.set(canvas, wanted);
  const gone = canvas.collection();
  for (const id of before.keys()) if (!wanted.has(id)) gone.merge(canvas.getElementById(id));
  canvas.remove(gone);
  const fresh: ElementDefinition[] = [];
  for (const [id, one] of wanted) {
    const old = before.get(id);
    if (!old) {
      fresh.push(one);
      continue;
    }
    const element = canvas.getElementById(id);
    const { position: at } = one;
    if (at && (at.x !== old.position?.x || at.y !== old.position?.y)) element.position(at);
    if (JSON.stringify(one.data) !== JSON.stringify(old.data)) element.data(one.data);
    if (one.classes !== old.classes) element.classes(one.classes as string);
  }
  canvas.add(fresh);
}

function label(graph: Graph, item: Item, marks: boolean): string {
  const node = item.single;
  if (node) return `${marks ? sign(node) : ""}${tail(action(node), NAME)}\n${subject(node)}`;
  const work = item.nodes.reduce((sum, index) => sum + (graph.nodes[index]?.flops ?? 0), 0);
  const changed = marks ? changes(graph, item) : "";
  const facts = plural(item.nodes.length, "node") + (changed || (work ? ` · ${flops(work)}` : ""));
  return `${tail(title(item), NAME)}\n${facts}`;
}

function title(item: Item): string {
  const { group } = item;
  if (/^\d+$/.test(group.label)) return group.path.split(".").slice(-2).join(".");
  return group.label;
}

/** What a node is about: its weight, or the end of its name. */
function subject(node: GraphNode): string {
  return tail(node.slot ? node.slot.split(".").slice(-2).join(".") : node.name, NAME);
}

function action(node: GraphNode): string {
  return node.operator === "placeholder" ? node.kind : shortOperator(node.operator);
}

function sign(node: GraphNode): string {
  return { same: "", changed: "~ ", new: "+ " }[node.change] ?? "";
}

function changes(graph: Graph, item: Item): string {
  const of = (change: string) =>
    item.nodes.filter((index) => graph.nodes[index]?.change === change).length;
  const made = of("new");
  const changed = of("changed");
  return (made ? ` · +${made}` : "") + (changed ? ` · ~${changed}` : "");
}

function marked(graph: Graph, item: Item): string {
  const found = new Set(item.nodes.map((index) => graph.nodes[index]?.change));
  return found.has("new") ? "new" : found.has("changed") ? "changed" : "";
}

/** Classes for what is selected, found or followed; everything else is dimmed where a weight is
 * followed. steps: pairs of items, in order.
 */
export function emphasise(
  canvas: Core,
  selected: string | null,
  matches: ReadonlySet<string>,
  path: string[] | null,
): void {
  const wanted = Boolean(selected || path || matches.size);
  if (!wanted && !emphasised.has(canvas)) return;
  if (wanted) emphasised.add(canvas);
  else emphasised.delete(canvas);
  canvas.batch(() => {
    canvas.remove(".trail");
    for (const name of EMPHASIS) canvas.$(`.${name}`).removeClass(name);
    for (const id of matches) canvas.getElementById(id).addClass("match");
    if (path) {
      canvas.elements().addClass("dim");
      for (const id of path) canvas.getElementById(id).removeClass("dim").addClass("followed");
      canvas.add(trail(path));
    }
    if (selected) {
      const element = canvas.getElementById(selected);
      element.removeClass("dim").addClass("selected");
      if (!path && element.isNode()) element.connectedEdges().addClass("near");
    }
  });
}

function trail(path: string[]): ElementDefinition[] {
  const found: ElementDefinition[] = [];
  path.forEach((id, at) => {
    const before = path[at - 1];
    if (before === undefined || before === id) return;
    const data = { id: `t${at}`, source: before, target: id };
    found.push({ group: "edges", data, classes: "trail" });
  });
  return found;
}

export function restyle(canvas: Core): void {
  canvas.style(stylesheet());
}

/** While a large picture moves, its edges are left out. */
export function tune(canvas: Core): void {
  const many = (edges.get(canvas) ?? 0) > 1500 && canvas.zoom() < DETAIL;
  const inner = canvas as unknown as { renderer(): { hideEdgesOnViewport: boolean } };
  inner.renderer().hideEdgesOnViewport = many;
}

function stylesheet(): StylesheetJson {
  const colour = (name: string) => themed(`--${name}`);
  const tones = ["before", "forward", "backward", "descent", "last"].map((name) => ({
    selector: `.${name}`,
    style: { "background-color": colour(`${name}-tint`), "border-color": colour(name) },
  }));
  return [
    {
      selector: "node",
      style: {
        width: "data(width)",
        height: "data(height)",
        shape: "round-rectangle",
        label: "data(label)",
        color: colour("text"),
        "font-family": "system-ui, sans-serif",
        "font-size": 12,
        "line-height": 1.3,
        "text-wrap": "wrap",
        "text-valign": "center",
        "text-halign": "center",
        "min-zoomed-font-size": 5,
        "overlay-opacity": 0,
      },
    },
    {
      selector: ".band",
      style: {
        "background-color": colour("band"),
        "background-opacity": 0.55,
        "border-width": 1,
        "border-color": colour("line"),
        color: colour("text-soft"),
        "text-valign": "top",
        "text-halign": "right",
        "text-margin-y": 21,
        "text-margin-x": (band: NodeSingular) => 10 - (band.data("width") as number),
        "z-index": 0,
        "z-compound-depth": "bottom",
        events: "yes",
      },
    },
    { selector: ".item", style: { "border-width": 1.25, "z-index": 5 } },
    { selector: ".cell", style: { ghost: "yes", "ghost-offset-x": 4, "ghost-offset-y": 4, "ghost-opacity": 0.35 } },
    ...tones,
    { selector: ".node", style: { "background-color": colour("surface") } },
    { selector: ".new", style: { "border-width": 3, "border-style": "double" } },
    { selector: ".changed", style: { "border-width": 2, "border-style": "dashed" } },
    {
      selector: "edge",
      style: {
        width: 1,
        "curve-style": "straight", // bezier looks for parallel edges, each time that an end moves
        "line-color": colour("edge"),
        "target-arrow-color": colour("edge"),
        "target-arrow-shape": "triangle",
        "arrow-scale": 0.7,
        "overlay-opacity": 0,
        events: "no",
        "z-index": 1,
        "z-index-compare": "manual",
      },
    },
    { selector: ".weight", style: { "line-style": "solid", opacity: 0.55 } },
    { selector: ".paired", style: { "curve-style": "bezier" } },
    {
      selector: ".bent",
      style: {
        "curve-style": "unbundled-bezier",
        "control-point-distances": "data(bend)",
        "control-point-weights": 0.5,
      } as never,
    },
    { selector: ".quiet", style: { display: "none" } },
    {
      selector: ".near",
      style: {
        display: "element",
        width: 2,
        opacity: 1,
        "line-color": colour("accent"),
        "target-arrow-color": colour("accent"),
        "z-index": 6,
      },
    },
    { selector: ".match", style: { "border-width": 3, "border-color": colour("accent") } },
    { selector: ".dim", style: { opacity: 0.16 } },
    { selector: ".followed", style: { opacity: 1, "border-width": 3, "border-color": colour("trail") } },
    {
      selector: ".selected",
      style: { "border-width": 4, "border-color": colour("accent"), "border-style": "solid", opacity: 1 },
    },
    {
      selector: ".trail",
      style: {
        width: 5,
        "line-color": colour("trail"),
        "target-arrow-color": colour("trail"),
        "curve-style": "straight",
        "arrow-scale": 1.1,
        opacity: 0.9,
        "z-index": 8,
      },
    },
  ] as unknown as StylesheetJson;
}
