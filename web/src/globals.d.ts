declare const __RUNTIME__: Record<"wasm" | "webgpu", { file: string; bytes: number }>;
