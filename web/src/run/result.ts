// What a run found: perplexity of the predicted part before and after, and which losses colour the
// tokens.

import { fill, h } from "../dom.ts";
import { count } from "../text.ts";
import type { Outcome } from "./losses.ts";
import { type Colouring, COLOURINGS } from "./tokens.ts";

const NAMES: Record<Colouring, string> = { before: "Before", after: "After", change: "Change" };

export function createResult(chosen: (by: Colouring) => void) {
  const figures = h("div", { class: "figures", role: "status" });
  const buttons = COLOURINGS.map((by) =>
    h("button", { type: "button", "data-by": by, onclick: () => chosen(by) }, NAMES[by]),
  );
  const head = h(
    "div",
    { class: "result" },
    figures,
    h("div", { class: "segments", role: "group", "aria-label": "Colour tokens by" }, buttons),
  );
  const foot = h("div", { class: "legend" });
  const empty = () =>
    fill(figures, h("p", { class: "soft" }, "Run the model to see what training on the first part changes."));
  empty();

  return {
    head,
    foot,
    clear() {
      figures.classList.remove("old");
      empty();
    },
    /** A setting changed: the figures are of the settings before. */
    old: () => figures.classList.add("old"),
    fail(text: string) {
      figures.classList.remove("old");
      fill(figures, h("p", { class: "failed", role: "alert" }, text));
    },
    show(found: Outcome) {
      figures.classList.remove("old");
      const change = found.after / found.before - 1;
      const sign = change < 0 ? "−" : "+";
      const tone = change < 0 ? "better" : "worse";
      fill(
        figures,
        figure("perplexity of the rest before", found.before.toFixed(2), "before-training"),
        figure("after", found.after.toFixed(2), "after-training"),
        figure("change", `${sign}${Math.abs(100 * change).toFixed(1)} %`, "change", tone),
        figure(`for ${count(found.tokens)} tokens`, `${count(Math.round(found.milliseconds))} ms`, "time"),
      );
    },
    by(by: Colouring) {
      for (const button of buttons) button.setAttribute("aria-pressed", String(button.dataset["by"] === by));
      const scale = (tone: string) => h("span", { class: `scale ${tone}`, "aria-hidden": "true" });
      fill(
        foot,
        by === "change"
          ? [scale("better"), "predicted better", scale("worse"), "predicted worse"]
          : [scale("loss"), `loss ${NAMES[by].toLowerCase()} training: darker is more surprising`],
        h("span", { class: "under" }, "underlined: trained on"),
      );
    },
  };
}

function figure(name: string, value: string, id: string, tone = ""): HTMLElement {
  return h("div", { class: "figure" }, h("span", { class: `value ${tone}`, "data-figure": id }, value), h("span", { class: "soft" }, name));
}
