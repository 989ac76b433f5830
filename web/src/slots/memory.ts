// Memory slots as boxes over the program's time and a token's coordinates.

import { createMap } from "../canvas.ts";
import type { MemorySlot, Slots } from "../data.ts";
import { themed } from "../dom.ts";
import { laneTone } from "../lane.ts";
import { go } from "../route.ts";
import { count } from "../text.ts";
import type { State } from "./prefix.ts";

const HEIGHT = 400;
const HEAD = 16;

export function createMemoryMap(slots: Slots, state: State) {
  const { program, memory, layout } = slots;
  const lanes = runs(program.map((call) => call.lane));
  const across = (time: number, width: number) => (time / Math.max(1, program.length)) * width;
  const box = (slot: MemorySlot, width: number, height: number) => {
    const scale = (height - HEAD) / Math.max(1, layout.memory_width);
    const x = across(slot.from, width);
    return {
      x,
      y: HEAD + slot.first * scale,
      width: Math.max(1.5, across(slot.until + 1, width) - x),
      height: Math.max(1, slot.size * scale),
    };
  };

  return createMap<MemorySlot>({
    label: `Map of ${memory.length} activations over ${program.length} calls; the table below says the same`,
    height: () => HEIGHT,
    paint(context, width, height) {
      const [text, surface] = [themed("--text"), themed("--surface")];
      context.font = "10px system-ui, sans-serif";
      for (const lane of lanes) {
        const tone = laneTone(lane.name);
        const [x, end] = [across(lane.from, width), across(lane.until, width)];
        context.fillStyle = themed(`--${tone}`);
        context.fillRect(x, 0, end - x - 1, 3);
        context.fillStyle = themed("--text-soft");
        if (end - x > 60) context.fillText(fitted(context, lane.name, end - x - 4), x + 1, 13);
        context.fillStyle = themed("--band");
        context.fillRect(x, HEAD, end - x - 1, height - HEAD);
      }
      for (const slot of memory) {
        const at = box(slot, width, height);
        const tone = laneTone(program[slot.from]?.lane ?? "");
        const alive = state.time < 0 || (slot.from <= state.time && state.time <= slot.until);
        context.globalAlpha = alive ? (slot.kept ? 0.9 : 0.55) : 0.15;
        context.fillStyle = themed(`--${tone}`);
        context.fillRect(at.x, at.y, at.width, at.height);
        context.globalAlpha = 1;
        if (slot.kept || slot.name === state.memory) {
          context.strokeStyle = slot.name === state.memory ? text : surface;
          context.lineWidth = slot.name === state.memory ? 3 : 1;
          context.strokeRect(at.x + 0.5, at.y + 0.5, at.width - 1, at.height - 1);
        }
      }
      if (state.time >= 0) {
        context.fillStyle = text;
        context.fillRect(across(state.time + 0.5, width) - 1, 0, 2, height);
      }
    },
    at(x, y, width, height) {
      const hit = memory.filter((slot) => {
        const at = box(slot, width, height);
        return x >= at.x - 1 && x <= at.x + at.width + 1 && y >= at.y && y <= at.y + at.height;
      });
      return hit.at(-1) ?? null;
    },
    tell: (slot) => [
      slot.name,
      `coordinates ${count(slot.first)}–${count(slot.first + slot.size)}${slot.kept ? ", kept for training" : ""}`,
      `from call ${slot.from + 1} (${program[slot.from]?.lane ?? ""}) until ${program[slot.until]?.name ?? ""}`,
    ],
    click: (slot) => go("graph", { node: slot.name, stage: "lowered" }),
  });
}

/** Stretches of the program in one lane. */
function runs(lanes: string[]): { name: string; from: number; until: number }[] {
  const found: { name: string; from: number; until: number }[] = [];
  lanes.forEach((name, at) => {
    const last = found.at(-1);
    if (last?.name === name) last.until = at + 1;
    else found.push({ name, from: at, until: at + 1 });
  });
  return found;
}

function fitted(context: CanvasRenderingContext2D, text: string, width: number): string {
  let shown = text;
  while (shown.length > 1 && context.measureText(shown).width > width) shown = shown.slice(0, -1);
  return shown;
}
