// Where weights and activations live: prefix pages, and memory over the program's time.

import { load, type Slots } from "../data.ts";
import { fill, h } from "../dom.ts";
import { laneTone } from "../lane.ts";
import { update } from "../route.ts";
import { count, percent, plural } from "../text.ts";
import type { View } from "../view.ts";
import { createMemoryMap } from "./memory.ts";
import { createPrefixMap } from "./prefix.ts";
import { folded } from "../table.ts";
import { memoryTable, prefixTable } from "./tables.ts";

export function createSlotsView(): View {
  const element = h("section", { class: "page slots-view", "aria-label": "Slots" });
  const state = { slot: "", memory: "", time: -1 };
  let draw: (() => void) | null = null;

  const start = (slots: Slots) => {
    const prefix = createPrefixMap(slots, state);
    const memory = createMemoryMap(slots, state);
    const clock = createClock(slots, (time) => {
      state.time = time;
      prefix.draw();
      memory.draw();
    });
    draw = () => {
      clock.show(state.time);
      prefix.draw();
      memory.draw();
    };
    fill(element, summary(slots), clock.element, prefixCard(slots, prefix.element), memoryCard(slots, memory.element));
  };

  return {
    element,
    async show(params) {
      const slots = await load<Slots>("slots");
      state.slot = params.get("slot") ?? "";
      state.memory = params.get("memory") ?? "";
      const time = Number(params.get("t") ?? NaN);
      state.time = Number.isInteger(time) && time >= 0 && time < slots.program.length ? time : -1;
      if (!draw) start(slots);
      draw?.();
      if (params.get("map") === "memory") element.querySelector("#memory-map")?.scrollIntoView({ block: "nearest" });
    },
    restyle: () => draw?.(),
  };
}

function summary(slots: Slots): HTMLElement {
  const { layout, occupancy } = slots;
  const kept = slots.memory.filter((one) => one.kept).length;
  const padding = slots.prefix.reduce((sum, slot) => sum + slot.padding, 0);
  const figure = (value: string, name: string) =>
    h("div", { class: "figure" }, h("span", { class: "value" }, value), h("span", { class: "soft" }, name));
  return h(
    "div",
    { class: "card figures" },
    figure(count(layout.pages), `pages of ${layout.prefix_tokens} tokens × ${count(layout.sim_hidden)}`),
    figure(percent(occupancy.prefix), "of the pages hold weights"),
    figure(count(padding), "numbers of padding in slots"),
    figure(count(layout.memory_width), "coordinates of an input token"),
    figure(count(slots.memory.length), `activations, ${count(kept)} kept for training`),
  );
}

/** Program time: one call after the other. */
function createClock(slots: Slots, moved: (time: number) => void) {
  const { program } = slots;
  const slider = h("input", {
    type: "range",
    id: "time",
    min: 0,
    max: program.length - 1,
    oninput: () => {
      const time = Number(slider.value);
      say(time);
      moved(time);
    },
    onchange: () => update({ t: slider.value }, { replace: true }),
  });
  const said = h("output", { for: "time", class: "soft" });
  const clear = h("button", { type: "button", onclick: () => update({ t: null }, { replace: true }) }, "Whole program");
  const say = (time: number) => {
    const call = program[time];
    clear.disabled = !call;
    if (!call) {
      said.textContent = "Move through the program to see what each call reads, writes and keeps alive.";
      return;
    }
    const alive = slots.memory.filter((one) => one.from <= time && time <= one.until);
    const width = alive.reduce((sum, one) => sum + one.size, 0);
    const reads = slots.prefix.filter((one) => one.read_at.includes(time)).length;
    const writes = slots.prefix.filter((one) => one.written_at.includes(time)).length;
    fill(
      said,
      h("strong", {}, call.name),
      ` · ${call.lane} · reads ${plural(reads, "slot")}, writes ${count(writes)} · `,
      `${plural(alive.length, "activation")} alive in ${count(width)} coordinates`,
    );
    slider.setAttribute("aria-valuetext", `call ${time + 1}: ${call.name}`);
  };
  const element = h(
    "div",
    { class: "card clock" },
    h("div", { class: "settings" }, h("label", { for: "time" }, "Program time"), slider, clear),
    said,
  );
  return {
    element,
    show(time: number) {
      slider.value = String(Math.max(0, time));
      say(time);
    },
  };
}

function prefixCard(slots: Slots, map: HTMLElement): HTMLElement {
  return h(
    "div",
    { class: "card" },
    h("h2", {}, "Prefix pages"),
    h(
      "p",
      { class: "soft" },
      "Each box is a page: prefix tokens from top to bottom, coordinates from left to right. Empty ground is padding.",
    ),
    legend([
      ["descent", "updated by training"],
      ["forward", "trainable, no gradient reaches it"],
      ["before", "fixed"],
      ["trail", "read or written now"],
    ]),
    map,
    folded("Prefix slots as a table", () => prefixTable(slots)),
  );
}

function memoryCard(slots: Slots, map: HTMLElement): HTMLElement {
  const lanes = [...new Set(slots.program.map((call) => call.lane))];
  return h(
    "div",
    { class: "card", id: "memory-map" },
    h("h2", {}, "Memory of an input token"),
    h(
      "p",
      { class: "soft" },
      "From left to right the program, from top to bottom the coordinates. An activation lives from the call that " +
        "makes it to the last that reads it; those with a rim are kept for training.",
    ),
    legend([...new Set(lanes.map(laneTone))].map((tone) => [tone, tone === "last" ? "last forward" : tone])),
    map,
    folded("Memory slots as a table", () => memoryTable(slots)),
  );
}

function legend(entries: [string, string][]): HTMLElement {
  return h(
    "p",
    { class: "legend" },
    entries.map(([tone, text]) => h("span", { class: `key ${tone}` }, text)),
  );
}
