"""Fine-tunes a model inside onnxruntime and prints the perplexity before and after. Neither torch
nor transformers is needed.

tintc compile tiny-opt -o tiny && tintc export tiny --onnx tiny.onnx
python examples/onnx_fine_tune.py tiny.onnx examples/paragraph.txt
"""

import sys

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def main(model: str, file: str) -> None:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    about = session.get_modelmeta().custom_metadata_map
    with open(file, encoding="utf-8") as text:
        ids = np.array(
            [Tokenizer.from_str(about["tokenizer.json"]).encode(text.read().strip()).ids]
        )
    trained = (
        ids.shape[1] // 2
    )  # the first half of the tokens is trained on, the second half predicted
    train_mask = (np.arange(ids.shape[1]) < trained).astype(np.int64)[None]
    for name, rate in (("before", 0.0), ("after", float(about["tintc.inner_lr"]))):
        inputs = {
            "input_ids": ids,
            "train_mask": train_mask,
            "inner_lr": np.array(rate, np.float32),
        }
        logits = session.run(["logits"], inputs)[0][0, trained - 1 : -1]
        logits -= logits.max(-1, keepdims=True)
        losses = np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(logits)), ids[0, trained:]]
        print(f"perplexity {name:7} {np.exp(losses.mean()):.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
