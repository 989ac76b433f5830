// Generation by an exported pair: one model trains on the text, the other goes on from it, a token a
// call, with cached keys and values (docs/guides/onnx.md says their inputs and outputs).

import type { InferenceSession, Tensor } from "onnxruntime-web";

import type { Text } from "./messages.ts";
import { type Feeds, feeds, integers, type Runtime } from "./session.ts";

const PAST = "past_key_values.";
const PRESENT = "present.";
const KEEP = "logits_to_keep";

export interface Asked {
  text: Text;
  count: number;
  longest: number | null;
  end: number | null;
  double: boolean;
  stopped(): boolean;
}

/** The most probable tokens behind the text, one by one. */
export async function* generate(
  runtime: Runtime,
  train: InferenceSession,
  decode: InferenceSession,
  asked: Asked,
): AsyncGenerator<number> {
  const updates = await train.run(feeds(runtime, train, asked.text, asked.double));
  let past = empty(runtime, decode);
  // An input with a default is none for onnxruntime-web: then all logits come, and the last count.
  const keeps = decode.inputNames.includes(KEEP);
  const keep: Feeds = keeps ? { [KEEP]: integers(runtime, [1], []) } : {};
  let fresh = asked.text.ids;
  let seen = 0;
  const most = Math.min(asked.count, (asked.longest ?? Infinity) - fresh.length);
  for (let made = 0; made < most; made += 1) {
    const all = seen + fresh.length;
    const found = await decode.run({
      ...(updates as Feeds),
      ...past,
      input_ids: integers(runtime, fresh, [1, fresh.length]),
      position_ids: integers(runtime, fresh.map((_, at) => seen + at), [1, fresh.length]),
      attention_mask: integers(runtime, Array<number>(all).fill(1), [1, all]),
      ...keep,
    });
    seen = all;
    past = passed(found as Feeds);
    const logits = found["logits"] as Tensor;
    const token = largest((logits.data as Float32Array).subarray(-(logits.dims.at(-1) ?? 0)));
    if (token === asked.end || asked.stopped()) return;
    yield token;
    fresh = [token];
  }
}

/** Keys and values of no tokens: rows first; the other size that has a name is that of tokens. */
function empty(runtime: Runtime, decode: InferenceSession): Feeds {
  const found: Feeds = {};
  for (const value of decode.inputMetadata) {
    if (!value.name.startsWith(PAST) || !value.isTensor) continue;
    const dims = value.shape.map((size, axis) => (axis === 0 ? 1 : typeof size === "number" ? size : 0));
    found[value.name] = new runtime.Tensor(value.type as "float32", new Float32Array(0), dims);
  }
  return found;
}

function passed(outputs: Feeds): Feeds {
  const found: Feeds = {};
  for (const [name, value] of Object.entries(outputs)) {
    if (name.startsWith(PRESENT)) found[PAST + name.slice(PRESENT.length)] = value;
  }
  return found;
}

function largest(logits: Float32Array): number {
  let best = 0;
  for (let at = 1; at < logits.length; at += 1) {
    if ((logits[at] as number) > (logits[best] as number)) best = at;
  }
  if (!Number.isFinite(logits[best])) {
    throw new Error("the logits are not finite: the learning rate is too large, choose a smaller one");
  }
  return best;
}
