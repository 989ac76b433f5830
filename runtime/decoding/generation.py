"""Hugging Face's `generate` over an adapted simulator.

A `GenerationMixin` asks a model for logits and a cache; this is as much of a model as it asks for.
Its cache goes by the name that the installed transformers gives it: `cache`, or `past_key_values`
before that. Legend: R rows, T tokens of them, V vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tintc.ir.errors import InputError
from tintc.runtime.compiled import Compiled
from tintc.runtime.decoding.cache import AdaptedCache
from tintc.runtime.decoding.program import Decoder
from tintc.runtime.uncached import uncached


class Adapted(Protocol):
    """What is asked of `tintc.runtime.adapted.Adapted`."""

    @property
    def simulator(self) -> Compiled: ...

    def __call__(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *,
        logits_to_keep: int | Tensor = 0,
    ) -> Any: ...  # fmt: skip

    def new_cache(self, rows: int) -> AdaptedCache: ...

    def checked_cache(self, cache: object, rows: int) -> AdaptedCache: ...

    def check_cached(self) -> None: ...

    def decoder(self, rows: int) -> Decoder: ...

    def read_on(
        self, decoder: Callable[[int], Decoder], input_ids: Tensor, attention_mask: Tensor | None,
        position_ids: Tensor | None, logits_to_keep: int | Tensor, cache: AdaptedCache | None,
    ) -> Tensor: ...  # fmt: skip


# The name of a cache among a model's arguments and results.
_CACHE = (
    "cache"
    if "cache" in signature(GenerationMixin.prepare_inputs_for_generation).parameters
    else "past_key_values"
)


# Whether `generate` says how many tokens are new; older ones always give all of the text.
_TELLS_NEW = (
    "next_sequence_length" in signature(GenerationMixin.prepare_inputs_for_generation).parameters
)


class _Generator(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """What `generate` calls. The program for R rows is bound at the first of its tokens."""

    main_input_name = "input_ids"

    def __init__(self, adapted: Adapted, config: PreTrainedConfig) -> None:
        config._attn_implementation = "eager"  # attention is the program's own
        super().__init__(config)
        self.adapted = adapted
        self.generation_config = GenerationConfig.from_model_config(config)
        self._decoder: tuple[int, Decoder] | None = None

    @property
    def device(self) -> torch.device:
        return self.adapted.simulator.device

    @property
    def dtype(self) -> torch.dtype:
        return self.adapted.simulator.dtype

    @classmethod
    def can_generate(cls) -> bool:
        return True

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *further: Any
    ) -> None:
        """A cache of its own, for all beams and continuations. further: kind of generation, rows of
        the prompt, ...
        """
        if model_kwargs.get(_CACHE) is not None:
            self.adapted.check_cached()
        elif generation_config.use_cache is not False and self._caches:
            each = max(
                generation_config.num_beams or 1, generation_config.num_return_sequences or 1
            )
            model_kwargs[_CACHE] = self.adapted.new_cache(each * further[1])

    def _validate_generated_length(
        self, generation_config: GenerationConfig, input_ids_length: int, *further: Any
    ) -> None:
        """Before anything is generated: the last token is not looked at."""
        longest = self.adapted.simulator.program.facts.longest
        if longest is not None and input_ids_length > longest:
            raise InputError(
                f"the prompt has {input_ids_length} tokens; this model has {longest} positions: "
                "cut the prompt"
            )
        super()._validate_generated_length(generation_config, input_ids_length, *further)
        if longest is not None and generation_config.max_length > longest + 1:
            raise InputError(
                f"the prompt has {input_ids_length} tokens, and up to "
                f"{generation_config.max_length - input_ids_length} more are asked for; this model "
                f"has {longest} positions: expected max_new_tokens of at most "
                f"{longest + 1 - input_ids_length}"
            )

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, next_sequence_length: int | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """The tokens that the cache does not hold yet."""
        cache, new = kwargs.get(_CACHE), next_sequence_length
        if cache is not None and not _TELLS_NEW:
            new = input_ids.shape[1] - cache.get_seq_length()
        if cache is not None and new is not None:
            if new < 1:
                raise InputError(
                    f"the cache holds {cache.get_seq_length()} tokens and the text has "
                    f"{input_ids.shape[1]}; expected a text that goes on behind the cache"
                )
            input_ids = input_ids[:, -new:]
        return {
            "input_ids": input_ids,
            "attention_mask": kwargs.get("attention_mask"),
            _CACHE: cache,
            "use_cache": kwargs.get("use_cache", True),
            "logits_to_keep": kwargs.get("logits_to_keep", 0),
        }

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: object = None,
        past_key_values: object = None,
        use_cache: bool = True,
        logits_to_keep: int | Tensor = 0,
        **further: Any,
    ) -> CausalLMOutputWithPast:
        """As `generate` calls a model. cache goes by either name."""
        given = past_key_values if cache is None else cache
        if not (use_cache and self._caches):
            found = self.adapted(input_ids, attention_mask, logits_to_keep=logits_to_keep)
            return CausalLMOutputWithPast(logits=found.logits)
        rows = len(input_ids)
        own = (
            self.adapted.new_cache(rows)
            if given is None
            else self.adapted.checked_cache(given, rows)
        )
        logits = self.adapted.read_on(
            self._bound, input_ids, attention_mask, None, logits_to_keep, own
        )
        return CausalLMOutputWithPast(logits=logits, **{_CACHE: own})

    @property
    def _caches(self) -> bool:
        return not uncached(self.adapted.simulator)

    def _bound(self, rows: int) -> Decoder:
        if self._decoder is None or self._decoder[0] != rows:
            self._decoder = rows, self.adapted.decoder(rows)
        return self._decoder[1]


def generator(adapted: Adapted) -> _Generator:
    """A model as `generate` asks for, with the auxiliary model's own config."""
    reason = uncached(adapted.simulator)
    if reason:
        warnings.warn(f"every new token reads the whole text anew: {reason}", stacklevel=3)
    return _Generator(adapted, model_config(adapted))


def model_config(adapted: Adapted) -> PreTrainedConfig:
    """The config that the auxiliary model came with, or a plain one of what is known of it."""
    described = dict(getattr(adapted.simulator, "source", {}).get("config") or {})
    known = described.get("model_type")
    if known in CONFIG_MAPPING:
        return CONFIG_MAPPING[known].from_dict(described)
    facts = adapted.simulator.program.facts
    return PreTrainedConfig(
        vocab_size=facts.vocab_size,
        hidden_size=facts.hidden,
        num_hidden_layers=facts.blocks,
        max_position_embeddings=facts.longest,
    )
