// Text to tokens and back, by Hugging Face's tokenizers for browsers.

import { Tokenizer } from "@huggingface/tokenizers";

import { fetchJson, type Run } from "../data.ts";

export interface Reader {
  encode(text: string): number[];
  decode(ids: number[]): string;
  /** What each token adds to the text. */
  pieces(ids: number[]): string[];
}

const UNKNOWN = "\uFFFD"; // what an unfinished character decodes to
const LONGEST = 8; // tokens that one character can take

export async function loadTokenizer(run: Run): Promise<Reader> {
  const [file, config] = await Promise.all([fetchJson(run.tokenizer), fetchJson(run.tokenizer_config)]);
  const tokenizer = new Tokenizer(file as object, config as object);
  const decode = (ids: number[]) => (ids.length ? tokenizer.decode(ids, { clean_up_tokenization_spaces: false }) : "");
  return {
    encode: (text) => [...run.prepend, ...tokenizer.encode(text, { add_special_tokens: false }).ids],
    decode,
    pieces: (ids) => pieces(ids, decode),
  };
}

/** Some characters take several tokens: the first of these shows it, the others a dot. */
function pieces(ids: number[], decode: (ids: number[]) => string): string[] {
  const found: string[] = [];
  for (let at = 0; at < ids.length; ) {
    let length = 1;
    let text = decode(ids.slice(at, at + 1));
    while (text.includes(UNKNOWN) && length < LONGEST && at + length < ids.length) {
      length += 1;
      text = decode(ids.slice(at, at + length));
    }
    if (text.includes(UNKNOWN)) {
      length = 1;
      text = decode(ids.slice(at, at + 1));
    }
    found.push(text, ...Array<string>(length - 1).fill("·"));
    at += length;
  }
  return found;
}
