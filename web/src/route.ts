// Every selection stands in the URL's hash: `#/graph?stage=lowered&node=...`. Views read it and
// change it; the browser's back button and a copied link do the rest.

export interface Route {
  view: string;
  params: ReadonlyMap<string, string>;
}

export type Params = Record<string, string | null | undefined>;

export function parse(hash: string): Route {
  const [path = "", query = ""] = hash.replace(/^#\/?/, "").split("?", 2);
  return { view: path || "graph", params: new Map(new URLSearchParams(query)) };
}

export function href(view: string, params: Params = {}): string {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(params)) if (value) query.set(name, value);
  const text = query.toString();
  return `#/${view}${text ? `?${text}` : ""}`;
}

export function current(): Route {
  return parse(location.hash);
}

/** Changes some parameters of the view and keeps the others; null removes one. */
export function update(changes: Params, { replace = false } = {}): void {
  const now = current();
  go(now.view, { ...Object.fromEntries(now.params), ...changes }, { replace });
}

export function go(view: string, params: Params = {}, { replace = false } = {}): void {
  const to = href(view, params);
  if (to === location.hash) return;
  if (replace) {
    history.replaceState(null, "", to);
    dispatchEvent(new HashChangeEvent("hashchange"));
  } else location.hash = to;
}
