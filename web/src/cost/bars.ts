// Bars: one a phase, cut by operator; and the whole beside what it is compared with.

import type { Cost } from "../data.ts";
import { h } from "../dom.ts";
import { laneTone } from "../lane.ts";
import { bytes, flops, percent } from "../text.ts";

export type Unit = "flops" | "bytes";
type Row = Cost["phases"][number];

const SHOWN = 6; // operators that have a colour; the others share one

export function stacked(rows: Row[], unit: Unit): HTMLElement {
  const lanes = totals(rows, unit, (row) => row.lane, false);
  const operators = totals(rows, unit, (row) => row.operator, true).map(([name]) => name);
  const colour = (operator: string) => Math.min(operators.indexOf(operator), SHOWN);
  const most = Math.max(1, ...lanes.map(([, value]) => value));
  const text = unit === "flops" ? flops : bytes;
  const segment = (row: Row) =>
    h("span", {
      class: `piece op-${colour(row.operator)}`,
      title: `${row.operator}: ${text(row[unit])}, ${row.calls} calls`,
      style: { width: `${(100 * row[unit]) / most}%` },
    });
  const named = operators.slice(0, SHOWN);
  return h(
    "div",
    { class: "bars" },
    lanes.map(([lane, value]) =>
      h(
        "div",
        { class: `bar-row ${laneTone(lane)}` },
        h("span", { class: "bar-name" }, lane || "outside the phases"),
        h(
          "span",
          { class: "bar" },
          rows
            .filter((row) => row.lane === lane && row[unit] > 0)
            .sort((a, b) => colour(a.operator) - colour(b.operator))
            .map(segment),
        ),
        h("span", { class: "bar-value" }, text(value)),
      ),
    ),
    h(
      "p",
      { class: "legend" },
      named.map((name, at) => h("span", { class: `key op-${at}` }, name)),
      operators.length > SHOWN ? h("span", { class: `key op-${SHOWN}` }, "others") : null,
    ),
  );
}

export function comparison(cost: Cost): HTMLElement {
  const rows: [string, number, string][] = [
    ["this simulator", cost.flops, "one forward pass of it"],
    ["autograd", cost.direct_flops, "the loop that one would write by hand, same tokens, same weights"],
    ["lower bound", cost.lower_bound.flops, cost.lower_bound.text],
  ];
  const most = Math.max(1, ...rows.map(([, value]) => value));
  return h(
    "div",
    { class: "bars compared" },
    rows.map(([name, value, about], at) =>
      h(
        "div",
        { class: "bar-row" },
        h("span", { class: "bar-name" }, name),
        h("span", { class: "bar" }, h("span", { class: `piece whole-${at}`, style: { width: `${(100 * value) / most}%` } })),
        h("span", { class: "bar-value" }, flops(value), h("span", { class: "soft" }, at ? ` ${percent(value / cost.flops)}` : "")),
        h("span", { class: "bar-about soft" }, about),
      ),
    ),
  );
}

function totals(rows: Row[], unit: Unit, key: (row: Row) => string, sorted: boolean): [string, number][] {
  const found = new Map<string, number>();
  for (const row of rows) found.set(key(row), (found.get(key(row)) ?? 0) + row[unit]);
  const all = [...found];
  return sorted ? all.sort((a, b) => b[1] - a[1]) : all;
}
