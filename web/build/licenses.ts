// licenses.txt: name, version and licence of every package of which the bundle holds a line.

import { readFileSync, readdirSync } from "node:fs";
import { join } from "node:path";

import type { Plugin } from "vite";

const LICENCE = /^(licen[cs]e|copying|notice)(\.|-|$)/i;
// Packages of which no module is seen: in workers, or helpers that the bundler adds.
const INSIDE = ["onnxruntime-web", "onnxruntime-common", "@dagrejs/graphlib", "rolldown", "vite"];
// onnxruntime's npm packages hold no licence; these are of its repository.
const ONNXRUNTIME = ["onnxruntime-LICENSE.txt", "onnxruntime-ThirdPartyNotices.txt"];
const OF_BUILD_TOOLS = "# Licenses of bundled dependencies"; // what vite holds, and does not ship

export function licenses(): Plugin {
  let root = "";
  return {
    name: "tintc-licenses",
    configResolved(config) {
      root = config.root;
    },
    generateBundle() {
      const folders = new Set(INSIDE.map((name) => join(root, "node_modules", name)));
      for (const id of this.getModuleIds()) {
        const found = /^\0?(.*\/node_modules\/(?:@[^/]+\/)?[^/]+)\//.exec(id)?.[1];
        if (found) folders.add(found);
      }
      const texts = [...folders].map((folder) => about(root, folder));
      texts.sort((a, b) => (a.name < b.name ? -1 : 1));
      const source = texts.map((one) => one.text).join(`\n${"=".repeat(78)}\n\n`);
      this.emitFile({ type: "asset", fileName: "licenses.txt", source });
    },
  };
}

function about(root: string, folder: string): { name: string; text: string } {
  const { name, version, license } = JSON.parse(readFileSync(join(folder, "package.json"), "utf8"));
  const files = readdirSync(folder).filter((file) => LICENCE.test(file));
  const texts = files.sort().map((file) => read(join(folder, file)));
  if (name === "onnxruntime-web") {
    texts.push(...ONNXRUNTIME.map((file) => read(join(root, "build", file))));
  }
  if (!texts.length && name !== "onnxruntime-common") throw new Error(`${name} has no licence`);
  if (!texts.length) texts.push("See onnxruntime-web, of the same repository.");
  return { name, text: `${name} ${version} (${license})\n\n${texts.join("\n\n")}\n` };
}

function read(path: string): string {
  const text = readFileSync(path, "utf8").replaceAll("\r\n", "\n");
  return (text.split(OF_BUILD_TOOLS)[0] ?? "").trim();
}
