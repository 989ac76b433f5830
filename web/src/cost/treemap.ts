// Parameters as areas, by kind (d3-hierarchy lays them out).

import { hierarchy, treemap, treemapSquarify } from "d3-hierarchy";

import type { Cost } from "../data.ts";
import { h } from "../dom.ts";
import { count, percent, short, tail } from "../text.ts";

type Parameter = Cost["auxiliary"][number];

interface Part {
  name: string;
  kind: string;
  count: number;
  children?: Part[];
}

const SIZE = { width: 1000, height: 420 }; // of the layout; the page scales it

export function createTreemap(parameters: Parameter[]): HTMLElement {
  const kinds = [...new Set(parameters.map((one) => one.kind))];
  const total = parameters.reduce((sum, one) => sum + one.count, 0);
  const of = (kind: string) => parameters.filter((one) => one.kind === kind);
  const root: Part = {
    name: "",
    kind: "",
    count: 0,
    children: kinds.map((kind) => ({ name: kind, kind, count: 0, children: of(kind) })),
  };
  const tree = hierarchy(root)
    .sum((part) => (part.children ? 0 : part.count))
    .sort((a, b) => (b.value ?? 0) - (a.value ?? 0));
  const laid = treemap<Part>()
    .tile(treemapSquarify)
    .size([SIZE.width, SIZE.height])
    .paddingInner(1.5)
    .paddingOuter((node) => (node.depth === 0 ? 0 : 2))
    .paddingTop((node) => (node.depth === 1 ? 24 : 0))(tree);
  const order = (laid.children ?? []).map((node) => node.data.kind);
  return h(
    "div",
    { class: "treemap", role: "img", "aria-label": `${count(total)} parameters by kind: ${shares(laid.children ?? [], total)}` },
    (laid.children ?? []).map((node) =>
      area(node, `kind op-${order.indexOf(node.data.kind) % 7}`, `${node.data.name} · ${short(node.value ?? 0)} · ${percent((node.value ?? 0) / total)}`),
    ),
    laid.leaves().map((node) => {
      const wide = node.x1 - node.x0;
      const fits = wide > 70 && node.y1 - node.y0 > 22;
      const text = fits ? fitted(node.data.name, Math.floor((wide - 12) / 6.6)) : "";
      return area(node, `leaf op-${order.indexOf(node.data.kind) % 7}`, text, `${node.data.name}: ${count(node.data.count)}`);
    }),
  );
}

/** As many of a name's last parts as there is room for. */
function fitted(name: string, most: number): string {
  const parts = name.split(".");
  while (parts.length > 2 && parts.join(".").length > most) parts.shift();
  return tail(parts.join("."), most);
}

interface Box {
  x0: number;
  x1: number;
  y0: number;
  y1: number;
}

function area(box: Box, kind: string, text: string, title = text): HTMLElement {
  const part = (value: number, of: number) => `${((100 * value) / of).toFixed(3)}%`;
  const style = {
    left: part(box.x0, SIZE.width),
    top: part(box.y0, SIZE.height),
    width: part(box.x1 - box.x0, SIZE.width),
    height: part(box.y1 - box.y0, SIZE.height),
  };
  return h("div", { class: `area ${kind}`, title, style }, h("span", {}, text));
}

function shares(kinds: { data: Part; value?: number | undefined }[], total: number): string {
  return kinds.map((kind) => `${kind.data.name} ${percent((kind.value ?? 0) / total)}`).join(", ");
}
