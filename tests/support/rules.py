"""Inner rules for tests: each alone, and hypothesis strategies of those that do not contradict."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import Any

from hypothesis import strategies as st

from tintc.ir.config import SimulatorConfig

# Small enough that five steps with momentum do not run away from a toy.
RATE = 0.002

# Each rule alone, and its fields together where section 7 gives them an order.
ALONE: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.7, "nesterov": True},
    "linear": {"schedule": "linear"},
    "cosine": {"schedule": "cosine"},
    "clip": {"clip_norm": 0.5},
    "normalize": {"normalize": "weight"},
    "decay": {"decay": 0.2},
    "drift": {"max_drift": 0.002},
    "scales": {"lr_scale": {"*": 2.0, "*.0.*": 0.25, "*.1.*": 0.5}},
    "frozen": {"lr_scale": {"*.1.*": 0.0}},
    "adam": {"optimizer": "adam"},
    "muon": {"optimizer": "muon"},
    "clipped momentum": {"clip_norm": 0.5, "momentum": 0.9, "decay": 0.1, "max_drift": 0.002},
    "scaled adam": {"optimizer": "adam", "schedule": "cosine", "decay": 0.1, "max_drift": 0.002},
    "muon with momentum": {"optimizer": "muon", "momentum": 0.9, "nesterov": True, "decay": 0.1},
}

# Patterns that leave other weights to train, whichever of them have factor 0. A model is asked for
# those alone that match one of its parameters.
SCALED = ("*.bias", "*.0.*", "*norm*", "*ln_*", "*attn*")
TRAINED = ("*.1.*", "*mlp*", "*fc1*", "*.bias", "*attn*weight", "*norm*", "*")


@st.composite
def rules(draw: st.DrawFn, names: Collection[str]) -> SimulatorConfig:
    """An exact config with any fields of section 7 that do not contradict; but for `rms`, which
    needs a file, and `train`. names: of the model's parameters.
    """
    scaled = [each for each in SCALED if any(fnmatchcase(name, each) for name in names)]
    optimizer = draw(st.sampled_from(("sgd", "sgd", "sgd", "adam", "muon")))
    normalize = draw(st.sampled_from(("none", "none", "weight")))
    momentum = 0.0 if optimizer == "adam" else draw(st.sampled_from((0.0, 0.3, 0.9)))
    clipped = normalize == "none" and optimizer != "muon"
    count = draw(st.integers(1, 5))
    factors = st.tuples(*[st.sampled_from((0.25, 1.0, 1.5, -0.5))] * count)
    scale = st.tuples(st.sampled_from(scaled), st.sampled_from((0.0, 0.3, 2.0)))
    return SimulatorConfig.exact(
        inner_lr=RATE,
        steps=count,
        layers=draw(st.sampled_from((None, None, 1))),
        optimizer=optimizer,
        normalize=normalize,
        momentum=momentum,
        nesterov=momentum > 0 and draw(st.booleans()),
        clip_norm=draw(st.sampled_from((None, 0.3, 100.0))) if clipped else None,
        schedule=draw(st.sampled_from(("constant", "linear", "cosine")) | factors),
        lr_scale=tuple(draw(st.lists(scale, max_size=3))),
        decay=draw(st.sampled_from((0.0, 0.0, 0.1, 1.0 if count > 1 else 0.5))),
        max_drift=draw(st.sampled_from((None, 1e-3, 10.0))),
        betas=draw(st.sampled_from(((0.9, 0.999), (0.5, 0.8)))),
        eps=draw(st.sampled_from((1e-8, 1e-3))),
    )
