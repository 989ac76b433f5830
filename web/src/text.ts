// Numbers as people read them.

const THOUSANDS = new Intl.NumberFormat("en");

export function count(value: number): string {
  return THOUSANDS.format(value);
}

export function short(value: number): string {
  return scaled(value, 1000, ["", " K", " M", " G", " T", " P"]);
}

export function flops(value: number): string {
  return scaled(value, 1000, [" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP"]);
}

export function bytes(value: number): string {
  return scaled(value, 1000, [" B", " kB", " MB", " GB", " TB"]);
}

export function plural(value: number, noun: string): string {
  return `${count(value)} ${noun}${value === 1 ? "" : "s"}`;
}

export function percent(share: number): string {
  return `${(100 * share).toFixed(1)} %`;
}

/** Three digits that count: 12345 -> 12.3 K. */
function scaled(value: number, base: number, units: string[]): string {
  let power = 0;
  let rest = value;
  while (Math.abs(rest) >= base && power < units.length - 1) {
    rest /= base;
    power += 1;
  }
  const digits = power === 0 ? (Number.isInteger(rest) ? 0 : 2) : rest >= 100 ? 0 : rest >= 10 ? 1 : 2;
  return rest.toFixed(digits) + (units[power] ?? "");
}

/** The end of a long name is what tells it from others. */
export function tail(text: string, most: number): string {
  return text.length <= most ? text : `…${text.slice(text.length - most + 1)}`;
}

/** One line of whatever was thrown. */
export function message(error: unknown): string {
  const text = error instanceof Error ? error.message : String(error);
  return text.split(/\s+/).join(" ").slice(0, 300);
}
