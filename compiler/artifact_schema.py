"""What the JSON files of an artifact may hold: types, lengths and ranges of every value.

An artifact may come from anybody. Nothing of it is used before pydantic has checked it against
these types; what the values mean together is checked in `artifact.py`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, with_config
from typing_extensions import TypedDict

from tintc.ir.config import ActivationGradient, AttentionGradient, LossGradient, NormGradient
from tintc.ir.facts import ModelFacts
from tintc.ir.layout import Layout
from tintc.ir.node_meta import DType, Phase
from tintc.ir.records import NodeRecord

GRAPH, REPORT, WEIGHTS, TOKENIZER = "graph.json", "report.json", "weights.safetensors", "tokenizer"
_TOKENIZER_FILE = re.compile(rf"{TOKENIZER}/(additional_chat_templates/)?\w[\w.-]{{0,99}}")
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)


def _known(name: str) -> str:
    fits = name in (GRAPH, REPORT, WEIGHTS) or (
        _TOKENIZER_FILE.fullmatch(name) is not None and not name.endswith((".py", ".pkl", ".bin"))
    )
    if not fits:
        raise ValueError(f"{name!r} is no file of an artifact")
    return name


Text = Annotated[str, Field(max_length=1000)]
Count = Annotated[int, Field(ge=0, lt=2**31)]
Positive = Annotated[int, Field(ge=1, lt=2**31)]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, AfterValidator(_known)]
# of a config: patterns, betas, a schedule; factors by pattern
Several = Annotated[list[float | Text], Field(max_length=1_000_000)]
Factors = Annotated[dict[Text, float], Field(max_length=10_000)]
# as reports and records have them
Json = Annotated[dict[str, Any], Field(max_length=10_000)]


class Seal(BaseModel):
    """What a file of the artifact is: its size and digest."""

    model_config = _STRICT
    bytes: Annotated[int, Field(ge=0)]
    sha256: Digest


class Origin(BaseModel):
    """`SourceDescription`, as the manifest has it; nothing of a simulator that was made by hand."""

    model_config = _STRICT
    kind: Text | None = None
    name: Text | None = None
    revision: Text | None = None
    sha256: Digest | None = None
    seed: int | None = None
    config: Json | None = None


class Gradients(BaseModel):
    """The fields of a config that decide what a weight's gradient is."""

    model_config = _STRICT
    loss_gradient: LossGradient
    norm_gradient: NormGradient
    activation_gradient: ActivationGradient
    attention_gradient: AttentionGradient
    finite_difference_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Gathered(BaseModel):
    """How the root mean squares of gradients were gathered that `rms` divides by."""

    model_config = _STRICT
    format_version: Literal[1] = 1
    chunk: Positive  # targets of a chunk: C
    context: Count  # tokens before it at most: L
    chunks: Positive
    gradients: Gradients
    weights: Digest  # of the model's numbers, `gradient_statistics.digest_of_weights`
    source: Digest | None  # of its file, where it has one
    dtype: Text  # of the simulator that gathered
    sha256: Digest  # of the root mean squares themselves


class Manifest(BaseModel):
    """manifest.json."""

    model_config = _STRICT
    format_version: Count
    config: dict[Text, bool | Count | float | Text | Several | Factors | None]
    backend: Literal["fused", "transformer"]
    share: Literal["none", "layers", "all"]
    source: Origin
    facts: ModelFacts
    aliases: dict[Text, Text]
    layout: Layout
    statistics: Gathered | None = None
    versions: dict[Text, Text]
    files: Annotated[dict[FileName, Seal], Field(max_length=100)]
    manifest_sha256: Digest


@with_config(_STRICT)
class RecordedInfo(TypedDict):
    """Fields of a NodeInfo that are not what they are by default."""

    dtype: NotRequired[DType]
    module: NotRequired[str]
    source: NotRequired[str]
    parameter: NotRequired[Text]
    buffer: NotRequired[bool]
    slot: NotRequired[Text]
    trainable: NotRequired[bool]
    phase: NotRequired[Phase]
    step: NotRequired[Count]


@with_config(_STRICT)
class Record(TypedDict):
    """A NodeRecord."""

    name: Annotated[str, Field(min_length=1, max_length=1000)]
    kind: Literal["input", "parameter", "call", "output"]
    operator: Text
    args: list[Any]
    kwargs: dict[str, Any]
    shape: list[int | str | list[int | str]]
    info: RecordedInfo


class Graph(BaseModel):
    """graph.json: the stages that `tintc inspect` shows; the lowered one is what runs."""

    model_config = _STRICT
    captured: list[Record]
    canonical: list[Record]
    lowered: list[Record]

    def records(self) -> dict[str, list[NodeRecord]]:
        """By stage."""
        return {
            stage: [NodeRecord(**record) for record in getattr(self, stage)]
            for stage in Graph.model_fields
        }


MANIFEST_SCHEMA = TypeAdapter(Manifest)
GRAPH_SCHEMA = TypeAdapter(Graph)
