// Light or dark: as the system says, until the reader chooses.

import { h } from "./dom.ts";

const KEY = "tintc-theme";

export function createThemeButton(changed: () => void): HTMLElement {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const now = () => document.documentElement.dataset["theme"] ?? (dark.matches ? "dark" : "light");
  const stored = read();
  if (stored) document.documentElement.dataset["theme"] = stored;
  const button = h("button", { type: "button", class: "theme", onclick: () => flip() });
  const label = () => {
    const other = now() === "dark" ? "light" : "dark";
    button.textContent = now() === "dark" ? "☀" : "☾";
    button.setAttribute("aria-label", `Use the ${other} theme`);
    button.title = `Use the ${other} theme`;
  };
  const flip = () => {
    const next = now() === "dark" ? "light" : "dark";
    document.documentElement.dataset["theme"] = next;
    write(next);
    label();
    changed();
  };
  dark.addEventListener("change", () => {
    label();
    changed();
  });
  label();
  return button;
}

// Storage is refused in some frames and private windows; the theme then lasts as long as the page.
function read(): string | null {
  try {
    return localStorage.getItem(KEY);
  } catch {
    return null;
  }
}

function write(value: string): void {
  try {
    localStorage.setItem(KEY, value);
  } catch {
    // see above
  }
}
