// The theme's colour of a lane, by its name.

export function laneTone(name: string): "before" | "forward" | "backward" | "descent" | "last" {
  if (name === "last forward") return "last";
  const phase = name.split(" ").at(-1);
  return phase === "forward" || phase === "backward" || phase === "descent" ? phase : "before";
}
