// What the page and the worker tell each other.

import type { ExternalFile } from "../data.ts";

export interface ModelFile {
  url: string;
  external: ExternalFile[];
}

export interface Text {
  ids: number[];
  trained: number;
  rate: number;
}

export type Request =
  | { kind: "load"; id: number; base: string; runtime: { file: string; bytes: number }; provider: string; model: ModelFile; bytes: number; double: boolean }
  | { kind: "score"; id: number; text: Text }
  | { kind: "generate"; id: number; train: ModelFile; decode: ModelFile; bytes: number; text: Text; count: number; longest: number | null; end: number | null }
  | { kind: "stop"; id: number };

export type Reply =
  | { kind: "progress"; id: number; done: number; total: number; what: string }
  | { kind: "token"; id: number; token: number }
  | { kind: "done"; id: number; value: unknown }
  | { kind: "failed"; id: number; message: string };

/** before, after: -log p of the next token at each position; the last has none. */
export interface Scores {
  before: Float32Array;
  after: Float32Array;
  milliseconds: number;
}
