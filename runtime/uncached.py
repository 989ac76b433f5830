"""Whether keys of earlier tokens can be kept."""

from __future__ import annotations

from tintc.runtime.compiled import Compiled


def uncached(simulator: Compiled) -> str:
    """Why no keys of earlier tokens can be kept; nothing where they can."""
    if simulator.structure is not None:
        return "the transformer back end has no cache; compile with backend='fused'"
    island = simulator.program.facts.ordered
    if island:
        return (
            f"the island in {island} looks at other tokens or at positions, whose values no cache "
            "keeps"
        )
    attention = simulator.program.facts.by_length
    if attention:
        return (
            f"the rotary frequencies of {attention} depend on the length of the text, so that keys "
            "of a shorter one are others"
        )
    return ""
