// Numbers of one run. losses[t] is -log p of token t + 1, as the simulator reports it.

import type { Scores } from "./messages.ts";

export interface Outcome {
  tokens: number;
  trained: number;
  predicted: number; // tokens behind the trained part that have a loss
  before: number; // perplexity of these
  after: number;
  milliseconds: number;
}

export function outcome(scores: Scores, tokens: number, trained: number): Outcome {
  const first = Math.max(trained, 1) - 1;
  const rest = (losses: Float32Array) => mean(losses.subarray(first, tokens - 1));
  const [before, after] = [rest(scores.before), rest(scores.after)];
  if (!Number.isFinite(before) || !Number.isFinite(after)) {
    throw new Error("the losses are not finite: the learning rate is too large, choose a smaller one");
  }
  const predicted = tokens - 1 - first;
  return { tokens, trained, predicted, before: Math.exp(before), after: Math.exp(after), milliseconds: scores.milliseconds };
}

function mean(values: Float32Array): number {
  let sum = 0;
  for (const value of values) sum += value;
  return values.length ? sum / values.length : 0;
}

/** The largest of most values: a few outliers do not take the colours from the others. */
export function scale(values: Float32Array, least: number): number {
  const sorted = [...values].map(Math.abs).sort((a, b) => a - b);
  return Math.max(least, sorted[Math.floor(0.97 * (sorted.length - 1))] ?? 0);
}
