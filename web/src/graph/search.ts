// The search box: nodes whose name, operator or module holds every word.

import { h, fill } from "../dom.ts";
import type { Graph, GraphNode } from "./model.ts";

const SHOWN = 60;

export function find(graph: Graph, text: string): GraphNode[] {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  return graph.nodes.filter((node) => {
    const all = `${node.name} ${node.operator} ${node.module} ${node.slot}`.toLowerCase();
    return words.every((word) => all.includes(word));
  });
}

export interface Search {
  element: HTMLElement;
  input: HTMLInputElement;
  show(graph: Graph, text: string): void;
  close(): void;
}

/** A combobox. asked: the text changed. chosen: a node was picked. */
export function createSearch(asked: (text: string) => void, chosen: (node: GraphNode) => void): Search {
  let found: GraphNode[] = [];
  let active = -1;
  const list = h("ul", { id: "search-list", role: "listbox", "aria-label": "Found nodes", hidden: true });
  const status = h("span", { class: "search-count", role: "status" });
  const input = h("input", {
    type: "search",
    id: "search",
    placeholder: "Search nodes  ( / )",
    autocomplete: "off",
    spellcheck: "false",
    role: "combobox",
    "aria-label": "Search by name, operator or module",
    "aria-expanded": "false",
    "aria-controls": "search-list",
    "aria-autocomplete": "list",
  });

  const open = (shown: boolean) => {
    list.hidden = !shown || !found.length;
    input.setAttribute("aria-expanded", String(!list.hidden));
    if (list.hidden) input.removeAttribute("aria-activedescendant");
  };
  const activate = (at: number) => {
    active = at;
    [...list.children].forEach((option, place) => {
      option.setAttribute("aria-selected", String(place === at));
      if (place === at) {
        input.setAttribute("aria-activedescendant", option.id);
        option.scrollIntoView({ block: "nearest" });
      }
    });
  };
  const pick = (at: number) => {
    const node = found[at];
    if (!node) return;
    open(false);
    chosen(node);
  };
  const render = () => {
    fill(
      list,
      found.slice(0, SHOWN).map((node, at) =>
        h(
          "li",
          {
            id: `found-${at}`,
            role: "option",
            "aria-selected": "false",
            onmousedown: (event) => event.preventDefault(),
            onclick: () => pick(at),
          },
          h("span", { class: "mono" }, node.name),
          h("span", { class: "soft" }, node.operator),
        ),
      ),
    );
    active = -1;
  };

  input.addEventListener("input", () => {
    asked(input.value);
    open(true);
  });
  input.addEventListener("focus", () => open(true));
  input.addEventListener("blur", () => open(false));
  input.addEventListener("keydown", (event) => {
    const shown = Math.min(found.length, SHOWN);
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      open(true);
      if (shown) activate((active + (event.key === "ArrowDown" ? 1 : shown - (active < 0 ? 0 : 1))) % shown);
    } else if (event.key === "Enter") pick(Math.max(active, 0));
    else if (event.key === "Escape") {
      event.stopPropagation();
      if (list.hidden) {
        input.value = "";
        asked("");
      } else open(false);
    }
  });

  return {
    element: h("div", { class: "search" }, input, status, list),
    input,
    show(graph, text) {
      if (input.value !== text) input.value = text;
      found = find(graph, text);
      status.textContent = text.trim() ? (found.length ? `${found.length} found` : "none found") : "";
      render();
      if (!found.length) open(false);
    },
    close: () => open(false),
  };
}
