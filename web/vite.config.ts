import { defineConfig } from "vite";

import { licenses } from "./build/licenses.ts";
import { RUNTIME, runtime, withoutWasm } from "./build/runtime.ts";

// Fixed names, no hashes: the bundle is checked in, and a change of one file is a change of one file.
// A view is named by its folder.
const names = {
  entryFileNames: "assets/[name].js",
  chunkFileNames: (chunk: { facadeModuleId?: string | null }) => {
    const view = /\/src\/(\w+)\/view\.ts$/.exec(chunk.facadeModuleId ?? "")?.[1];
    return `assets/${view ?? "[name]"}.js`;
  },
};

export default defineConfig({
  base: "./",
  define: { __RUNTIME__: JSON.stringify(RUNTIME) },
  plugins: [withoutWasm(), runtime(), licenses()],
  worker: { format: "es", plugins: () => [withoutWasm()], rolldownOptions: { output: names } },
  build: {
    outDir: process.env["TINTC_WEB_OUT"] ?? "../page/static",
    emptyOutDir: true,
    target: "es2022",
    modulePreload: { polyfill: false },
    chunkSizeWarningLimit: 1500,
    rolldownOptions: { output: { ...names, assetFileNames: "assets/[name][extname]" } },
  },
});
