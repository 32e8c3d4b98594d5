"""Tags by their texts: bundles without training, starts of trainings, and tags added by text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from common.errors import BundleError, ConfigError, told
from common.fingerprint import differing
from common.post import TEXT_STREAMS, Stream
from common.post_set import PostSet
from config.fusion_models import ModelSettings
from config.labels import LabelMap
from config.tags import TagTexts
from fusion.bundle.bundle import Bundle, joined, load_bundle
from fusion.data.dataset import FeatureFiles, PostDataset
from fusion.data.posts import PostList
from fusion.metrics.calibration import fit_thresholds
from fusion.metrics.ranking import summary
from fusion.models import FusionModel
from fusion.models.base import Collate, FeatureManifest, InputSchema
from fusion.models.probe import LinearProbe
from fusion.models.tag_text import TagText, mixed

Embed: TypeAlias = Callable[[Sequence[str]], npt.NDArray[np.float32]]
"""Returns unit vectors float32 ``(n, dim)`` of texts, in the space of a stream's features."""

# Standard deviation of the cosines of posts and tags that are unrelated, where no posts are at
# hand to measure it: texts with texts (MiniLM on openclipart: 0.10), and texts with pictures or
# sounds, which the two sides of an encoder keep further apart. Half would double the logits.
_TEXT_SPREAD, _MEDIA_SPREAD = 0.1, 0.04
# Logits without labels: a tag is given from 2.2 standard deviations on, 1 unrelated post in 70.
_SCALE, _GIVEN_FROM = 2.0, 2.2
_NEGATIVE = 0.5  # of the negatives' vector that is taken off; 1 would turn tags away from their own
# Posts that calibrate: a few hundred would do for the scales, thresholds of rare tags need more.
_MOST_POSTS, _MOST_SCORES = 20_000, 20_000_000
_BATCH = 256
_MIN_POSITIVES = 5  # as `bundle.min_positives`

_SETTINGS = ModelSettings(name="tag_text", modality_dropout=0.0)


@dataclass(frozen=True)
class TagRows:
    """The texts of tags in the space of one stream: unit vectors ``(tags, dim)``.

    Attributes:
        against: Of the negatives; zeros for a tag without.
    """

    vectors: torch.Tensor
    against: torch.Tensor

    @classmethod
    def of(cls, texts: TagTexts, embed: Embed) -> TagRows:
        """Embed each sentence once; of a tag's groups of sentences each counts alike."""
        tags = [texts.sentences(tag) for tag in texts.tags]
        tags += [[list(tag.negatives)] if tag.negatives else [] for tag in texts.tags]
        sentences = list(dict.fromkeys(text for tag in tags for group in tag for text in group))
        row = {text: i for i, text in enumerate(sentences)}
        embedded = torch.from_numpy(np.asarray(embed(sentences), np.float32))
        vectors = embedded.new_zeros(len(tags), embedded.shape[1])
        for place, groups in enumerate(tags):
            for group in groups:
                mean = embedded[[row[text] for text in group]].mean(0)
                vectors[place] += functional.normalize(mean, dim=0)
        unit = functional.normalize(vectors, dim=1)
        return cls(unit[: len(texts.tags)], unit[len(texts.tags) :])

    def centred(self, centre: torch.Tensor) -> torch.Tensor:
        """Return unit vectors less what all tags share, and less the negatives."""
        some = self.against.any(dim=1, keepdim=True)
        away = (self.against - centre) * some
        return functional.normalize(self.vectors - centre - _NEGATIVE * away, dim=1)


def zero_shot(
    texts: TagTexts,
    rows: Mapping[Stream, TagRows],
    manifest: FeatureManifest,
    posts: PostList | None = None,
    reader: FeatureFiles | None = None,
    *,
    name: str,
) -> Bundle:
    """Return a bundle, not written yet, that scores tags by their texts.

    Posts, with labels or without, centre its vectors; labels calibrate scale, bias, the weights of
    the streams and thresholds. Without posts a score of 0.5 is 2.2 standard deviations of
    unrelated texts. Posts that an encoder was trained on calibrate nothing; those that do are noted
    as learned from, and the metrics, which are of them, as of seen posts.
    """
    schema = InputSchema.of(manifest, _SETTINGS.tokens, len(texts.tags))
    model = TagText(schema, _SETTINGS).eval().requires_grad_(False)
    for stream in model.streams:
        each = rows[stream]
        centre = each.vectors.mean(0) if len(texts.tags) > 1 else torch.zeros(each.vectors.shape[1])
        spread = _TEXT_SPREAD if stream in TEXT_STREAMS else _MEDIA_SPREAD
        model.get_buffer(f"tag_centre_{stream}").copy_(centre)
        model.vectors[stream].copy_(each.centred(centre) / spread)
    model.from_texts.fill_(True)
    model.scale.fill_(_SCALE)
    model.bias.fill_(-_SCALE * _GIVEN_FROM)
    thresholds = np.full(len(texts.tags), 0.5, np.float32)
    metrics: dict[str, float] = {}
    learned_from = PostSet()
    if posts is not None and reader is not None:
        posts = _some(posts, len(texts.tags))
        said, present = _similarities(model, PostDataset(posts, reader, manifest, schema))
        new = [not reader.has_learned(p.post_id, p.features, manifest.dims) for p in posts]
        labelled = (np.diff(posts.label_rows()[0]) > 0) & np.array(new)
        learned_from = PostSet(posts.hashes[labelled])
        if labelled.any():
            targets = posts.targets()[labelled]
            _calibrate(model, said[labelled], present[labelled], torch.from_numpy(targets))
            scores = _scores(model, said[labelled], present[labelled])
            thresholds = fit_thresholds(scores, targets, min_positives=_MIN_POSITIVES)
            metrics = summary(scores, targets, thresholds)
    return Bundle(
        name=name,
        labels=texts.labels(),
        manifest=manifest,
        settings=_SETTINGS,
        model=model,
        thresholds=thresholds,
        metrics=metrics,
        seen_posts=len(learned_from),
        learned_from=learned_from,
    )


def _some(posts: PostList, tags: int) -> PostList:
    """Return posts from all over a list, as many as a calibration needs."""
    most = max(100, min(_MOST_POSTS, _MOST_SCORES // tags))
    rows = np.linspace(0, len(posts) - 1, min(most, len(posts))).round().astype(np.int64)
    return posts.take(np.unique(rows))


def _similarities(model: TagText, posts: PostDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre the model's posts, set the spread of its tags; return ``post . tag`` and a mask.

    ``(posts, streams, classes)`` and bool ``(posts, streams)``.
    """
    collate, streams = Collate(model.schema), model.streams
    similarities: dict[Stream, list[torch.Tensor]] = {stream: [] for stream in streams}
    masks: list[torch.Tensor] = []
    for start in range(0, len(posts), _BATCH):
        batch = collate([posts[i] for i in range(start, min(start + _BATCH, len(posts)))])
        for stream in streams:
            vectors = model.post_vectors(stream, batch.tokens[stream], batch.masks[stream])
            similarities[stream].append(vectors)
        masks.append(torch.stack([batch.masks[s].any(dim=1) for s in streams], dim=1))
    present = torch.cat(masks)
    said = []
    for i, stream in enumerate(streams):
        vectors, some = torch.cat(similarities[stream]), present[:, i]
        tags = model.vectors[stream]
        # Two posts are as far from their mean as it gets: it says nothing of others.
        if int(some.sum()) >= _MIN_POSITIVES:
            centre = vectors[some].mean(0)
            model.get_buffer(f"centre_{stream}").copy_(centre)
            vectors = functional.normalize(vectors - centre, dim=1)
            unit = functional.normalize(tags, dim=1)
            tags.copy_(unit / (vectors[some] @ unit.T).std().clamp(min=1e-3))
        said.append(vectors @ tags.T)
    return torch.stack(said, dim=1), present


def _calibrate(
    model: TagText, said: torch.Tensor, present: torch.Tensor, targets: torch.Tensor
) -> None:
    """Fit scale, bias and weights of streams to labels, by the cross entropy.

    Tags that no post has are left out: their labels may not have been given yet. Each tag's bias
    is held near that of all, as by a normal distribution around it.
    """
    known = targets.any(dim=0)
    scale, common = model.scale.log().clone(), model.bias.mean().clone()
    own, mixing = torch.zeros(int(known.sum())), torch.zeros(len(model.streams), 1)
    fitted = [each.requires_grad_() for each in (scale, common, own, mixing)]
    optimizer = torch.optim.LBFGS(fitted, max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = scale.exp() * mixed(said[:, :, known], present, mixing) + common + own
        wrong = functional.binary_cross_entropy_with_logits(
            logits, targets[:, known], reduction="sum"
        )
        total: torch.Tensor = wrong + (own.square().sum() + mixing.square().sum()) / 2
        total.backward()  # type: ignore[no-untyped-call]
        return total

    with torch.enable_grad():
        optimizer.step(loss)  # type: ignore[no-untyped-call]
    model.scale.copy_(scale.detach().exp())
    model.mixing.copy_(mixing.detach().expand_as(model.mixing))
    model.bias.copy_(common.detach().expand(len(known)))
    model.bias[known] += own.detach()


def _scores(model: TagText, said: torch.Tensor, present: torch.Tensor) -> npt.NDArray[np.float64]:
    logits = model.scale * mixed(said, present, model.mixing) + model.bias
    scores: npt.NDArray[np.float64] = torch.sigmoid(logits.double()).numpy()
    return scores


def text_streams(bundle: Bundle, where: str) -> tuple[Stream, ...]:
    """Return the streams in whose spaces a bundle holds the texts of its tags.

    Raises:
        ConfigError: Its tags have no texts.
    """
    first = bundle.members[0]
    if not isinstance(first, TagText) or not first.from_texts:
        raise ConfigError(
            f"{where}: its tags were not made of texts; insighttag zeroshot makes such a bundle, "
            "and train_net.py trains one from it (model.tag_text.start)"
        )
    return tuple(stream for stream in first.streams if stream in first.vectors)


def with_tags(bundle: Bundle, texts: TagTexts, rows: Mapping[Stream, TagRows]) -> Bundle:
    """Return a bundle with more tags, not written yet; the scores of the others stay.

    A new tag's bias and threshold are the median of the others', the weights of its modalities the
    mean. Its posts have not been measured, so the bundle has no metrics.

    Raises:
        ConfigError: The bundle has one of the tags.
    """
    names = bundle.labels.names
    for tag in texts.tags:
        if tag.name in names:
            raise ConfigError(f"tags: {tag.name!r} is in the bundle already")
    labels = LabelMap((*names, *(tag.name for tag in texts.tags)))
    schema = replace(bundle.schema, classes=len(labels))
    members = []
    for member in bundle.members:
        state = dict(member.state_dict())
        for stream, each in rows.items():
            old = state[f"vectors.{stream}"]
            more = each.centred(state[f"tag_centre_{stream}"]) * old.norm(dim=1).mean()
            state[f"vectors.{stream}"] = torch.cat([old, more])
        weights = state["mixing"].mean(dim=1, keepdim=True).expand(-1, len(texts.tags))
        state["mixing"] = torch.cat([state["mixing"], weights], dim=1)
        for key, value in state.items():
            if key == "bias" or key.startswith("own."):
                median = value.median(dim=0, keepdim=True).values
                state[key] = torch.cat([value, median.expand(len(texts.tags), *value.shape[1:])])
        grown = TagText(schema, bundle.settings)
        grown.load_state_dict(state)
        members.append(grown.requires_grad_(False))
    median = np.full(len(texts.tags), np.median(bundle.thresholds), np.float32)
    return replace(
        bundle,
        labels=labels,
        model=joined(members, bundle.averaging),
        thresholds=np.concatenate([bundle.thresholds, median]),
        metrics={},
        subsets={},
        seen_posts=0,
    )


def start_from_texts(
    model: FusionModel, settings: ModelSettings, manifest: FeatureManifest, labels: LabelMap
) -> None:
    """Let a model that will be trained start with the tags of its setting ``start``.

    Raises:
        ConfigError: That bundle lacks a tag or stream, or its features are made otherwise.
    """
    if not isinstance(model, TagText | LinearProbe):
        return
    learned = isinstance(model, TagText)
    setting = f"model.{'tag_text' if learned else 'linear_probe'}.start"
    path = settings.tag_text.start if learned else settings.linear_probe.start
    if path is None:
        return
    with told(f"{setting}", BundleError):
        bundle = load_bundle(path)
    setting = f"{setting}: {path}"
    streams, earlier = text_streams(bundle, setting), bundle.members[0]
    lost = [name for name in labels.names if name not in bundle.labels.index]
    if lost:
        raise ConfigError(
            f"{setting}: has no tag {lost[0]!r}: insighttag bundle add-tags adds it by text"
        )
    order = torch.tensor(bundle.labels.encode(labels.names))
    spaces: set[str] = set(model.vectors) if isinstance(model, TagText) else set(streams)
    for stream in [each for each in model.streams if each in spaces] or model.streams:
        if stream not in streams:
            raise ConfigError(
                f"{setting}: has no texts in the space of {stream}: name it in "
                "model.tag_text.projected, or leave it out of data.modalities"
            )
        needs, made_by = bundle.manifest.fingerprints[stream], manifest.fingerprints[stream]
        if needs != made_by:
            raise ConfigError(
                f"{setting}: {stream} features are not made like its texts"
                f"{differing(needs, made_by)}"
            )
    if isinstance(model, LinearProbe):
        model.start = _linear(cast("TagText", earlier), model, order)
        return
    state = model.state_dict()  # shares its memory with the model
    for key, value in earlier.state_dict().items():
        if key in state and key.startswith("vectors."):
            state[key].copy_(value[order])
        elif key in state and (
            key.startswith(("centre_", "tag_centre_", "from_t")) or key == "scale"
        ):
            state[key].copy_(value)


def _linear(
    texts: TagText, model: LinearProbe, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and biases of a probe that score about as the texts do.

    Both take the mean post off a vector, and of what is left the length: the texts of each post,
    the probe of all on average.
    """
    known = [stream for stream in model.streams if stream in texts.vectors]
    rows = [texts.streams.index(stream) for stream in known]
    shares = dict(zip(known, texts.scale * texts.mixing[rows].softmax(dim=0), strict=True))
    weights = [
        shares[stream][:, None] * texts.vectors[stream]
        if stream in shares
        else torch.zeros(len(texts.bias), model.schema.dims[stream])
        for stream in model.streams
    ]
    return torch.cat(weights, dim=1)[order].detach(), texts.bias[order].detach()
