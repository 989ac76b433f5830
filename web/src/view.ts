// One of the page's views. It is made once, when it is first asked for, and shown anew whenever the
// URL changes.

import type { Params } from "./route.ts";

export interface View {
  element: HTMLElement;
  show(params: ReadonlyMap<string, string>): void | Promise<void>;
  /** The theme changed: what is drawn on a canvas has to be drawn again. */
  restyle?(): void;
}

export type Changes = Params;
