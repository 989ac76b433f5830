// Above the graph: stage, what a pass changed, the weight that is followed, opening and zoom.

import { fill, h } from "../dom.ts";
import { current, href, update } from "../route.ts";
import { count } from "../text.ts";
import { choices, type Way } from "./follow.ts";
import type { Graph } from "./model.ts";
import type { Slots } from "../data.ts";

export interface Zoom {
  by(factor: number): void;
  fit(): void;
}

export interface Toolbar {
  element: HTMLElement;
  corner: HTMLElement; // below the canvas
  show(graph: Graph, marks: boolean, followed: Way | null, at: number): void;
  setSlots(slots: Slots): void;
}

export interface Asked {
  openAll(): void;
  closeAll(): void;
  follow(slot: string): void;
  step(by: number): void;
  zoom: Zoom;
}

export function createToolbar(stages: string[], search: HTMLElement, asked: Asked): Toolbar {
  const tabs = h("div", { class: "segments", role: "group", "aria-label": "Stage" });
  const changes = h("p", { class: "changes", role: "status" });
  const picker = h(
    "select",
    {
      "aria-label": "Follow a weight",
      onchange: () => asked.follow(picker.value),
    },
    h("option", { value: "" }, "Follow a weight …"),
  );
  const steps = h("div", { class: "steps" });
  const button = (text: string, label: string, press: () => void) =>
    h("button", { type: "button", "aria-label": label, title: label, onclick: press }, text);
  const element = h(
    "div",
    { class: "toolbar" },
    tabs,
    search,
    h("div", { class: "follow" }, picker, steps),
    h(
      "div",
      { class: "group" },
      button("Open all", "Open all groups", asked.openAll),
      button("Close all", "Close all groups", asked.closeAll),
    ),
  );
  const corner = h(
    "div",
    { class: "corner" },
    changes,
    h(
      "div",
      { class: "group" },
      button("−", "Zoom out", () => asked.zoom.by(1 / 1.3)),
      button("+", "Zoom in", () => asked.zoom.by(1.3)),
      button("Fit", "Show the whole graph", asked.zoom.fit),
    ),
  );
  return {
    element,
    corner,
    setSlots(slots) {
      const { updated, fixed } = choices(slots);
      const group = (label: string, names: string[]) =>
        names.length
          ? h("optgroup", { label }, names.map((name) => h("option", { value: name }, name)))
          : null;
      fill(
        picker,
        h("option", { value: "" }, "Follow a weight …"),
        group("updated", updated),
        group("not updated", fixed),
      );
    },
    show(graph, marks, followed, at) {
      const params = Object.fromEntries(current().params);
      fill(
        tabs,
        stages.map((stage) =>
          h(
            "a",
            {
              href: href("graph", { ...params, stage }),
              "aria-current": stage === graph.stage ? "true" : null,
            },
            stage,
          ),
        ),
      );
      picker.value = followed?.slot.name ?? "";
      fill(
        steps,
        followed
          ? [
              button("◂", "Previous node of its way", () => asked.step(-1)),
              h("span", { class: "soft" }, `${at < 0 ? "–" : at + 1} of ${followed.nodes.length}`),
              button("▸", "Next node of its way", () => asked.step(1)),
              button("✕", "Stop following", () => asked.follow("")),
            ]
          : null,
      );
      fill(changes, ...changed(graph, marks));
    },
  };
}

function changed(graph: Graph, marks: boolean) {
  const { counts } = graph;
  const box = h("input", {
    type: "checkbox",
    onchange: () => update({ marks: box.checked ? null : "0" }),
  });
  box.checked = marks;
  const text = `${count(counts.new)} new, ${count(counts.changed)} changed, ${count(graph.removed)} gone`;
  return counts.new || counts.changed || graph.removed
    ? [h("label", {}, box, " Mark changes"), h("span", {}, text)]
    : [h("span", {}, `${count(graph.nodes.length)} nodes, as captured`)];
}
