// The same graph as a tree beside the canvas (ARIA's tree pattern), for the keyboard and for screen
// readers. Only what is open has elements.

import { fill, h } from "../dom.ts";
import type { Graph, Group } from "./model.ts";
import { isOpen } from "./rows.ts";
import { shortOperator } from "./runs.ts";

interface Entry {
  id: string;
  level: number;
  group: Group | null; // of a group
  node: number; // of a node
  open: boolean;
}

export interface Outline {
  element: HTMLElement;
  show(graph: Graph, open: ReadonlySet<string>, selected: number | null): void;
}

export function createOutline(toggle: (group: Group) => void, select: (node: number) => void): Outline {
  const tree = h("div", { role: "tree", "aria-label": "Modules and nodes", class: "tree" });
  let entries: Entry[] = [];
  let focused = "";

  const rows = () => [...tree.children] as HTMLElement[];
  const focus = (at: number) => {
    const row = rows()[Math.max(0, Math.min(at, entries.length - 1))];
    if (!row) return;
    for (const each of rows()) each.tabIndex = -1;
    row.tabIndex = 0;
    row.focus();
    focused = row.dataset["entry"] ?? "";
  };
  const act = (entry: Entry) => (entry.group ? toggle(entry.group) : select(entry.node));

  tree.addEventListener("click", (event) => {
    const row = (event.target as HTMLElement).closest<HTMLElement>("[role=treeitem]");
    const entry = entries.find((one) => one.id === row?.dataset["entry"]);
    if (!entry) return;
    focused = entry.id;
    act(entry);
  });
  tree.addEventListener("keydown", (event) => {
    const at = entries.findIndex((entry) => entry.id === focused);
    const entry = entries[at];
    if (!entry) return;
    const above = () => entries.findLastIndex((one, place) => place < at && one.level < entry.level);
    const moves: Record<string, () => void> = {
      ArrowDown: () => focus(at + 1),
      ArrowUp: () => focus(at - 1),
      Home: () => focus(0),
      End: () => focus(entries.length - 1),
      Enter: () => act(entry),
      " ": () => act(entry),
      ArrowRight: () => (entry.group && !entry.open ? toggle(entry.group) : focus(at + 1)),
      ArrowLeft: () => (entry.group && entry.open ? toggle(entry.group) : focus(above())),
    };
    const move = moves[event.key];
    if (!move || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    move();
  });

  return {
    element: tree,
    show(graph, open, selected) {
      const held = tree.contains(document.activeElement);
      entries = list(graph, open);
      if (!entries.some((entry) => entry.id === focused)) focused = entries[0]?.id ?? "";
      fill(tree, entries.map((entry) => line(graph, entry, selected, focused)));
      if (held) focus(entries.findIndex((entry) => entry.id === focused));
    },
  };
}

function list(graph: Graph, open: ReadonlySet<string>): Entry[] {
  const found: Entry[] = [];
  const walk = (index: number, level: number) => {
    const group = graph.groups[index];
    if (!group || !group.size) return;
    const opened = isOpen(graph, group, open);
    found.push({ id: `g${index}`, level, group, node: -1, open: opened });
    if (!opened) return;
    for (const child of group.children) walk(child, level + 1);
    for (const node of group.children.length ? [] : group.nodes) {
      found.push({ id: `n${node}`, level: level + 1, group: null, node, open: false });
    }
  };
  for (const root of graph.roots) walk(root, 1);
  return found;
}

function line(graph: Graph, entry: Entry, selected: number | null, focused: string): HTMLElement {
  const node = graph.nodes[entry.node];
  const common = {
    role: "treeitem",
    "aria-level": entry.level,
    "data-entry": entry.id,
    tabindex: entry.id === focused ? 0 : -1,
    style: { "--level": String(entry.level) },
  };
  if (entry.group) {
    return h(
      "div",
      { ...common, "aria-expanded": String(entry.open), class: "branch" },
      h("span", { class: "twist", "aria-hidden": "true" }, entry.open ? "▾" : "▸"),
      h("span", { class: "name" }, entry.group.label || entry.group.path),
      h("span", { class: "soft" }, entry.group.size),
    );
  }
  return h(
    "div",
    { ...common, "aria-selected": String(entry.node === selected), class: "leaf" },
    h("span", { class: "name" }, node ? shortOperator(node.operator) : ""),
    h("span", { class: "soft" }, graph.lanes[node?.lane ?? 0]?.name ?? ""),
  );
}
