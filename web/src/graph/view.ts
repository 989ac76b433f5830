// The graph's view: reads the URL, decides what is visible, and hands it to the canvas, the outline,
// the panel and the toolbar.

import type { Core } from "cytoscape";

import { type GraphFile, load, type Operators, type Site, type Slots } from "../data.ts";
import { framed, h } from "../dom.ts";
import { current, update } from "../route.ts";
import type { View } from "../view.ts";
import { createCanvas, emphasise, restyle, show as draw, tune } from "./draw.ts";
import { links } from "./edges.ts";
import { type Way, way } from "./follow.ts";
import { createLanes } from "./lanes.ts";
import { decode, type Graph, type GraphNode, type Group } from "./model.ts";
import { createOutline } from "./outline.ts";
import { createPanel } from "./panel.ts";
import { type Placed, place } from "./place.ts";
import { ALL, isSpine, readOpen, revealing, visible, writeOpen } from "./rows.ts";
import { createSearch, find } from "./search.ts";
import { createToolbar } from "./toolbar.ts";

const graphs = new Map<string, Promise<Graph>>();
const TOP = 58; // pixels under the lanes' names
const LEAST = 0.5; // of a way through many steps
const READABLE = 0.72; // the zoom below which labels are hard to read

export function createGraphView(site: Site): View {
  const view = new GraphView(site);
  return {
    element: view.element,
    show: (params) => view.show(params),
    restyle: () => restyle(view.canvas),
  };
}

function graphOf(stage: string, steps: number): Promise<Graph> {
  let found = graphs.get(stage);
  if (!found) {
    found = load<GraphFile>(`graph-${stage}`).then((file) => decode(file, steps));
    graphs.set(stage, found);
  }
  return found;
}

class GraphView {
  readonly element: HTMLElement;
  readonly canvas: Core;
  private readonly surface = h("div", { class: "canvas" });
  private readonly lanes = createLanes();
  private readonly search = createSearch(
    (text) => update({ q: text || null }, { replace: true }),
    (node) => update({ node: node.name }),
  );
  private readonly outline = createOutline(
    (group) => this.toggle(group),
    (node) => update({ node: this.graph?.nodes[node]?.name ?? null }),
  );
  private readonly panel;
  private readonly toolbar;
  private graph: Graph | null = null;
  private placed: Placed | null = null;
  private open = new Set<string>();
  private followed: Way | null = null;
  private drawn = ""; // stage, groups and marks that the canvas shows
  private shown = ""; // stage and node
  private asked = 0; // counts calls of show: an older one that waits for data gives up

  constructor(private readonly site: Site) {
    this.panel = createPanel(site.summary);
    this.toolbar = createToolbar(site.stages, this.search.element, {
      openAll: () => update({ open: ALL }),
      closeAll: () => update({ open: null }),
      follow: (slot) => update({ slot: slot || null, node: null }),
      step: (by) => this.step(by),
      zoom: { by: (factor) => this.zoom(factor), fit: () => this.fit() },
    });
    this.element = h(
      "section",
      { class: "graph-view", "aria-label": "Graph" },
      this.toolbar.element,
      h("div", { class: "outline" }, h("h2", {}, "Outline"), this.outline.element),
      h("div", { class: "stage" }, this.surface, this.lanes.element, this.toolbar.corner),
      this.panel.element,
    );
    this.canvas = createCanvas(this.surface);
    this.listen();
  }

  async show(params: ReadonlyMap<string, string>): Promise<void> {
    const asked = (this.asked += 1);
    const stage = this.stage(params);
    const [graph, operators, slots] = await Promise.all([
      graphOf(stage, this.site.steps),
      load<Operators>("operators"),
      load<Slots>("slots"),
    ]);
    const lowered = params.get("slot") ? await graphOf("lowered", this.site.steps) : graph;
    if (asked !== this.asked) return;
    if (!this.graph) this.toolbar.setSlots(slots);
    const another = this.graph !== graph;
    this.graph = graph;
    this.open = readOpen(params.get("open"));
    const slot = params.get("slot") ?? "";
    const before = this.followed?.slot.name ?? "";
    this.followed = slot ? way(graph, lowered, slots, slot) : null;
    const node = graph.byName.get(params.get("node") ?? "") ?? null;
    this.reveal(node, this.followed && slot !== before ? this.followed : null, stage);
    this.render(params, another);
    if (this.followed && slot !== before) this.survey(this.followed);
    this.panel.show(graph, operators, node);
    this.outline.show(graph, this.open, node?.index ?? null);
    const at = this.followed && node ? this.followed.nodes.indexOf(node) : -1;
    this.toolbar.show(graph, params.get("marks") !== "0", this.followed, at);
    this.search.show(graph, params.get("q") ?? "");
  }

  private stage(params: ReadonlyMap<string, string>): string {
    const stage = params.get("stage") ?? "";
    return this.site.stages.includes(stage) ? stage : this.site.default_stage;
  }

  /** Opens what hides a node that was just chosen, or the way of a weight that was. */
  private reveal(node: GraphNode | null, followed: Way | null, stage: string): void {
    const graph = this.graph;
    if (!graph) return;
    const chosen = `${stage} ${node?.name ?? ""}`;
    const wanted = node && chosen !== this.shown ? [node.index] : [];
    this.shown = chosen;
    if (followed) {
      const home = followed.nodes[0]?.module;
      wanted.push(...followed.nodes.filter((one) => one.module === home).map((one) => one.index));
    }
    const paths = revealing(graph, wanted).filter((path) => !this.open.has(path));
    if (!paths.length || this.open.has(ALL)) return;
    for (const path of paths) this.open.add(path);
    // The URL says so too; nothing else of it changes, so nothing is shown twice.
    const params = { ...Object.fromEntries(current().params), open: writeOpen(this.open) ?? "" };
    history.replaceState(null, "", `#/graph?${new URLSearchParams(params).toString()}`);
  }

  private render(params: ReadonlyMap<string, string>, another: boolean): void {
    const graph = this.graph;
    if (!graph) return;
    const marks = params.get("marks") !== "0";
    const drawn = JSON.stringify([graph.stage, [...this.open], marks]);
    if (drawn !== this.drawn) {
      const kept = another ? null : this.anchor();
      this.placed = place(graph, visible(graph, this.open));
      draw(this.canvas, graph, this.placed, links(graph, this.placed), marks && hasChanges(graph));
      this.lanes.show(graph, this.placed);
      if (this.drawn === "" || another) this.home();
      else this.hold(kept);
      this.drawn = drawn;
    }
    this.emphasise(params);
    this.moved();
  }

  private emphasise(params: ReadonlyMap<string, string>): void {
    const { graph, placed } = this;
    if (!graph || !placed) return;
    const item = (node: GraphNode) => placed.itemOf.get(node.index)?.id ?? "";
    const node = graph.byName.get(params.get("node") ?? "");
    const matches = new Set(find(graph, params.get("q") ?? "").map(item));
    const path = this.followed?.nodes.map(item) ?? null;
    const selected = node ? item(node) : (path?.[0] ?? null);
    emphasise(this.canvas, node ? selected : null, matches, path);
    if (selected) this.bringIntoView(selected);
  }

  private listen(): void {
    this.canvas.on("tap", ".item", (event) => {
      const id: string = event.target.id();
      const item = this.placed?.items.find((one) => one.id === id);
      if (!item) return;
      if (item.single) update({ node: item.single.name });
      else this.toggle(item.group);
    });
    this.canvas.on("tap", ".band", (event) => {
      const group = this.graph?.groups[Number((event.target.id() as string).slice(1))];
      // Only the frame's head closes it: its ground is where a reader drags.
      const band = this.placed?.bands.find((one) => one.group === group);
      if (group && band && event.position.y < band.y - band.height / 2 + 26) this.toggle(group);
    });
    this.canvas.on("tap", (event) => {
      if (event.target === this.canvas) update({ node: null });
    });
    this.canvas.on("mouseover", ".item", () => this.surface.classList.add("over"));
    this.canvas.on("mouseout", ".item", () => this.surface.classList.remove("over"));
    this.canvas.on("viewport", framed(() => this.moved()));
    new ResizeObserver(() => this.canvas.resize()).observe(this.surface);
    window.addEventListener("keydown", (event) => this.key(event));
  }

  private key(event: KeyboardEvent): void {
    if (!this.element.isConnected || event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = (event.target as HTMLElement).matches("input, select, textarea");
    if (event.key === "Escape") {
      this.search.input.blur();
      update({ node: null, slot: null, q: null });
    }
    if (typing) return;
    const keys: Record<string, () => void> = {
      "/": () => this.search.input.focus(),
      "+": () => this.zoom(1.3),
      "-": () => this.zoom(1 / 1.3),
      "0": () => this.fit(),
      "[": () => this.step(-1),
      "]": () => this.step(1),
    };
    const act = keys[event.key];
    if (!act) return;
    event.preventDefault();
    act();
  }

  private toggle(group: Group): void {
    const graph = this.graph;
    if (!graph || isSpine(graph, group)) return;
    const open = new Set(this.open);
    if (open.delete(ALL)) for (const one of graph.groups) open.add(one.path);
    if (!open.delete(group.path)) open.add(group.path);
    this.pinned = group;
    update({ open: writeOpen(open) });
  }

  private pinned: Group | null = null;

  /** Where the group that is about to open or close stands on the screen. */
  private anchor(): { group: Group; y: number } | null {
    const y = this.pinned && this.top(this.pinned);
    return this.pinned && y != null ? { group: this.pinned, y } : null;
  }

  private top(group: Group): number | null {
    const band = this.placed?.bands.find((one) => one.group === group);
    const item = band ?? this.placed?.items.find((one) => one.group === group);
    if (!item) return null;
    return (item.y - item.height / 2) * this.canvas.zoom() + this.canvas.pan().y;
  }

  private hold(kept: { group: Group; y: number } | null): void {
    this.pinned = null;
    const now = kept && this.top(kept.group);
    if (kept && now != null) this.canvas.panBy({ x: 0, y: kept.y - now });
  }

  private step(by: number): void {
    const nodes = this.followed?.nodes ?? [];
    if (!nodes.length) return;
    const name = current().params.get("node");
    const at = nodes.findIndex((node) => node.name === name);
    const next = at < 0 ? (by > 0 ? 0 : nodes.length - 1) : (at + by + nodes.length) % nodes.length;
    update({ node: nodes[next]?.name ?? null });
  }

  private zoom(factor: number): void {
    const at = { x: this.canvas.width() / 2, y: this.canvas.height() / 2 };
    this.canvas.zoom({ level: this.canvas.zoom() * factor, renderedPosition: at });
  }

  private fit(): void {
    if (!this.placed) return;
    const { width, height } = this.placed;
    const level = Math.min((this.canvas.width() - 24) / width, (this.canvas.height() - TOP - 12) / height, 1);
    this.canvas.viewport({ zoom: level, pan: { x: 12, y: TOP } });
  }

  /** The start of the graph, all lanes if they stay readable. */
  private home(): void {
    if (!this.placed) return;
    this.canvas.resize();
    const level = Math.max(READABLE, Math.min(1, (this.canvas.width() - 24) / (this.placed.width + 14)));
    const spare = Math.max(0, (this.canvas.width() - this.placed.width * level) / 2);
    this.canvas.viewport({ zoom: level, pan: { x: Math.max(8, Math.min(spare, 60)), y: TOP } });
  }

  /** The whole way of a weight, if it stays readable. */
  private survey(followed: Way): void {
    const items = followed.nodes.flatMap((node) => this.placed?.itemOf.get(node.index) ?? []);
    if (!items.length) return;
    const left = Math.min(...items.map((item) => item.x - item.width / 2));
    const right = Math.max(...items.map((item) => item.x + item.width / 2));
    const middle = items.reduce((sum, item) => sum + item.y, 0) / items.length;
    const level = Math.max(LEAST, Math.min(1, (this.canvas.width() - 40) / (right - left)));
    const y = TOP + (this.canvas.height() - TOP) / 2 - middle * level;
    this.canvas.viewport({ zoom: level, pan: { x: 20 - left * level, y: Math.min(TOP, y) } });
  }

  private bringIntoView(id: string): void {
    const box = this.canvas.getElementById(id).renderedBoundingBox();
    const [wide, high] = [this.canvas.width(), this.canvas.height()];
    const by = { x: 0, y: 0 };
    if (box.x1 < 8) by.x = 40 - box.x1;
    else if (box.x2 > wide - 8) by.x = wide - 40 - box.x2;
    if (box.y1 < TOP) by.y = TOP + 40 - box.y1;
    else if (box.y2 > high - 56) by.y = high - 90 - box.y2;
    if (by.x || by.y) this.canvas.panBy(by);
  }

  private moved(): void {
    this.lanes.move(this.canvas);
    tune(this.canvas);
  }
}

function hasChanges(graph: Graph): boolean {
  return graph.counts.same < graph.nodes.length && graph.counts.same > 0;
}
