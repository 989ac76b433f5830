"""A compiled simulator where a command takes a model: its model is taken, and its config is where
the options start.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tintc.compiler.artifact_files import is_artifact
from tintc.ir.config import PRESETS, SimulatorConfig


@dataclass(frozen=True)
class Compiled:
    """config: with the rate that the simulator has now. dtype: of its weights. blocks: of its
    model.
    """

    config: SimulatorConfig
    backend: str
    share: str
    dtype: str
    blocks: int

    def construction(self) -> dict[str, Any]:
        return {"backend": self.backend, "share": self.share}

    def over_preset(self) -> dict[str, Any]:
        """The config as the preset that comes nearest, the fields that differ, and the rate."""
        fields = self.config.to_dict()
        presets = {preset: SimulatorConfig.preset(preset).to_dict() for preset in PRESETS}
        differing = {
            preset: {
                name: value
                for name, value in fields.items()
                # `train` takes the place of norm_update
                if value != plain[name] and not (name == "norm_update" and self.config.train)
            }
            for preset, plain in presets.items()
        }
        preset = min(PRESETS, key=lambda name: len(differing[name]))
        return {"preset": preset, **differing[preset], "inner_lr": fields["inner_lr"]}

    def budget(self, depth: int) -> str | None:
        """Its layers, in parts of a model that is `depth` blocks deep, and steps, as LxS; None
        where no whole number of parts stands for its layers, or patterns chose what it trains.
        """
        if self.config.train or not self.blocks:
            return None
        layers = self.config.layers or self.blocks
        part = max(1, round(depth * layers / self.blocks))
        stands = max(1, round(self.blocks * part / depth)) == layers
        return f"{part}x{self.config.steps}" if stands else None


def compiled(source: str) -> Compiled | None:
    """None for any other source. Raises ArtifactError for a damaged artifact."""
    root = Path(source).expanduser()
    if not is_artifact(root):
        return None
    from tintc.compiler.artifact_reader import read_manifest, read_report
    from tintc.compiler.frontend.kinds import kind_of

    if kind_of(source) != "artifact":  # tiny-opt is the bundled model, whatever lies here
        return None
    manifest, report = read_manifest(root), read_report(root)
    config = SimulatorConfig.from_dict(manifest.config)
    return Compiled(
        dataclasses.replace(config, inner_lr=report["inner_lr"]),
        manifest.backend,
        manifest.share,
        report["dtype"],
        manifest.facts.blocks,
    )
