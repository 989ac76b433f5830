// Prefix pages as small boxes, side by side.

import { createMap } from "../canvas.ts";
import type { PrefixSlot, Slots, Tile } from "../data.ts";
import { themed } from "../dom.ts";
import { go } from "../route.ts";
import { count } from "../text.ts";

export interface State {
  slot: string;
  memory: string;
  time: number;
}

interface Found {
  slot: PrefixSlot;
  tile: Tile;
}

const PAGE = { width: 108, height: 54, gap: 10, title: 13 };

export function createPrefixMap(slots: Slots, state: State) {
  const { layout } = slots;
  const pages: Found[][] = Array.from({ length: layout.pages }, () => []);
  for (const slot of slots.prefix) for (const tile of slot.tiles) pages[tile.page]?.push({ slot, tile });

  const grid = (width: number) => {
    const columns = Math.max(1, Math.floor((width + PAGE.gap) / (PAGE.width + PAGE.gap)));
    const wide = (width - PAGE.gap * (columns - 1)) / columns;
    return { columns, wide, step: PAGE.height + PAGE.title + PAGE.gap };
  };
  const corner = (page: number, width: number) => {
    const { columns, wide, step } = grid(width);
    return { x: (page % columns) * (wide + PAGE.gap), y: Math.floor(page / columns) * step + PAGE.title, wide };
  };
  const box = (tile: Tile, width: number) => {
    const { x, y, wide } = corner(tile.page, width);
    const [left, right] = tile.coordinates;
    const [top, bottom] = tile.tokens;
    return {
      x: x + (left / layout.sim_hidden) * wide,
      y: y + (top / layout.prefix_tokens) * PAGE.height,
      width: Math.max(1, ((right - left) / layout.sim_hidden) * wide),
      height: ((bottom - top) / layout.prefix_tokens) * PAGE.height,
    };
  };

  return createMap<Found>({
    label: `Map of ${layout.pages} prefix pages; the table below says the same`,
    height: (width) => Math.ceil(layout.pages / grid(width).columns) * grid(width).step,
    paint(context, width) {
      const colour = colours();
      context.font = "10px system-ui, sans-serif";
      pages.forEach((held, page) => {
        const { x, y, wide } = corner(page, width);
        context.fillStyle = colour.soft;
        context.fillText(`page ${page}`, x, y - 3);
        context.fillStyle = colour.ground;
        context.fillRect(x, y, wide, PAGE.height);
        for (const { slot, tile } of held) {
          const at = box(tile, width);
          const [fill, line] = colour.of(slot);
          const active = touched(slot, state.time);
          context.globalAlpha = state.time >= 0 && !active ? 0.4 : 1;
          context.fillStyle = active ? colour.trail : fill;
          context.fillRect(at.x, at.y, at.width, at.height);
          context.globalAlpha = 1;
          context.strokeStyle = slot.name === state.slot ? colour.text : line;
          context.lineWidth = slot.name === state.slot ? 3 : 0.6;
          context.strokeRect(at.x + 0.5, at.y + 0.5, at.width - 1, at.height - 1);
        }
      });
    },
    at(x, y, width) {
      const { columns, wide, step } = grid(width);
      const page = Math.floor(y / step) * columns + Math.min(columns - 1, Math.floor(x / (wide + PAGE.gap)));
      const inside = (pages[page] ?? []).filter(({ tile }) => {
        const at = box(tile, width);
        return x >= at.x && x <= at.x + at.width && y >= at.y && y <= at.y + at.height;
      });
      return inside.at(-1) ?? null;
    },
    tell: ({ slot, tile }) => [
      slot.name,
      `${slot.shape}, ${count(slot.numbers)} numbers${slot.updated ? ", updated" : ""}`,
      `page ${tile.page}, tokens ${tile.tokens.join("–")}, coordinates ${tile.coordinates.join("–")}`,
    ],
    click: ({ slot }) => go("graph", { slot: slot.name, stage: "lowered" }),
  });
}

function touched(slot: PrefixSlot, time: number): boolean {
  return time >= 0 && (slot.read_at.includes(time) || slot.written_at.includes(time));
}

function colours() {
  const pairs = Object.fromEntries(
    ["before", "forward", "descent"].map((name) => [name, [themed(`--${name}-tint`), themed(`--${name}`)]]),
  ) as Record<string, [string, string]>;
  const of = (slot: PrefixSlot) =>
    pairs[slot.updated ? "descent" : slot.trainable ? "forward" : "before"] as [string, string];
  return { of, soft: themed("--text-soft"), ground: themed("--band"), text: themed("--text"), trail: themed("--trail") };
}
