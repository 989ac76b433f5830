// Names of the lanes above the canvas; they stay in sight and follow its pan and zoom.

import type { Core } from "cytoscape";

import { fill, h } from "../dom.ts";
import { count, flops, plural } from "../text.ts";
import { tone } from "./draw.ts";
import type { Graph } from "./model.ts";
import type { Placed } from "./place.ts";

const MARGIN = 10;

export interface Lanes {
  element: HTMLElement;
  show(graph: Graph, placed: Placed): void;
  move(canvas: Core): void;
}

export function createLanes(): Lanes {
  const element = h("div", { class: "lanes", "aria-hidden": "true" });
  let boxes: Placed["lanes"] = [];
  return {
    element,
    show(graph, placed) {
      boxes = placed.lanes;
      fill(
        element,
        graph.lanes.map((lane) => {
          const facts = lane.flops ? `${count(lane.nodes)} · ${flops(lane.flops)}` : plural(lane.nodes, "node");
          return h(
            "div",
            { class: `lane ${tone(lane)}` },
            h("strong", {}, lane.name),
            h("span", {}, facts),
          );
        }),
      );
    },
    move(canvas) {
      const zoom = canvas.zoom();
      const left = canvas.pan().x;
      [...element.children].forEach((child, at) => {
        const box = boxes[at];
        if (!box) return;
        const lane = child as HTMLElement;
        lane.style.setProperty("transform", `translateX(${box.left * zoom + left - MARGIN / 2}px)`);
        lane.style.setProperty("width", `${box.width * zoom + MARGIN}px`);
        lane.classList.toggle("narrow", box.width * zoom < 100);
      });
    },
  };
}
