import type { Slots } from "../data.ts";
import { h } from "../dom.ts";
import { href } from "../route.ts";
import { table } from "../table.ts";
import { count } from "../text.ts";

export function prefixTable(slots: Slots): HTMLElement {
  const head = ["prefix slot", "shape", "learns", "pages", "numbers", "padding", "read", "written"];
  const rows = slots.prefix.map((slot) => {
    const pages = slot.tiles.map((tile) => tile.page);
    return [
      h("a", { class: "mono wrap", href: href("graph", { slot: slot.name, stage: "lowered" }) }, slot.name),
      slot.shape,
      slot.updated ? "yes" : slot.trainable ? "no gradient" : "",
      range(Math.min(...pages), Math.max(...pages)),
      count(slot.numbers),
      count(slot.padding),
      `${slot.read_at.length} ×`,
      `${slot.written_at.length} ×`,
    ];
  });
  return table("Prefix slots", head, rows, [4, 5, 6, 7]);
}

export function memoryTable(slots: Slots): HTMLElement {
  const head = ["memory slot", "coordinates", "made in", "from call", "until call", "kept"];
  const rows = slots.memory.map((slot) => [
    h("a", { class: "mono wrap", href: href("graph", { node: slot.name, stage: "lowered" }) }, slot.name),
    `${count(slot.first)}–${count(slot.first + slot.size)}`,
    slots.program[slot.from]?.lane ?? "",
    count(slot.from + 1),
    count(slot.until + 1),
    slot.kept ? "yes" : "",
  ]);
  return table("Memory slots", head, rows, [3, 4]);
}

function range(first: number, last: number): string {
  return first === last ? String(first) : `${first}–${last}`;
}
