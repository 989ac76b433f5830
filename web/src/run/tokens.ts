// The text as tokens: coloured by their losses, with a handle behind the trained part that is dragged
// or moved with the keyboard.

import { fill, h } from "../dom.ts";
import { scale } from "./losses.ts";
import type { Scores } from "./messages.ts";

export type Colouring = "before" | "after" | "change";
export const COLOURINGS: Colouring[] = ["before", "after", "change"];

const STRONGEST = 62; // per cent of the colour behind a token: its text stays readable

export interface Tokens {
  element: HTMLElement;
  show(pieces: string[], trained: number): void;
  colour(scores: Scores | null, by: Colouring): void;
}

/** moved: the handle is somewhere else; done: and was let go. */
export function createTokens(moved: (trained: number, done: boolean) => void): Tokens {
  const element = h("div", { class: "tokens" });
  const handle = h("span", {
    class: "handle",
    role: "slider",
    tabindex: "0",
    "aria-label": "Tokens that are trained on",
    "aria-valuemin": "0",
  });
  let spans: HTMLElement[] = [];
  let trained = 0;

  const move = (to: number, done: boolean) => {
    const next = Math.max(0, Math.min(spans.length, to));
    if (next !== trained) {
      trained = next;
      place();
      moved(trained, done);
    } else if (done) moved(trained, true);
  };
  const place = () => {
    const behind = spans[trained] ?? null;
    if (handle.nextSibling !== behind || !handle.parentNode) element.insertBefore(handle, behind);
    handle.setAttribute("aria-valuemax", String(spans.length));
    handle.setAttribute("aria-valuenow", String(trained));
    handle.setAttribute("aria-valuetext", `${trained} of ${spans.length} tokens`);
    spans.forEach((span, at) => span.classList.toggle("trained", at < trained));
  };
  handle.addEventListener("pointerdown", (event) => {
    handle.setPointerCapture(event.pointerId);
    event.preventDefault();
    handle.focus();
  });
  handle.addEventListener("pointermove", (event) => {
    if (!handle.hasPointerCapture(event.pointerId)) return;
    const at = nearest(spans, event.clientX, event.clientY);
    if (at >= 0) move(at, false);
  });
  handle.addEventListener("pointerup", () => move(trained, true));
  handle.addEventListener("keydown", (event) => {
    const by: Record<string, number> = {
      ArrowLeft: -1,
      ArrowDown: -1,
      ArrowRight: 1,
      ArrowUp: 1,
      PageDown: -16,
      PageUp: 16,
      Home: -Infinity,
      End: Infinity,
    };
    const change = by[event.key];
    if (change === undefined) return;
    event.preventDefault();
    move(trained + change, true);
  });

  return {
    element,
    show(pieces, count) {
      trained = Math.min(count, pieces.length);
      spans = pieces.map((piece) => h("span", { class: "token" }, piece));
      fill(element, spans);
      place();
    },
    colour(scores, by) {
      const shown = scores && values(scores, by);
      const most = shown && scale(shown, by === "change" ? 0.25 : 4);
      spans.forEach((span, at) => {
        const value = shown?.[at - 1];
        span.classList.remove("better", "worse", "loss");
        span.removeAttribute("title");
        if (!scores || !most || value === undefined) return;
        const share = Math.min(1, Math.abs(value) / most) * STRONGEST;
        span.style.setProperty("--share", `${share.toFixed(1)}%`);
        span.classList.add(by !== "change" ? "loss" : value < 0 ? "better" : "worse");
        span.title = about(scores, at - 1);
      });
    },
  };
}

function values(scores: Scores, by: Colouring): Float32Array {
  if (by !== "change") return scores[by];
  return scores.after.map((value, at) => value - (scores.before[at] ?? 0));
}

function about(scores: Scores, at: number): string {
  const [before, after] = [scores.before[at] ?? 0, scores.after[at] ?? 0];
  const change = after - before;
  return `loss ${before.toFixed(3)} → ${after.toFixed(3)} (${change < 0 ? "" : "+"}${change.toFixed(3)})`;
}

/** In front of which token a point lies. */
function nearest(spans: HTMLElement[], x: number, y: number): number {
  const under = document.elementFromPoint(x, y);
  const hit = under ? spans.indexOf(under as HTMLElement) : -1;
  if (hit >= 0) {
    const box = spans[hit]?.getBoundingClientRect();
    return box && x > box.left + box.width / 2 ? hit + 1 : hit;
  }
  // Beside the text: the end of the line that the point is level with.
  let found = -1;
  spans.forEach((span, at) => {
    const box = span.getBoundingClientRect();
    if (y >= box.top && y <= box.bottom) found = x < box.left && found < 0 ? at : x >= box.left ? at + 1 : found;
  });
  return found;
}
