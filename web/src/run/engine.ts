// The page's side of the worker: calls that answer with promises.

import type { ExternalFile, Run } from "../data.ts";
import type { ModelFile, Reply, Request, Scores, Text } from "./messages.ts";

export type Provider = "wasm" | "webgpu";
export type Progress = (done: number, total: number) => void;
type Without<T> = T extends unknown ? Omit<T, "id"> : never;

interface Waiting {
  resolve(value: unknown): void;
  reject(error: Error): void;
  progress: Progress;
  token: (token: number) => void;
}

export class Engine {
  private worker: Worker | null = null;
  private provider: Provider | null = null;
  private readonly waiting = new Map<number, Waiting>();
  private last = 0;

  constructor(private readonly run: Run) {}

  get loaded(): Provider | null {
    return this.provider;
  }

  /** Bytes that the first run fetches. */
  size(provider: Provider): number {
    return __RUNTIME__[provider].bytes + this.run.bytes;
  }

  async load(provider: Provider, progress: Progress): Promise<void> {
    if (this.provider === provider) return;
    this.worker?.terminate();
    this.provider = null;
    this.worker = new Worker(new URL("./worker.ts", import.meta.url), { type: "module", name: "model" });
    this.worker.onmessage = ({ data }: MessageEvent<Reply>) => this.hear(data);
    this.worker.onerror = (event) => this.fail(event.message || "the worker could not be started");
    const runtime = __RUNTIME__[provider];
    const model = { url: this.run.model, external: this.run.external };
    const about = { runtime, provider, model, bytes: this.run.bytes, double: this.run.dtype === "float64" };
    await this.ask({ kind: "load", base: document.baseURI, ...about }, progress);
    this.provider = provider;
  }

  score(text: Text): Promise<Scores> {
    return this.ask({ kind: "score", text }) as Promise<Scores>;
  }

  /** Milliseconds of all of it. token: is told of each. */
  generate(
    text: Text,
    count: number,
    token: (token: number) => void,
    progress: Progress,
  ): Promise<number> {
    const { pair, max_tokens: longest } = this.run;
    if (!pair) return Promise.reject(new Error("this page holds no pair to generate with"));
    const external: ExternalFile[] = pair.external ?? [];
    const file = (url: string): ModelFile => ({ url, external });
    const bytes = pair.bytes ?? external.reduce((sum, one) => sum + one.bytes, 0);
    const end = pair.eos_token_id ?? null;
    const both = { train: file(pair.train), decode: file(pair.decode), bytes };
    return this.ask({ kind: "generate", ...both, text, count, longest, end }, progress, token) as Promise<number>;
  }

  stop(): void {
    this.worker?.postMessage({ kind: "stop", id: this.last } satisfies Request);
  }

  private ask(
    request: Without<Request>,
    progress: Progress = () => undefined,
    token: (token: number) => void = () => undefined,
  ): Promise<unknown> {
    const id = (this.last += 1);
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject, progress, token });
      this.worker?.postMessage({ ...request, id } as Request);
    });
  }

  private hear(reply: Reply): void {
    const waiting = this.waiting.get(reply.id);
    if (!waiting) return;
    if (reply.kind === "progress") waiting.progress(reply.done, reply.total);
    else if (reply.kind === "token") waiting.token(reply.token);
    else {
      this.waiting.delete(reply.id);
      if (reply.kind === "done") waiting.resolve(reply.value);
      else waiting.reject(new Error(reply.message));
    }
  }

  private fail(text: string): void {
    for (const waiting of this.waiting.values()) waiting.reject(new Error(text));
    this.waiting.clear();
    this.worker?.terminate();
    this.worker = null;
    this.provider = null;
  }
}
