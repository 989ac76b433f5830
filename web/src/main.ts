// The shell: the page's name, the views' links, and the view that the URL asks for.

import { load, type Site } from "./data.ts";
import { fill, h } from "./dom.ts";
import { current, href } from "./route.ts";
import { message } from "./text.ts";
import { createThemeButton } from "./theme.ts";
import type { View } from "./view.ts";

const FORMAT = 1; // of data/

const NAMES: Record<string, string> = {
  graph: "Graph",
  slots: "Slots",
  cost: "Parameters and cost",
  run: "Run",
};

// Each view is fetched when it is first asked for.
const MAKERS: Record<string, (site: Site) => Promise<View>> = {
  graph: async (site) => (await import("./graph/view.ts")).createGraphView(site),
  slots: async () => (await import("./slots/view.ts")).createSlotsView(),
  cost: async () => (await import("./cost/view.ts")).createCostView(),
  run: async (site) => (await import("./run/view.ts")).createRunView(site),
};

async function start(): Promise<void> {
  const app = document.getElementById("app") as HTMLElement;
  const stage = h("main", { id: "main", tabindex: "-1" });
  const links = h("nav", { "aria-label": "Views" });
  const views = new Map<string, Promise<View>>();
  const heading = h("h1", {}, "tintc");
  const theme = createThemeButton(async () => {
    for (const view of views.values()) (await view).restyle?.();
  });
  fill(app, h("a", { class: "skip", href: "#main", onclick: skip }, "Skip to the view"), h("header", {}, heading, links, theme), stage);
  const site = await load<Site>("site");
  if (site.format !== FORMAT) {
    throw new Error(`the data have format ${site.format}, this page reads ${FORMAT}: run tintc page again`);
  }
  document.title = `${site.title} · tintc`;
  fill(heading, h("span", { class: "mark" }, "tintc"), " ", h("span", { class: "model" }, site.title));

  let shown = "";
  let asked = 0; // calls of show
  const show = async () => {
    const turn = (asked += 1);
    const route = current();
    const name = route.view in MAKERS ? route.view : "graph";
    fill(
      links,
      Object.entries(NAMES).map(([view, label]) =>
        h("a", { href: href(view), "aria-current": view === name ? "page" : null }, label),
      ),
    );
    try {
      let view = views.get(name);
      if (!view) {
        view = (MAKERS[name] as (site: Site) => Promise<View>)(site);
        views.set(name, view);
      }
      const made = await view;
      if (current().view !== route.view) return;
      if (shown !== name) {
        fill(stage, made.element);
        stage.className = `at-${name}`;
        shown = name;
      }
      await made.show(current().params);
      stage.dataset["view"] = name;
      // For who waits for it. An older call of this says nothing of what a newer one draws.
      if (turn === asked) stage.dataset["shown"] = location.hash;
      requestAnimationFrame(() => performance.mark("tintc:shown", { detail: name }));
    } catch (error) {
      views.delete(name);
      shown = "";
      fill(stage, problem(error));
    }
  };
  window.addEventListener("hashchange", () => void show());
  await show();
}

function skip(event: Event): void {
  event.preventDefault();
  document.getElementById("main")?.focus();
}

function problem(error: unknown): HTMLElement {
  return h("p", { class: "problem", role: "alert" }, message(error));
}

start().catch((error: unknown) => {
  const app = document.getElementById("app");
  if (app) fill(app, problem(error));
});
