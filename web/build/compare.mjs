// Whether two built folders are equal. Packed files are compared by what is in them: how well gzip
// packs differs between machines.

import { readdirSync, readFileSync, statSync } from "node:fs";
import { join, relative } from "node:path";
import { gunzipSync } from "node:zlib";

const [built, kept] = process.argv.slice(2);
const files = (root) =>
  readdirSync(root, { recursive: true })
    .map((name) => join(root, name))
    .filter((path) => statSync(path).isFile())
    .map((path) => relative(root, path))
    .sort();
const content = (path) => (path.endsWith(".gz") ? gunzipSync(readFileSync(path)) : readFileSync(path));

const all = [...new Set([...files(built), ...files(kept)])];
const there = (root) => new Set(files(root));
const [new_, old] = [there(built), there(kept)];
const differ = all.filter(
  (name) => !new_.has(name) || !old.has(name) || !content(join(built, name)).equals(content(join(kept, name))),
);
if (differ.length) {
  console.error(`page/static is not what web/ builds: ${differ.join(", ")} differ; run make web and commit`);
  process.exit(1);
}
console.log(`page/static is what web/ builds: ${all.length} files`);
