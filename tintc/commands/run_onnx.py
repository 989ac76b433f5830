"""tintc run MODEL.onnx: the same as `tintc run DIR`, by onnxruntime and tokenizers alone; torch is
never imported.

Without training the model's logits are those of a learning rate of 0.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tintc.commands import console
from tintc.commands.showing import Showing
from tintc.commands.text import Reading, check_loss, check_rest, mean_of_rest, outcome, show
from tintc.ir.config import SimulatorConfig
from tintc.ir.errors import ArtifactError, InputError, UsageError

if TYPE_CHECKING:
    import numpy as np

_OWN = {"input_ids", "train_mask", "inner_lr"}


class Model:
    """An exported model and its tokenizer. Raises ArtifactError for a file that is none, UsageError
    for one of more inputs.
    """

    def __init__(self, path: Path) -> None:
        import onnxruntime
        from tokenizers import Tokenizer

        path = path.expanduser()
        if not path.is_file():
            raise ArtifactError(f"{path} does not exist; tintc export DIR --onnx {path} writes it")
        try:
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime has a class for every status
            raise ArtifactError(
                f"{path} cannot be read as an ONNX model: {' '.join(str(error).split())[:200]}"
            ) from error
        self.about: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        self.types = {value.name: value.type for value in self.session.get_inputs()}
        if "tintc.stream" in self.about:
            raise UsageError(
                f"{path} is the program of one window of a stream, which its caller runs chunk by "
                "chunk (docs/guides/onnx.md); tintc run takes what tintc export writes without "
                "--stream"
            )
        if "tintc.pair" in self.about:
            raise UsageError(
                f"{path} is one of a pair's two models; tintc run takes their folder, {path.parent}"
            )
        if "tintc.version" not in self.about or not set(self.types) >= _OWN:
            raise ArtifactError(f"{path} is no simulator; expected a model that tintc export wrote")
        if "logits" not in [value.name for value in self.session.get_outputs()]:
            raise UsageError(f"{path} has no output logits; export it with that output")
        if "tokenizer.json" not in self.about:
            raise InputError(
                f"{path} holds no tokenizer (its source had none); call it from onnxruntime with "
                "token ids"
            )
        self.tokenizer = Tokenizer.from_str(self.about["tokenizer.json"])
        longest = self.about.get("tintc.max_tokens")
        self.longest = None if longest is None else int(longest)

    def logits(self, ids: np.ndarray, trained: int, inner_lr: float) -> np.ndarray:
        """(T, V) of one sequence, (1, T), after training on its first tokens."""
        import numpy as np

        tokens = ids.shape[1]
        columns = np.arange(tokens)
        feed: dict[str, Any] = {
            "input_ids": ids,
            "train_mask": (columns < trained).astype(np.int64)[None],
            "inner_lr": np.array(
                inner_lr, np.float64 if "double" in self.types["inner_lr"] else np.float32
            ),
            "loss_mask": np.ones_like(ids),
            "attention_mask": np.ones(
                (1, tokens, tokens) if self._of_pairs() else (1, tokens), np.int64
            ),
            "position_ids": columns[None].astype(np.int64),
            "labels": np.full_like(ids, -100),
        }
        found: np.ndarray = self.session.run(["logits"], {name: feed[name] for name in self.types})[
            0
        ]
        wide: np.ndarray = found[0].astype(np.float64)
        return wide

    def decode(self, ids: list[int]) -> str:
        """The text, special tokens included."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def _of_pairs(self) -> bool:
        return any(
            value.name == "attention_mask" and len(value.shape) == 3
            for value in self.session.get_inputs()
        )


def run(path: Path, asked: Reading, showing: Showing, *, as_json: bool) -> None:
    """Prints the perplexity of the untrained part before and after, and what the updated weights
    generate.
    """
    import numpy as np

    prompt = asked.prompt()
    model = Model(path)
    rate = float(model.about["tintc.inner_lr"]) if asked.inner_lr is None else asked.inner_lr
    found = asked.ids(prompt, lambda text: model.tokenizer.encode(text).ids, model.longest)
    ids = np.array([found], np.int64)
    tokens = ids.shape[1]
    trained = asked.trained(tokens)
    predicted = check_rest(tokens, trained, asked.generate)
    before, after = (_losses(model.logits(ids, trained, used), ids[0]) for used in (0.0, rate))
    mean_after = mean_of_rest(after, trained)
    check_loss(mean_after, rate)
    config = SimulatorConfig.from_dict(json.loads(model.about["tintc.config"]))
    result = outcome(
        config,
        rate,
        tokens=tokens,
        trained=trained,
        predicted=predicted,
        before=mean_of_rest(before, trained),
        after=mean_after,
    )
    told = showing.told(found, model.decode, trained, before, after)
    result |= told.values()
    if asked.generate:
        result["generated"] = _generate(model, ids, trained, rate, asked.generate)
    show(result, as_json)
    if not as_json:
        told.print()


def _losses(logits_TV: np.ndarray, ids_T: np.ndarray) -> list[float]:
    """-log p of tokens 1, 2, ..."""
    from tintc.commands.said import surprise

    found: list[float] = surprise(logits_TV[:-1], ids_T[1:]).tolist()
    return found


def _generate(model: Model, ids: np.ndarray, trained: int, rate: float, count: int) -> str:
    """Greedy continuation until `count` tokens, the end token or the last position. The whole
    sequence runs for every token.
    """
    import numpy as np

    start, limit = ids.shape[1], math.inf if model.longest is None else model.longest
    end = model.about.get("tintc.eos_token_id")
    with console.stages(count) as stage:
        while ids.shape[1] < min(start + count, limit):
            stage(f"generating token {ids.shape[1] - start + 1}")
            token = int(model.logits(ids, trained, rate)[-1].argmax())
            if end is not None and token == int(end):
                break
            ids = np.concatenate([ids, [[token]]], 1)
    return str(model.tokenizer.decode(ids[0, start:].tolist(), skip_special_tokens=True))
