"""Train `tiny-opt`, the model that ships with tintc, from plain text files.

    python examples/train_tiny_opt.py --text reviews.txt --text wikitext-2/valid.txt \
        --evaluate wikitext-2/test.txt --output tintc/data/tiny-opt

One line of a text file is one document. A byte-level BPE of 4096 tokens is trained on the same
files; then an OPT (pre-layer-norm, ReLU, learned positions) is trained with AdamW for a given
number of minutes and stored in float16. `--evaluate` prints the perplexity per token on another
file, cut into windows of the model's whole length.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]  # the ids that OPT's own tokenizer gives them
LENGTH = 512


def read_documents(paths: list[Path]) -> list[str]:
    lines = [
        line.strip() for path in paths for line in path.read_text(encoding="utf-8").splitlines()
    ]
    return [line for line in lines if line]


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        documents,
        trainers.BpeTrainer(
            vocab_size=4096,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # OPT starts every text with </s>.
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=LENGTH,
    )


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    rows = tokenizer(documents, verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in row])


@torch.no_grad()
def perplexity(model: OPTForCausalLM, stream: torch.Tensor) -> float:
    model.eval()
    windows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    losses = [
        float(model(input_ids=window, labels=window).loss) * len(window)
        for window in windows.split(16)
    ]
    return math.exp(sum(losses) / len(windows))


def train(
    model: OPTForCausalLM, stream: torch.Tensor, minutes: float, batch: int, peak: float
) -> None:
    """AdamW with a linear warm-up and a cosine decay over the given wall time."""
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
    )
    start, step, seen = time.monotonic(), 0, 0
    while (spent := (time.monotonic() - start) / (60 * minutes)) < 1:
        rate = (
            peak
            * min(1.0, (step + 1) / 100)
            * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * spent)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(stream) - LENGTH, (batch,))
        rows = torch.stack([stream[i : i + LENGTH] for i in starts])
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + rows.numel()
        if step % 50 == 0:
            print(
                json.dumps(
                    {
                        "step": step,
                        "tokens": seen,
                        "loss": round(loss.item(), 3),
                        "done": round(spent, 3),
                    }
                ),
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, action="append", required=True)
    parser.add_argument("--evaluate", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    documents = read_documents(args.text)
    tokenizer = train_tokenizer(documents)
    config = OPTConfig(
        vocab_size=4096,
        hidden_size=160,
        word_embed_proj_dim=160,
        num_hidden_layers=4,
        num_attention_heads=5,
        ffn_dim=640,
        max_position_embeddings=LENGTH,
        activation_function="relu",
        do_layer_norm_before=True,
        dropout=0.0,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    model = OPTForCausalLM(config)
    stream = token_stream(tokenizer, documents)
    print(json.dumps({"parameters": model.num_parameters(), "tokens": len(stream)}), flush=True)
    train(model.train(), stream, args.minutes, args.batch, args.learning_rate)

    model.half().save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    if args.evaluate:  # of the stored float16 weights, computed in float32
        stored = OPTForCausalLM.from_pretrained(args.output, dtype=torch.float32)
        value = perplexity(stored, token_stream(tokenizer, read_documents([args.evaluate])))
        print(json.dumps({"perplexity": round(value, 2), "file": args.evaluate.name}))


if __name__ == "__main__":
    main()
