// What `tintc page` writes into data/ (web/README.md says the fields), and how it is fetched.

export type Stage = string;
export type Change = "same" | "changed" | "new";

export interface Site {
  format: number;
  title: string;
  tintc: string;
  summary: [string, string][];
  stages: Stage[];
  default_stage: Stage;
  views: { graph: boolean; slots: boolean; cost: boolean; run: { available: boolean; reason: string | null } };
  steps: number;
}

export interface GraphFile {
  stage: Stage;
  strings: string[];
  nodes: {
    name_s: number[];
    operator_s: number[];
    kind_s: number[];
    phase_s: number[];
    step: number[];
    module_s: number[];
    source_s: number[];
    shape_s: number[];
    dtype_s: number[];
    slot_s: number[];
    memory_s: number[];
    trainable: number[];
    args_s: number[];
    flops: number[];
    bytes: number[];
    change_s: number[];
    group: number[];
  };
  edges: { from: number[]; to: number[] };
  removed: number;
  note: string;
  groups: { path: string; parent: number; label: string; block: number }[];
}

export type Operators = Record<string, { formula: string; meaning: string; family: string }>;

export interface Tile {
  page: number;
  tokens: [number, number];
  groups: number;
  coordinates: [number, number];
}

export interface PrefixSlot {
  name: string;
  parameter: string;
  shape: string;
  numbers: number;
  updated: boolean;
  trainable: boolean;
  tiles: Tile[];
  padding: number;
  read_at: number[];
  written_at: number[];
  path: number[];
}

export interface MemorySlot {
  name: string;
  first: number;
  size: number;
  from: number;
  until: number;
  kept: boolean;
}

export interface Slots {
  layout: {
    prefix_tokens: number;
    sim_hidden: number;
    sim_heads: number;
    pages: number;
    memory_width: number;
  };
  program: { name: string; lane: string }[];
  prefix: PrefixSlot[];
  memory: MemorySlot[];
  occupancy: { prefix: number; memory_peak: number };
}

export interface Cost {
  parameters: {
    backend: string;
    auxiliary: number;
    total: number;
    parts: { name: string; count: number; formula: string }[];
  };
  auxiliary: { name: string; count: number; kind: string }[];
  call: { batch: number; tokens: number; trained: number };
  phases: { lane: string; operator: string; flops: number; bytes: number; calls: number }[];
  flops: number;
  direct_flops: number;
  lower_bound: { flops: number; text: string };
  weight_bytes: number;
  peak_bytes: number;
}

export interface ExternalFile {
  path: string;
  bytes: number;
}

export interface Pair {
  train: string;
  decode: string;
  external?: ExternalFile[];
  bytes?: number;
  eos_token_id?: number | null;
}

export interface Run {
  model: string;
  external: ExternalFile[];
  bytes: number;
  inputs: Record<string, unknown>;
  outputs: string[];
  max_tokens: number | null;
  inner_lr: number;
  vocab: number;
  dtype: string;
  tokenizer: string;
  tokenizer_config: string;
  prepend: number[];
  examples: { name: string; text: string }[];
  pair: Pair | null;
}

const loaded = new Map<string, Promise<unknown>>();

/** A file of data/, fetched once. Raises an error of one line that names the file. */
export function load<T>(name: string): Promise<T> {
  let found = loaded.get(name);
  if (!found) {
    found = fetchJson(`data/${name}.json`);
    loaded.set(name, found);
  }
  return found as Promise<T>;
}

export async function fetchJson(url: string): Promise<unknown> {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url} cannot be read: ${response.status} ${response.statusText}`);
  try {
    return await response.json();
  } catch {
    throw new Error(`${url} is no JSON: write the page again with tintc page`);
  }
}
