// The model, trained in this page: a text, its trained part, a learning rate, and what they change.

import { load, type Run, type Site } from "../data.ts";
import { fill, h } from "../dom.ts";
import { current, update } from "../route.ts";
import { bytes, count, message } from "../text.ts";
import type { View } from "../view.ts";
import { createControls } from "./controls.ts";
import { Engine, type Provider } from "./engine.ts";
import { createGeneration } from "./generation.ts";
import { outcome } from "./losses.ts";
import type { Scores } from "./messages.ts";
import { createResult } from "./result.ts";
import { loadTokenizer, type Reader } from "./tokenizer.ts";
import { type Colouring, COLOURINGS, createTokens } from "./tokens.ts";

const LONGEST_IN_URL = 1500; // characters of a text
const QUICK = 2500; // milliseconds of a run that is repeated whenever a setting changes
const PAUSE = 200; // milliseconds without a change before that

export function createRunView(site: Site): View {
  if (site.views.run.available) return new RunView();
  const reason = site.views.run.reason ?? "This page was written without the model.";
  const element = h(
    "section",
    { class: "page", "aria-label": "Run" },
    h("div", { class: "card" }, h("h2", {}, "The model cannot run in this page"), h("p", {}, reason)),
  );
  return { element, show: () => undefined };
}

class RunView implements View {
  readonly element = h("section", { class: "page run-view", "aria-label": "Run" });
  private started: Promise<void> | null = null;
  private run!: Run;
  private reader!: Reader;
  private engine!: Engine;
  private readonly tokens = createTokens((trained, done) => this.setTrained(trained, done));
  private readonly result = createResult((by) => update({ by: by === "change" ? null : by }));
  private controls!: ReturnType<typeof createControls>;
  private generation!: ReturnType<typeof createGeneration>;
  private text = "";
  private ids: number[] = [];
  private trained = 0;
  private rate = 0;
  private scores: Scores | null = null;
  private busy = false;
  private again = false; // a setting changed while the model ran
  private timer = 0;

  async show(params: ReadonlyMap<string, string>): Promise<void> {
    await (this.started ??= this.start()); // once, however often the URL changes meanwhile
    const example = this.run.examples.find((one) => one.name === params.get("example"));
    const text = params.get("text") ?? example?.text ?? (this.text || (this.run.examples[0]?.text ?? ""));
    if (text !== this.text) this.setText(text, readNumber(params.get("trained")));
    const trained = readNumber(params.get("trained"));
    if (trained !== null && trained !== this.trained) this.setTokens(trained);
    this.rate = readNumber(params.get("lr")) ?? this.run.inner_lr;
    this.controls.show(this.text, this.rate, this.facts());
    this.recolour();
  }

  private async start(): Promise<void> {
    this.run = await load<Run>("run");
    this.reader = await loadTokenizer(this.run);
    this.engine = new Engine(this.run);
    this.controls = createControls(this.run, {
      text: (text) => {
        this.setText(text, null);
        this.remember();
        this.controls.show(this.text, this.rate, this.facts());
      },
      rate: (rate, done) => {
        this.rate = rate;
        if (done) update({ lr: rate === this.run.inner_lr ? null : String(rate) }, { replace: true });
        this.changed();
      },
      run: () => void this.score(),
      provider: () => this.controls.show(this.text, this.rate, this.facts()),
    });
    this.generation = createGeneration(this.run, this.reader, this.engine, () => ({
      text: { ids: this.ids, trained: this.trained, rate: this.rate },
      provider: this.controls.provider(),
    }));
    fill(
      this.element,
      this.controls.element,
      h(
        "div",
        { class: "card" },
        this.result.head,
        h("p", { class: "hint soft", id: "handle-hint" }, HINT),
        this.tokens.element,
        this.result.foot,
      ),
      this.run.pair ? this.generation.element : null,
    );
  }

  private setText(text: string, trained: number | null): void {
    this.text = text;
    const all = this.reader.encode(text);
    this.ids = this.run.max_tokens === null ? all : all.slice(0, this.run.max_tokens);
    this.controls.cut(all.length, this.ids.length);
    this.setTokens(trained ?? Math.floor(this.ids.length / 2));
  }

  private setTokens(trained: number): void {
    this.trained = Math.min(trained, this.ids.length);
    this.tokens.show(this.ids, this.reader.pieces(this.ids), this.trained);
    this.stale();
  }

  private setTrained(trained: number, done: boolean): void {
    this.trained = trained;
    this.controls.show(this.text, this.rate, this.facts());
    if (done) update({ trained: String(trained) }, { replace: true });
    this.changed();
  }

  private remember(): void {
    const example = this.run.examples.find((one) => one.text === this.text);
    const short = this.text.length <= LONGEST_IN_URL ? this.text : null;
    const text = example ? null : short;
    update({ example: example?.name ?? null, text, trained: null }, { replace: true });
  }

  private facts(): string {
    const rest = this.ids.length - this.trained;
    const fetched = this.engine.loaded === this.controls.provider() ? "" : bytes(this.engine.size(this.controls.provider()));
    this.controls.fetches(fetched);
    return `${count(this.ids.length)} tokens: ${count(this.trained)} trained on, ${count(rest)} predicted`;
  }

  private stale(): void {
    this.scores = null;
    this.result.clear();
    this.tokens.colour(null, this.by());
  }

  /** Runs again by itself where that is quick. */
  private changed(): void {
    this.result.old();
    clearTimeout(this.timer);
    const quick = this.scores && this.scores.milliseconds < QUICK && this.engine.loaded;
    if (quick) this.timer = window.setTimeout(() => void this.score(), PAUSE);
  }

  private async score(): Promise<void> {
    if (this.busy) {
      this.again = true;
      return;
    }
    const text = { ids: this.ids, trained: this.trained, rate: this.rate };
    if (text.ids.length < 2) return this.result.fail("The text has fewer than two tokens: write more.");
    if (text.trained >= text.ids.length) {
      return this.result.fail("Everything is trained on: leave some tokens to predict.");
    }
    this.busy = true;
    this.controls.busy(true);
    try {
      const provider: Provider = this.controls.provider();
      await this.engine.load(provider, (done, total) => this.controls.progress(done, total));
      this.controls.progress(0, 0);
      const scores = await this.engine.score(text);
      const found = outcome(scores, text.ids.length, text.trained);
      if (text.ids === this.ids) {
        this.scores = scores;
        this.result.show(found);
        this.recolour();
        // The trained part or the rate may have been set anew since: the figures are not of these.
        if (text.trained !== this.trained || text.rate !== this.rate) this.changed();
      }
    } catch (error) {
      this.scores = null;
      this.tokens.colour(null, this.by());
      this.result.fail(message(error));
    } finally {
      this.busy = false;
      this.controls.busy(false);
      this.controls.show(this.text, this.rate, this.facts());
      if (this.again) {
        this.again = false;
        void this.score();
      }
    }
  }

  private by(): Colouring {
    const by = current().params.get("by") as Colouring;
    return COLOURINGS.includes(by) ? by : "change";
  }

  private recolour(): void {
    this.result.by(this.by());
    this.tokens.colour(this.scores, this.by());
  }
}

const HINT =
  "Drag the handle, or move it with the arrow keys: the model trains on what stands in front of it " +
  "and predicts what stands behind.";

function readNumber(text: string | undefined): number | null {
  const value = Number(text);
  return text && Number.isFinite(value) && value >= 0 ? value : null;
}
