// onnxruntime: files fetched with progress, sessions, and tensors from plain numbers.

import type { InferenceSession, Tensor } from "onnxruntime-web";

import type { ModelFile, Text } from "./messages.ts";

export interface Runtime {
  InferenceSession: typeof InferenceSession;
  Tensor: typeof Tensor;
}

export type Feeds = Record<string, Tensor>;
export type Progress = (bytes: number) => void;

/** A file's bytes. progress: is told of each part as it comes. */
export async function fetchBytes(url: string, progress: Progress): Promise<Uint8Array> {
  const response = await fetch(url);
  if (!response.ok || !response.body) {
    throw new Error(`${url} cannot be read: ${response.status} ${response.statusText}`);
  }
  const parts: Uint8Array[] = [];
  let size = 0;
  const reader = response.body.getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    parts.push(part.value);
    size += part.value.length;
    progress(part.value.length);
  }
  const whole = new Uint8Array(size);
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

const files = new Map<string, Promise<Uint8Array>>();

/** A session of a model and the files beside it, each of which is fetched once. */
export async function open(
  runtime: Runtime,
  base: string,
  model: ModelFile,
  provider: string,
  progress: Progress,
): Promise<InferenceSession> {
  const beside = model.external.map(async ({ path }) => {
    let found = files.get(path);
    if (!found) {
      found = fetchBytes(new URL(path, base).href, progress);
      files.set(path, found);
    }
    // A model names its files relative to itself.
    return { path: path.slice(path.lastIndexOf("/") + 1), data: await found };
  });
  const [bytes, ...externalData] = await Promise.all([
    fetchBytes(new URL(model.url, base).href, progress),
    ...beside,
  ]);
  return runtime.InferenceSession.create(bytes as Uint8Array, {
    executionProviders: [provider],
    logSeverityLevel: 3, // warnings of the optimizer are no errors of the page
    externalData: externalData as { path: string; data: Uint8Array }[],
  });
}

export function integers(runtime: Runtime, values: number[], dims: number[]): Tensor {
  return new runtime.Tensor("int64", BigInt64Array.from(values, BigInt), dims);
}

/** What a call of one text takes: of optional inputs, those that the model has, saying nothing. */
export function feeds(runtime: Runtime, session: InferenceSession, text: Text, double: boolean): Feeds {
  const { ids, trained, rate } = text;
  const row = [1, ids.length];
  const ones = ids.map(() => 1);
  const known: Record<string, () => Tensor> = {
    input_ids: () => integers(runtime, ids, row),
    labels: () => integers(runtime, ids, row),
    train_mask: () => integers(runtime, ids.map((_, at) => Number(at < trained)), row),
    loss_mask: () => integers(runtime, ones, row),
    attention_mask: () => integers(runtime, ones, row),
    position_ids: () => integers(runtime, ids.map((_, at) => at), row),
    inner_lr: () =>
      double
        ? new runtime.Tensor("float64", Float64Array.of(rate), [])
        : new runtime.Tensor("float32", Float32Array.of(rate), []),
  };
  const made: Feeds = {};
  for (const name of session.inputNames) {
    const make = known[name];
    if (!make) throw new Error(`the model takes ${name}, which this page does not know`);
    made[name] = make();
  }
  return made;
}
