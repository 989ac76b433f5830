// The model runs here, so that the page stays free while it does. One thread, which works from any
// file server: more need headers that few servers send.

import type { InferenceSession } from "onnxruntime-web";

import { message } from "../text.ts";
import { generate } from "./decoding.ts";
import type { Reply, Request, Scores, Text } from "./messages.ts";
import { fetchBytes, feeds, open, type Runtime } from "./session.ts";

type Load = Extract<Request, { kind: "load" }>;
type Generate = Extract<Request, { kind: "generate" }>;

interface State {
  runtime: Runtime;
  base: string;
  provider: string;
  double: boolean;
  model: InferenceSession;
  pair: Promise<[InferenceSession, InferenceSession]> | null;
}

let state: State | null = null;
let stopped = 0; // requests up to this one are to end
// onnxruntime runs one call at a time.
let queue: Promise<unknown> = Promise.resolve();

const worker = self as unknown as {
  postMessage(reply: Reply): void;
  onmessage: (event: MessageEvent<Request>) => void;
};

worker.onmessage = ({ data }) => {
  if (data.kind === "stop") {
    stopped = data.id;
    return;
  }
  queue = queue.then(() => answer(data));
};

async function answer(request: Exclude<Request, { kind: "stop" }>): Promise<void> {
  const { id } = request;
  try {
    const value =
      request.kind === "load"
        ? await load(request)
        : request.kind === "score"
          ? await score(request.text)
          : await tokens(request);
    worker.postMessage({ kind: "done", id, value });
  } catch (error) {
    worker.postMessage({ kind: "failed", id, message: message(error) });
  }
}

function counter(id: number, total: number, what: string): (bytes: number) => void {
  let done = 0;
  return (bytes) => {
    done += bytes;
    worker.postMessage({ kind: "progress", id, done, total, what });
  };
}

async function load(request: Load): Promise<void> {
  const { base, provider, runtime: file } = request;
  const library =
    provider === "webgpu" ? await import("onnxruntime-web/webgpu") : await import("onnxruntime-web/wasm");
  const progress = counter(request.id, file.bytes + request.bytes, "fetching");
  const { env } = library;
  env.logLevel = "error";
  env.wasm.numThreads = 1;
  const binary = fetchBytes(new URL(file.file, base).href, progress);
  const runtime = library as unknown as Runtime;
  env.wasm.wasmBinary = (await binary).buffer as ArrayBuffer;
  const model = await open(runtime, base, request.model, provider, progress);
  state = { runtime, base, provider, double: request.double, model, pair: null };
}

function loaded(): State {
  if (!state) throw new Error("the model is not loaded");
  return state;
}

async function score(text: Text): Promise<Scores> {
  const { runtime, model, double } = loaded();
  const start = performance.now();
  const found = await model.run(feeds(runtime, model, text, double));
  const milliseconds = performance.now() - start;
  const numbers = (name: string) => Float32Array.from(found[name]?.data as Float32Array);
  return { before: numbers("initial_losses"), after: numbers("losses"), milliseconds };
}

async function tokens(request: Generate): Promise<number> {
  const { runtime, base, provider, double } = loaded();
  const now = state as State;
  if (!now.pair) {
    const progress = counter(request.id, request.bytes, "fetching");
    const both = [request.train, request.decode].map((file) => open(runtime, base, file, provider, progress));
    now.pair = Promise.all(both) as Promise<[InferenceSession, InferenceSession]>;
    now.pair.catch(() => (now.pair = null)); // asked again, it is tried again
  }
  const [train, decode] = await now.pair;
  const start = performance.now();
  const asked = { ...request, double, stopped: () => stopped >= request.id };
  for await (const token of generate(runtime, train, decode, asked)) {
    worker.postMessage({ kind: "token", id: request.id, token });
    await new Promise((next) => setTimeout(next)); // a wish to stop is heard between tokens
  }
  return performance.now() - start;
}
