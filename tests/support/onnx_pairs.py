"""An exported pair as a user calls it: plain numpy and onnxruntime, nothing of tintc's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

Array = np.ndarray[Any, Any]
_TYPES = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16,
}  # fmt: skip


def session(path: Path) -> onnxruntime.InferenceSession:
    quiet = onnxruntime.SessionOptions()
    quiet.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), quiet)


class PlainPair:
    """bounded: of windows, only as many keys are kept as they see."""

    def __init__(self, folder: Path, *, bounded: bool) -> None:
        self.train, self.decode = (session(folder / f"{n}.onnx") for n in ("adapt", "decode"))
        about = json.loads((folder / "pair.json").read_text())
        self.windows = {
            each["name"]: each["window"] for each in about["cache"] if bounded and each["window"]
        }
        self.outputs = [value.name for value in self.decode.get_outputs()]

    def adapt(self, rate: float, **feed: Array) -> dict[str, Array]:
        (kind,) = (v.type for v in self.train.get_inputs() if v.name == "inner_lr")
        names = [value.name for value in self.train.get_outputs()]
        values = self.train.run(names, {**feed, "inner_lr": np.array(rate, _TYPES[kind])})
        return dict(zip(names, values, strict=True))

    def read(self, updates: dict[str, Array], ids: Array, mask: Array, parts: list[int]) -> Array:
        """(R, T, V) logits of a text that is read in parts. mask: 0 at padding in front."""
        past = {
            value.name: np.zeros(
                (len(ids), *(n if isinstance(n, int) else 0 for n in value.shape[1:])),
                _TYPES[value.type],
            )
            for value in self.decode.get_inputs()
            if value.name.startswith("past_key_values.")
        }
        found, start = [], 0
        for size in parts:
            stop = start + size
            positions = np.maximum(mask[:, :stop].cumsum(1) - 1, 0)[:, start:]
            feed = {
                "input_ids": ids[:, start:stop],
                "position_ids": positions,
                "attention_mask": mask[:, :stop],
            }
            values = self.decode.run(self.outputs, {**feed, **updates, **past})
            found.append(values[0])
            past = {
                name.replace("present", "past_key_values"): self._kept(name, value)
                for name, value in zip(self.outputs[1:], values[1:], strict=True)
            }
            start = stop
        assert start == ids.shape[1]
        return np.concatenate(found, 1)

    def _kept(self, name: str, value: Array) -> Array:
        window = self.windows.get(name.removeprefix("present."))
        if window is None or value.shape[-2] < window:
            return value
        return value[..., value.shape[-2] - (window - 1) :, :]
