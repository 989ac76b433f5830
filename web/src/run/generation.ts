// The text goes on, under the weights before training and under those after it.

import type { Run } from "../data.ts";
import { fill, h } from "../dom.ts";
import { bytes, message } from "../text.ts";
import type { Engine, Provider } from "./engine.ts";
import type { Text } from "./messages.ts";
import type { Reader } from "./tokenizer.ts";

const COUNT = 48; // tokens

export function createGeneration(
  run: Run,
  reader: Reader,
  engine: Engine,
  settings: () => { text: Text; provider: Provider },
) {
  const after = h("p", { class: "generated", "data-generated": "after" });
  const before = h("p", { class: "generated", "data-generated": "before" });
  const status = h("span", { class: "soft", role: "status" });
  const problem = h("p", { class: "failed", role: "alert" });
  const button = h("button", { type: "button", onclick: () => void go() }, "Continue the text");
  const stop = h("button", { type: "button", disabled: true, onclick: () => halt() }, "Stop");
  const size = run.pair?.bytes ?? (run.pair?.external ?? []).reduce((sum, one) => sum + one.bytes, 0);
  const first = () => (status.textContent = size ? `The first time fetches ${bytes(size)} more.` : "");
  let halted = false;

  const halt = () => {
    halted = true;
    engine.stop();
  };
  const into = async (element: HTMLElement, text: Text) => {
    const made: number[] = [];
    // Decoded behind the text's last tokens: a first word keeps the space in front of it.
    const behind = text.ids.slice(-4);
    const known = reader.decode(behind).length;
    await engine.generate(
      text,
      COUNT,
      (token) => {
        made.push(token);
        element.dataset["ids"] = made.join(" ");
        element.textContent = reader.decode([...behind, ...made]).slice(known);
      },
      (done, total) => (status.textContent = `fetching ${bytes(done)} of ${bytes(total)}`),
    );
    return made.length;
  };
  const go = async () => {
    const { text, provider } = settings();
    halted = false;
    button.disabled = true;
    stop.disabled = false;
    fill(problem);
    for (const element of [after, before]) {
      fill(element);
      delete element.dataset["ids"];
    }
    try {
      status.textContent = "loading";
      await engine.load(provider, (done, total) => (status.textContent = `fetching ${bytes(done)} of ${bytes(total)}`));
      status.textContent = "training, then generating";
      const start = performance.now();
      const made = await into(after, text);
      const seconds = (performance.now() - start) / 1000;
      if (!halted) await into(before, { ...text, rate: 0 });
      status.textContent = `${made} tokens in ${seconds.toFixed(1)} s`;
    } catch (error) {
      status.textContent = "";
      problem.textContent = message(error);
    } finally {
      button.disabled = false;
      stop.disabled = true;
    }
  };
  first();

  const element = h(
    "div",
    { class: "card generation" },
    h("h2", {}, "What comes next"),
    h("p", { class: "soft" }, "The most probable tokens behind the whole text, one by one."),
    h("div", { class: "settings" }, button, stop, status),
    problem,
    h(
      "div",
      { class: "both" },
      h("div", {}, h("h3", {}, "with the updated weights"), after),
      h("div", {}, h("h3", {}, "with the weights as they were"), before),
    ),
  );
  return { element };
}
