// Tables beside the pictures. A long one is made when it is opened.

import { type Child, h } from "./dom.ts";

export type Cell = Child;

export function table(caption: string, head: string[], rows: Cell[][], numbers: number[] = []): HTMLElement {
  const kind = (at: number) => (numbers.includes(at) ? "number" : null);
  return h(
    "div",
    { class: "table", tabindex: "0", role: "region", "aria-label": caption },
    h(
      "table",
      {},
      h("caption", { class: "hidden" }, caption),
      h("thead", {}, h("tr", {}, head.map((text, at) => h("th", { scope: "col", class: kind(at) }, text)))),
      h(
        "tbody",
        {},
        rows.map((row) => h("tr", {}, row.map((cell, at) => h("td", { class: kind(at) }, cell)))),
      ),
    ),
  );
}

/** Closed at first. make: the table, when it is asked for. */
export function folded(title: string, make: () => HTMLElement): HTMLElement {
  const details = h("details", {}, h("summary", {}, title));
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(make());
  });
  return details;
}
