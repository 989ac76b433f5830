// What the simulator holds and what a call of it costs.

import { type Cost, load } from "../data.ts";
import { fill, h } from "../dom.ts";
import { current, update } from "../route.ts";
import { folded, table } from "../table.ts";
import { bytes, count, flops, percent, short } from "../text.ts";
import type { View } from "../view.ts";
import { comparison, stacked, type Unit } from "./bars.ts";
import { createTreemap } from "./treemap.ts";

export function createCostView(): View {
  const element = h("section", { class: "page cost-view", "aria-label": "Parameters and cost" });
  const bars = h("div", {});
  let cost: Cost | null = null;
  return {
    element,
    async show() {
      if (!cost) {
        cost = await load<Cost>("cost");
        fill(element, summary(cost), parameters(cost), work(cost, bars));
      }
      const unit: Unit = current().params.get("unit") === "bytes" ? "bytes" : "flops";
      fill(bars, units(unit), stacked(cost.phases, unit), unit === "flops" ? comparison(cost) : null);
    },
  };
}

function summary(cost: Cost): HTMLElement {
  const figure = (value: string, name: string) =>
    h("div", { class: "figure" }, h("span", { class: "value" }, value), h("span", { class: "soft" }, name));
  const { batch, tokens, trained } = cost.call;
  return h(
    "div",
    { class: "card figures" },
    figure(short(cost.parameters.total), `parameters, back end ${cost.parameters.backend}`),
    figure(short(cost.parameters.auxiliary), "of the model that it trains"),
    figure(flops(cost.flops), `a call of ${batch} × ${tokens} tokens, ${trained} trained on`),
    figure(bytes(cost.weight_bytes), "of weights"),
    figure(bytes(cost.peak_bytes), "at the peak of a call"),
  );
}

function parameters(cost: Cost): HTMLElement {
  const { parts, total } = cost.parameters;
  const map = createTreemap(cost.auxiliary);
  const sorted = [...cost.auxiliary].sort((a, b) => b.count - a.count);
  return h(
    "div",
    { class: "card" },
    h("h2", {}, "Parameters of the model, by kind"),
    map,
    folded("The same as a table", () =>
      table(
        "Parameters",
        ["parameter", "kind", "numbers"],
        sorted.map((one) => [h("span", { class: "mono wrap" }, one.name), one.kind, count(one.count)]),
        [2],
      ),
    ),
    h("h2", { class: "later" }, "Parameters of the simulator"),
    table(
      "Parameters of the simulator",
      ["part", "numbers", "share", "how many"],
      parts.map((part) => [part.name, count(part.count), percent(part.count / Math.max(1, total)), part.formula]),
      [1, 2],
    ),
  );
}

function work(cost: Cost, bars: HTMLElement): HTMLElement {
  const rows = [...cost.phases].sort((a, b) => b.flops - a.flops);
  return h(
    "div",
    { class: "card" },
    h("h2", {}, "Work of one call"),
    bars,
    folded("The same as a table", () =>
      table(
        "Work by phase and operator",
        ["phase", "operator", "calls", "FLOPs", "bytes"],
        rows.map((row) => [row.lane, h("span", { class: "mono" }, row.operator), count(row.calls), flops(row.flops), bytes(row.bytes)]),
        [2, 3, 4],
      ),
    ),
  );
}

function units(unit: Unit): HTMLElement {
  const button = (name: Unit, text: string) =>
    h(
      "button",
      {
        type: "button",
        "aria-pressed": String(unit === name),
        onclick: () => update({ unit: name === "flops" ? null : name }),
      },
      text,
    );
  return h("div", { class: "segments", role: "group", "aria-label": "Unit" }, button("flops", "FLOPs"), button("bytes", "Bytes"));
}
