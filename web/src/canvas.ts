// What maps on a canvas share: sharp pixels at any zoom, a label that follows the pointer, a click.

import { framed, h } from "./dom.ts";

export interface Map2d {
  element: HTMLElement;
  draw(): void;
}

interface Asked<T> {
  label: string; // for who cannot see the picture
  /** Height in pixels for a width. */
  height(width: number): number;
  paint(context: CanvasRenderingContext2D, width: number, height: number): void;
  at(x: number, y: number, width: number, height: number): T | null;
  tell(found: T): string[];
  click(found: T): void;
}

export function createMap<T>(asked: Asked<T>): Map2d {
  const canvas = h("canvas", { role: "img", "aria-label": asked.label });
  const tip = h("div", { class: "tip", hidden: true, "aria-hidden": "true" });
  const element = h("div", { class: "map" }, canvas, tip);
  let size = { width: 0, height: 0 };

  const draw = () => {
    const width = element.clientWidth;
    if (!width) return;
    size = { width, height: asked.height(width) };
    const ratio = Math.min(devicePixelRatio, 2);
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(size.height * ratio);
    canvas.style.setProperty("width", `${width}px`);
    canvas.style.setProperty("height", `${size.height}px`);
    const context = canvas.getContext("2d");
    if (!context) return;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, size.width, size.height);
    asked.paint(context, size.width, size.height);
  };
  const under = (event: MouseEvent): T | null => {
    const box = canvas.getBoundingClientRect();
    return asked.at(event.clientX - box.left, event.clientY - box.top, size.width, size.height);
  };
  canvas.addEventListener("mousemove", (event) => {
    const found = under(event);
    tip.hidden = found === null;
    canvas.style.setProperty("cursor", found === null ? "default" : "pointer");
    if (found === null) return;
    tip.replaceChildren(...asked.tell(found).map((line) => h("div", {}, line)));
    const box = element.getBoundingClientRect();
    const left = Math.min(event.clientX - box.left + 14, box.width - tip.offsetWidth - 4);
    tip.style.setProperty("left", `${Math.max(0, left)}px`);
    tip.style.setProperty("top", `${event.clientY - box.top + element.scrollTop + 16}px`);
  });
  canvas.addEventListener("mouseleave", () => (tip.hidden = true));
  canvas.addEventListener("click", (event) => {
    const found = under(event);
    if (found !== null) asked.click(found);
  });
  new ResizeObserver(framed(() => element.clientWidth !== size.width && draw())).observe(element);
  return { element, draw };
}
