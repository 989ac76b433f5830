// onnxruntime's programs for the browser: written beside the bundle, packed, and never into it. The
// page fetches one on the first run; which one and how large it is, the bundle knows.

import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";

import type { Plugin } from "vite";

const DIST = fileURLToPath(new URL("../node_modules/onnxruntime-web/dist/", import.meta.url));
const FILES = {
  wasm: "ort-wasm-simd-threaded.wasm",
  webgpu: "ort-wasm-simd-threaded.asyncify.wasm",
};

const entry = (name: string) => ({ file: `runtime/${name}`, bytes: readFileSync(DIST + name).length });

export const RUNTIME = { wasm: entry(FILES.wasm), webgpu: entry(FILES.webgpu) };

/** The library names its .wasm by URL: the bundler would copy it, unpacked, to assets/. */
export function withoutWasm(): Plugin {
  return {
    name: "tintc-without-wasm",
    generateBundle(_options, bundle) {
      for (const name of Object.keys(bundle)) if (name.endsWith(".wasm")) delete bundle[name];
    },
  };
}

export function runtime(): Plugin {
  return {
    name: "tintc-runtime",
    generateBundle() {
      for (const name of Object.values(FILES)) {
        const packed = gzipSync(readFileSync(DIST + name), { level: 9 });
        packed[9] = 255; // of which system packed it, gzip says nothing: the same bytes everywhere
        this.emitFile({ type: "asset", fileName: `runtime/${name}.gz`, source: packed });
      }
    },
  };
}
