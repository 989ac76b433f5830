// Text, example, learning rate, where the model runs, and the button.

import type { Run } from "../data.ts";
import { fill, h } from "../dom.ts";
import { bytes } from "../text.ts";
import type { Provider } from "./engine.ts";

const SPAN = 3; // powers of ten that the slider reaches above the compiled rate, and two less below
const STEPS = 20; // of the slider, a power of ten
const PAUSE = 250; // milliseconds without a key before the text is read

export interface Asked {
  text(text: string): void;
  rate(rate: number, done: boolean): void;
  run(): void;
  provider(): void;
}

export function createControls(run: Run, asked: Asked) {
  let timer = 0;
  const area = h("textarea", {
    id: "text",
    rows: 5,
    spellcheck: "false",
    oninput: () => {
      clearTimeout(timer);
      timer = window.setTimeout(() => asked.text(area.value), PAUSE);
    },
  });
  const examples = h(
    "select",
    {
      "aria-label": "Example",
      onchange: () => {
        const found = run.examples[Number(examples.value)];
        if (found) asked.text(found.text);
      },
    },
    h("option", { value: "" }, "Choose an example …"),
    run.examples.map((one, at) => h("option", { value: at }, one.name)),
  );
  const slider = h("input", {
    type: "range",
    id: "rate",
    min: -2 * STEPS,
    max: SPAN * STEPS,
    oninput: () => tell(false),
    onchange: () => tell(true),
  });
  const told = h("output", { for: "rate", class: "mono" });
  const of = (at: number) => Number((run.inner_lr * 10 ** (at / STEPS)).toPrecision(2));
  const tell = (done: boolean) => {
    const rate = Number(slider.value) === 0 ? run.inner_lr : of(Number(slider.value));
    say(rate);
    asked.rate(rate, done);
  };
  const say = (rate: number) => {
    told.textContent = rate.toExponential(1);
    slider.setAttribute("aria-valuetext", rate.toExponential(1));
  };
  const gpu = h("input", { type: "checkbox", onchange: () => asked.provider() });
  const button = h("button", { type: "button", class: "main", id: "run", onclick: () => asked.run() }, "Run");
  const facts = h("p", { class: "soft facts-line" });
  const fetched = h("span", { class: "soft" });
  const cutting = h("p", { class: "soft", role: "status" });
  const bar = h("progress", { max: "1", hidden: true, "aria-label": "Fetched" });
  const amount = h("span", { class: "soft", role: "status" });

  const element = h(
    "div",
    { class: "card controls" },
    h("div", { class: "texts" }, h("label", { for: "text" }, "Text"), examples),
    area,
    cutting,
    h(
      "div",
      { class: "settings" },
      h("label", { for: "rate" }, "Learning rate"),
      slider,
      told,
      "gpu" in navigator ? h("label", {}, gpu, " WebGPU") : null,
    ),
    h("div", { class: "settings" }, button, fetched, bar, amount),
    facts,
  );

  return {
    element,
    provider: (): Provider => (gpu.checked ? "webgpu" : "wasm"),
    show(text: string, rate: number, line: string) {
      if (area.value !== text) area.value = text;
      const example = run.examples.findIndex((one) => one.text === text);
      examples.value = example < 0 ? "" : String(example);
      slider.value = String(Math.round(STEPS * Math.log10(rate / run.inner_lr)));
      say(rate);
      facts.textContent = line;
    },
    /** size: of what the first run fetches; "" where it is there. */
    fetches(size: string) {
      fetched.textContent = size ? `The first run fetches ${size}: the runtime and the model.` : "";
    },
    cut(all: number, kept: number) {
      cutting.textContent =
        kept < all ? `The text has ${all} tokens; this model has ${kept} positions, so the first ${kept} are used.` : "";
    },
    busy(now: boolean) {
      button.disabled = now;
      button.textContent = now ? "Running …" : "Run";
    },
    progress(done: number, total: number) {
      bar.hidden = !total;
      fetched.hidden = Boolean(total);
      bar.value = total ? Math.min(1, done / total) : 0;
      fill(amount, total ? `${bytes(done)} of ${bytes(total)}` : "");
    },
  };
}
