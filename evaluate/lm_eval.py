"""EleutherAI's lm-evaluation-harness with inner training: any of its tasks, every context trained
on before its continuation is scored.

    python -m tintc.evaluate.lm_eval run --model tintc \\
        --model_args source=tiny-opt,preset=paper,inner_lr=1e-4 \\
        --tasks lambada_openai --batch_size 8

The harness (0.4.13) finds no models of other packages: importing this module registers `tintc`, and
run as above it is the harness's own command line with that model in it. From Python:
`lm_eval.simple_evaluate(model=TintcLM("tiny-opt", inner_lr=1e-4), tasks=[...])`.

What is scored are the harness's own token sequences, cut as its `hf` model cuts them, so with
inner_lr=0 the numbers are those of `hf`.
Legend: B sequences, T tokens, V vocabulary, C tokens of a continuation.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from tintc.compiler.artifact import load
from tintc.compiler.driver import compile as compile_model
from tintc.compiler.frontend.devices import device_of, dtype_of
from tintc.evaluate.lm_eval_requests import (
    Cut,
    continuation_logits,
    cut,
    greedy,
    score,
    stream_settings,
    streamed,
    whole_number,
    windows,
    with_bos,
)
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import InputError, TintcError, UsageError
from tintc.runtime.simulator import Simulator

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models import utils
    from tqdm import tqdm
except ModuleNotFoundError as error:
    kind = SystemExit if __name__ == "__main__" else ImportError
    raise kind(
        f"the lm-evaluation-harness is not installed ({error}); run `pip install 'tintc[lm-eval]'`"
    ) from error

# What generation reads, and what chooses from which tokens one is sampled: the likeliest is always
# among them.
_GREEDY = (
    "until",
    "max_gen_toks",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
)
_COMPILE_OPTIONS = (
    "statistics",
    "backend",
    "share",
    "revision",
    "cache_dir",
    "offline",
    "trust_remote_code",
    "seed",
)


@register_model("tintc")
class TintcLM(TemplateLM):  # type: ignore[misc]
    """A simulator as a model of the harness.

    source: as for `tintc.compile`; or artifact: a directory that `tintc compile` wrote. fields: a
    preset (`paper`), any field of SimulatorConfig and options of `tintc.compile`; of an artifact
    only inner_lr can be changed. At inner_lr 0 nothing is trained.
    batch_size: sequences a call. max_length: tokens that the model reads at most; by default those
    of its config. rolling_context: tokens that each chunk of `loglikelihood_rolling` is
    conditioned, and trained, on at least. protocol: of `loglikelihood_rolling`: split, or stream:
    each chunk is scored, then trained on; chunk, context and keys are then as `StreamSettings` of
    `tintc.runtime.stream_settings` has them. add_bos_token: whether texts start with bos; by
    default as the tokenizer has it. device, dtype: of the weights, by name.

    Raises UsageError for an argument that makes no sense, InputError for a model without tokenizer,
    and what `tintc.compile` and `tintc.load` raise.
    """

    def __init__(
        self,
        source: str | None = None,
        artifact: str | None = None,
        *,
        batch_size: int | str = 1,
        max_length: int | None = None,
        rolling_context: int = 1,
        protocol: str = "split",
        chunk: int | None = None,
        context: int | None = None,
        keys: str | None = None,
        add_bos_token: bool | None = None,
        device: str | None = None,
        dtype: str | None = None,
        **fields: Any,
    ) -> None:
        super().__init__()
        self.batch_size = whole_number("batch_size", batch_size)
        self.simulator = simulator_of(source, artifact, device, dtype, fields).eval()
        self.tokenizer = self.simulator.tokenizer
        if self.tokenizer is None:
            raise InputError(
                f"{source or artifact} has no tokenizer; pass a source that brings one"
            )
        if add_bos_token is not None:
            self.tokenizer = with_bos(self.tokenizer, add_bos_token)
        self.add_bos_token = add_bos_token
        config, longest = (
            self.simulator.source.get("config") or {},
            self.simulator.program.facts.longest,
        )
        usual: int = utils.resolve_max_length(
            SimpleNamespace(**config), self.tokenizer, default=2048
        )
        self.max_length = (
            min(usual, longest or usual)
            if max_length is None
            else whole_number("max_length", max_length, longest)
        )
        self.rolling_context = whole_number("rolling_context", rolling_context, self.max_length)
        cut = {"chunk": chunk, "context": context, "keys": keys}
        self.streams = stream_settings(protocol, cut, longest)
        if self.streams is not None and rolling_context != 1:
            raise UsageError("rolling_context is of protocol split; a stream has a context instead")
        self._device = self.simulator.device

    @property
    def eot_token_id(self) -> int | None:
        """The token that ends a text, if there is one."""
        end: int | None = self.tokenizer.eos_token_id
        return end

    @property
    def prefix_token_id(self) -> int:
        """What stands in front of a text without context: bos, or else eos. Raises InputError for a
        tokenizer that has neither.
        """
        start: int | None = (
            self.eot_token_id
            if self.tokenizer.bos_token_id is None
            else self.tokenizer.bos_token_id
        )
        if start is None:
            raise InputError(
                "this tokenizer has neither a bos nor an eos token to put in front of a text "
                "without context"
            )
        return start

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as the tokenizer's own template writes it. Raises ValueError where it
        has none.
        """
        more = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        return str(self.tokenizer.apply_chat_template(chat_history, tokenize=False, **more))

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokens of a text; by default with the special tokens that the tokenizer adds, or as
        add_bos_token says, unless the text starts with its bos already.
        """
        if add_special_tokens is None:
            start = self.tokenizer.decode([self.prefix_token_id])
            has_one = utils.has_bos_prefix(string, start)
            add_special_tokens = False if has_one else self.add_bos_token
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **options)["input_ids"])

    def _loglikelihood_tokens(
        self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(sum over the continuation's tokens y_i of log softmax(z_i)[y_i], whether every y_i is
        argmax z_i) of each request, in order.

        The context is the training segment: with c tokens of it left after cutting from the left,
        tokens 1 to c - 1 are the targets of the inner steps, and z are the logits under the updated
        weights. A context of one token has no target: z are those of the unmodified model. Requests
        that read and train on the same tokens (the last tokens of short choices) are run once.

        Raises InputError for a continuation without tokens or longer than max_length,
        NumericalError for a sum that is not finite.
        """
        sharing: dict[Cut, list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            sharing.setdefault(
                cut(context or [self.prefix_token_id], continuation, self.max_length), []
            ).append(index)
        longest_first = sorted(sharing, key=lambda sequence: (-len(sequence[0]), sequence))
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(
            total=len(requests), disable=disable_tqdm, desc="Running loglikelihood requests"
        ) as bar:
            for start in range(0, len(longest_first), self.batch_size):
                batch = longest_first[start : start + self.batch_size]
                for sequence, logits_CV in zip(
                    batch, continuation_logits(self.simulator, batch), strict=True
                ):
                    for index in sharing[sequence]:
                        text, _, continuation = requests[index]
                        found[index] = score(logits_CV, continuation)
                        if text is not None:
                            self.cache_hook.add_partial("loglikelihood", text, found[index])
                        bar.update()
        return found

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """log p(text) of each request: the sum over chunks of log p(chunk | tokens in front of it),
        under weights trained on these tokens.

        Chunks are max_length - rolling_context + 1 tokens long. In front of the first is the prefix
        token alone: nothing is trained. Every other is conditioned on the tokens before it, as many
        as max_length leaves room for, and these are the training segment: all but the first of them
        are targets of the inner steps. Each chunk starts from the unmodified weights and is not
        trained on itself.

        With rolling_context 1 chunks and contexts are those of `hf`: only the last chunk of a text
        has more than one token in front of it, and a text of up to max_length tokens trains
        nothing. rolling_context=256 of 512 trains on 256 tokens for all but the first 257; compare
        with inner_lr=0 at the same rolling_context.

        With protocol=stream each text is a document that is scored chunk by chunk and trained on
        as it is read (TINT.md section 8), the prefix token in front.
        """
        texts = [request.args[0] for request in requests]
        if self.streams is not None:
            whole = [[self.prefix_token_id, *self.tok_encode(text)] for text in texts]
            return self._remembered(
                texts, streamed(self.simulator, whole, self.batch_size, self.streams)
            )
        chunks = [
            list(
                windows(
                    self.tok_encode(text),
                    self.prefix_token_id,
                    self.max_length,
                    self.rolling_context,
                )
            )
            for text in texts
        ]
        pairs = [(None, context, chunk) for of_text in chunks for context, chunk in of_text]
        if pairs and self.rolling_context == 1 and float(self.simulator.inner_lr.detach()) != 0:
            trained = sum(len(context) > 1 for _, context, _ in pairs)
            warnings.warn(
                f"{trained} of {len(pairs)} chunks have a context to train on; set rolling_context "
                "for more",
                stacklevel=2,
            )
        parts = iter(self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm))
        return self._remembered(texts, [sum(next(parts)[0] for _ in text) for text in chunks])

    def _remembered(self, texts: list[str], totals: list[float]) -> list[float]:
        """Kept in the harness's cache."""
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The greedy continuation of each context, up to the first stop string, the end token or
        max_gen_toks (256) tokens.

        The weights are trained once on the context, its last max_length - max_gen_toks tokens, and
        stay so while tokens are generated. One context at a time: every sequence has weights of its
        own, so a batch would need as many copies and save nothing. Raises UsageError for settings
        that ask for anything but the likeliest token (temperature 0), or that leave no room for a
        context.
        """
        texts, end = [], self.eot_token_id
        for context, settings in tqdm(
            [request.args for request in requests],
            disable=disable_tqdm,
            desc="Running generate_until requests",
        ):
            count, stops = generation_settings(settings, self.max_length)
            stops = utils.handle_stop_sequences(
                stops, None if end is None else self.tokenizer.decode([end])
            )
            tokens = self.tok_encode(context)[count - self.max_length :] or [self.prefix_token_id]
            made: list[int] = []
            for token in greedy(self.simulator, tokens, count):
                if token == end:
                    break
                made.append(token)
                so_far = self.tokenizer.decode(made)
                if any(stop and stop in so_far for stop in stops):
                    break
            text = utils.postprocess_generated_text(
                self.tokenizer.decode(made, skip_special_tokens=True), stops, None
            )
            self.cache_hook.add_partial("generate_until", (context, settings), text)
            texts.append(text)
        return texts


def simulator_of(
    source: str | None,
    artifact: str | None,
    device: str | None,
    dtype: str | None,
    fields: dict[str, Any],
) -> Simulator:
    """Compiles the source or loads the artifact. Raises UsageError for arguments that fit
    neither.
    """
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        device = None  # the harness's command line says cuda:0 where the user said nothing
    number_type, place = dtype_of(dtype), device_of(device) or "cpu"
    if (source is None) == (artifact is None):
        raise UsageError("pass one of source=MODEL and artifact=DIR in model_args")
    if source is not None:
        options = {name: fields.pop(name) for name in _COMPILE_OPTIONS if name in fields}
        config = SimulatorConfig.preset(fields.pop("preset", "paper"), **fields)
        return compile_model(source, config, dtype=number_type, **options).to(place)
    if unknown := sorted(set(fields) - {"inner_lr"}):
        raise UsageError(
            f"{', '.join(unknown)} cannot be set with artifact, which was compiled already; only "
            "inner_lr can"
        )
    simulator = load(str(artifact), device=place, dtype=number_type)
    if fields:
        simulator.inner_lr.data.fill_(SimulatorConfig.from_dict(fields).inner_lr)
    return simulator


def generation_settings(settings: dict[str, Any], max_length: int) -> tuple[int, list[str]]:
    """(tokens to generate, stop strings). Raises UsageError for settings of a task that greedy
    generation cannot honour.
    """
    read = dict(utils.normalize_gen_kwargs(settings, 256))
    known = _GREEDY[:2] if read["do_sample"] else _GREEDY
    refused = {
        name: value
        for name, value in read.items()
        if name not in known and (name, value) != ("num_beams", 1)
    }
    if refused:
        asked = ", ".join(f"{name}={value!r}" for name, value in refused.items())
        raise UsageError(
            f"generation with {asked}; only greedy generation is there: pass --gen_kwargs "
            "do_sample=False,temperature=0"
        )
    count = whole_number(
        "max_gen_toks", read["max_gen_toks"], max_length - 1
    )  # one token of context at least
    return count, list(read["until"])


def main() -> None:
    """The harness's command line, which now knows the model `tintc`; errors of tintc are one line
    on stderr and its exit codes.
    """
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except TintcError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
