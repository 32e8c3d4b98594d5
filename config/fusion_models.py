"""Typed settings of the fusion models; `config.train` holds them as ``model``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

from pydantic import Field, model_validator

from common.post import Stream
from config.section import PositiveInt, Section

ModelName: TypeAlias = Literal[
    "token_transformer",
    "concat_mlp",
    "concat_se",
    "gmu",
    "nextvlad_se",
    "attention_lstm",
    "mbt",
    "ml_decoder",
    "late",
    "linear_probe",
    "knn",
    "tag_text",
]
DEFAULT_MODEL: Final[ModelName] = "ml_decoder"
"""Above `mbt` by over two standard errors where posts are few, never below it, and where order
tells in a sixth of its time: docs/models.md."""
Share = Annotated[float, Field(ge=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]


class TokenLimits(Section):
    """Most tokens of each stream; text keeps its beginning, the others are thinned evenly."""

    video: PositiveInt = 64
    video_lstm: PositiveInt = 4
    """One for each video of a post."""
    image: PositiveInt = 16
    audio: PositiveInt = 64
    text: PositiveInt = 128
    ocr: PositiveInt = 64
    asr: PositiveInt = 64


class TokenTransformerSettings(Section):
    """Projected tokens of all modalities through one small transformer."""

    width: PositiveInt = 192
    layers: PositiveInt = 3
    heads: PositiveInt = 4
    dropout: Share = 0.1
    motion: bool = True
    """Tokens of video and audio also carry their change from the token before."""


class ConcatMlpSettings(Section):
    """Mean of each modality's tokens, joined, through plain layers."""

    modality_width: PositiveInt = 256
    width: PositiveInt = 512
    layers: PositiveInt = 2
    """Hidden layers behind the concatenation."""
    dropout: Share = 0.5


class NextVladSettings(Section):
    """NeXtVLAD: soft assignment of frames to learned clusters, in groups."""

    clusters: PositiveInt = 32
    """K; the published model has 128. Sound takes half of them."""
    groups: PositiveInt = 8
    """G; sound takes half of them."""
    expansion: PositiveInt = 2
    """λ: how much wider a frame is made before it is cut into groups."""


class ConcatSeSettings(Section):
    """One vector of each modality, joined, with a squeeze-and-excitation gate."""

    modality_width: PositiveInt = 256
    width: PositiveInt = 512
    reduction: PositiveInt = 8
    dropout: Share = 0.5
    pooling: Literal["mean", "nextvlad"] = "mean"
    """Pooling of the tokens of video and sound into one vector; the others take their mean."""
    nextvlad: NextVladSettings = NextVladSettings()


class GmuSettings(Section):
    """Gated multimodal unit: learned gates weigh the modalities that are there."""

    width: PositiveInt = 256
    dropout: Share = 0.3


class NextVladSeSettings(Section):
    """NeXtVLAD of every modality, joined, with a squeeze-and-excitation gate."""

    width: PositiveInt = 512
    """H; the published model has 2048."""
    reduction: PositiveInt = 8
    dropout: Share = 0.5
    nextvlad: NextVladSettings = NextVladSettings()


class AttentionLstmSettings(Section):
    """A bidirectional LSTM with attention for each modality, joined by two layers.

    The published model has 1024, 512, 8192 and 4096.
    """

    projection: PositiveInt = 256
    hidden: PositiveInt = 128
    """Of one direction."""
    join: PositiveInt = 1024
    width: PositiveInt = 512
    dropout: Share = 0.5


class MbtSettings(Section):
    """Bottleneck transformer: modalities exchange what they know through a few shared tokens."""

    width: PositiveInt = 192
    layers: PositiveInt = 4
    fusion_layers: PositiveInt = 2
    """The last of the layers, in which modalities share the bottleneck tokens."""
    heads: PositiveInt = 4
    bottlenecks: PositiveInt = 4
    dropout: Share = 0.1
    stochastic_depth: Share = 0.1
    """Chance that the last layer is skipped for a post in training; less for those before it."""
    motion: bool = True
    """Tokens of video and audio also carry their change from the token before."""

    @model_validator(mode="after")
    def _layers(self) -> MbtSettings:
        if self.fusion_layers > self.layers:
            raise ValueError(f"fusion_layers {self.fusion_layers} are more than layers")
        return self


class MlDecoderSettings(Section):
    """Queries that stand for groups of classes look at the tokens of all modalities.

    The published model has width 768 and a feed-forward of 2048.
    """

    width: PositiveInt = 192
    heads: PositiveInt = 8
    feed_forward: PositiveInt = 512
    queries: PositiveInt = 100
    """At most; with fewer classes each has its own."""
    dropout: Share = 0.1
    motion: bool = True
    """Tokens of video and audio also carry their change from the token before."""


class LateSettings(Section):
    """A linear head for each modality, each trained alone; their logits are averaged.

    With one modality this is a linear probe.
    """

    dropout: Share = 0.1


class LinearProbeSettings(Section):
    """Logistic regression over the modalities' mean vectors, solved at once: for little data."""

    penalties: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (
        0.3,
        0.1,
        0.03,
    )
    """Of the squared weights. Each gives one solution, an epoch of the run; the one with the best
    GAP in validation is kept, without validation the last."""
    alone: bool = False
    """Each modality also has a probe of its own; the score is the mean of theirs and of the one of
    all. Where new posts come from other authors than those of the training, tags are ranked better;
    docs/benchmarks.md."""
    unit: bool = False
    """Each post's vector of a modality has length 1, as in cosines; else posts have length 1 on
    average, and one whose vector is long counts for more."""
    start: Path | None = None
    """A bundle of `insighttag zeroshot`: the penalty then pulls the weights of each tag to its
    texts, and not to zero, its bias to that of the bundle."""
    calibrate: bool = False
    """Scale and shift each probe's logits of each tag to suit posts of authors that it has not
    seen. For this it is solved four more times, each time without a quarter of the authors."""


class KnnSettings(Section):
    """The tags of the training posts that resemble a post most; solved at once, for little data."""

    neighbours: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (5, 15, 50)
    """Of each modality. Of these and the temperatures below, training posts choose what suits their
    own neighbours."""
    temperatures: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = (
        0.03,
        0.1,
        0.3,
    )
    """A neighbour whose cosine is less by this much counts for 37%."""


class TagTextSettings(Section):
    """Tags by the vectors of their descriptions; `insighttag bundle add-tags` adds some by text."""

    start: Path | None = None
    """Training starts with the tags' vectors of this bundle, made by `insighttag zeroshot`; null
    starts with random ones, to which no tag can be added by text."""
    projected: dict[Stream, Stream] = Field(default_factory=dict)
    """Streams whose encoder embeds no texts: a learned map takes them into the space of another, as
    in ``{image: text}``."""


class ModelSettings(Section):
    """The fusion model: ``name`` chooses which of the sections below counts."""

    name: ModelName | Literal["auto"] = DEFAULT_MODEL
    """`auto` takes ``linear_probe`` for less data."""
    auto_posts: PositiveInt = 3000
    """Of `auto`: with fewer training posts than this, and no stream of which order tells (video,
    audio, or tokens of a text), it is ``linear_probe``, else the default."""
    modality_dropout: Share = 0.15
    """Chance that a modality is hidden from one post in one training step."""
    auxiliary: Weight = 0.0
    """Weight of the losses of heads that see one modality each; 0 makes no such heads."""
    tokens: TokenLimits = TokenLimits()
    token_transformer: TokenTransformerSettings = TokenTransformerSettings()
    concat_mlp: ConcatMlpSettings = ConcatMlpSettings()
    concat_se: ConcatSeSettings = ConcatSeSettings()
    gmu: GmuSettings = GmuSettings()
    nextvlad_se: NextVladSeSettings = NextVladSeSettings()
    attention_lstm: AttentionLstmSettings = AttentionLstmSettings()
    mbt: MbtSettings = MbtSettings()
    ml_decoder: MlDecoderSettings = MlDecoderSettings()
    late: LateSettings = LateSettings()
    linear_probe: LinearProbeSettings = LinearProbeSettings()
    knn: KnnSettings = KnnSettings()
    tag_text: TagTextSettings = TagTextSettings()
